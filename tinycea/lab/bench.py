"""tinycea against the same network in PyTorch (the twin) and in JAX: time and peak memory.

Each side lives in a process of its own and all are run in turn, so that a slow moment of the machine strikes all; what is
compared is first shown to give the same outputs and gradients. Every side gets one thread, then all cores.
"""
import importlib.util
import json
import os
import time
from collections import defaultdict
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from .. import cea, nafnet, restoration
from ..nafnet import NAFNetConfig, block_shapes, centered, init, nafblock, nafblock_backward
from ..ops import backend, cpu, reference
from ..params import Params, under
from ..runtime import InputError, machine, peak_memory, pool, shared
from ..training import advance, recipe_for, start

JOBS = ([(f"CEA {passes}", size) for passes in ("forward", "forward+backward")
         for size in ((4096, 48, 8), (16384, 24, 8), (65536, 32, 16))]          # (N,C,R)
        + [("NAFBlock forward+backward", (8, 64, 64, 32)), ("training step", (8, 48)), ("training step", (8, 96)),
           ("inference", (1, 256)), ("inference", (1, 512)), ("inference", (1, 1024))])
FORWARD = "CEA forward", "inference"          # the others compute gradients
PEAKS = [("training step", (8, 48)), ("training step", (8, 96)), ("inference", (1, 1024))]
QUICK = [JOBS[i] for i in (3, 6, 7, 9)], PEAKS[:1]
GPU_JOBS = [*JOBS[3:6], ("CEA forward+backward", (2**20, 128, 16)), JOBS[7], ("training step", (32, 128))]
KERNELS = 2**20, 128, 16                      # (N,C,R) of the kernels' rows
TOLERANCE = 1e-3                              # largest difference over largest value: float32 through a whole network and back
TURN = 0.05                                   # seconds that a side runs before it is the other's turn
LR, DECAY, CLIP = 1e-4, 1e-4, 1.0


# ---- the sides: (kind, size) -> a function that runs the job once, and one that makes NumPy arrays of what it returned ------

def job_data(kind, size):
    """A job's configuration (CEA: heads), parameters, input, target (or upstream gradient), (B,H,W,C), for both sides alike."""
    rng = np.random.default_rng(0)
    if kind.startswith("CEA"):
        N, C, R = size
        config, shape = 4, (1, int(N**0.5), int(N**0.5), C)
        p = Params(cea.shapes(C, R, config))
        cea.init(p, rng)
        p["W_U"] = rng.normal(0, C**-0.5, p["W_U"].shape)                       # zero at initialization
    elif kind.startswith("NAFBlock"):
        config, shape = None, size
        p = Params(block_shapes(size[-1]))
        p.flat[:] = rng.normal(0, size[-1]**-0.5, p.flat.size)
    else:
        config, shape = NAFNetConfig(), (size[0], size[1], size[1], 3)
        p = init(config, rng)
        p.flat[:] += rng.normal(0, 0.05, p.flat.size)                           # beta, gamma and W_U are zero at initialization
        return config, p, *(rng.random(shape, np.float32) for _ in range(2))
    return config, p, *(rng.normal(size=shape).astype(np.float32) for _ in range(2))


def forward(x, p, config, room, threads=1):
    """What a job's configuration says: a NAFBlock (None), a CEA layer (its heads) or the network -> y, cache."""
    if config is None:
        return nafblock(x, p, room)
    whole = centered if threads == 1 else lambda *inputs, keep: restoration.banded(*inputs, keep, threads)
    return cea.cea(x, p, config, room) if isinstance(config, int) else whole(x, p, config, room, keep=False)


def ours(kind, size, room=cpu, n=1):
    """The job in tinycea on a backend and n cores; it returns the arrays to compare.

    A batch is n chunks: of a training step on processes, as in `train`; of a NAFBlock on threads, as its outputs are large.
    """
    cpu.keep_memory()
    config, p, *images = job_data(kind, size)
    images = list(map(room.to_device, images))
    if kind == "training step":
        recipe = recipe_for(batch=size[0], patch=size[1], chunks=n, nominal=True, floor=1e-8,
                            backend="cpu" if room is cpu else "cuda")
        state, share = start(recipe), HANDS.enter_context(shared(n, cpu.keep_memory))
        state.p.flat[:] = room.to_device(p.flat)
        return lambda: (np.asarray(advance(state, *images, 1, recipe, share)[1]), state.g.flat)
    p = p.over(room.to_device(p.flat))
    if kind in FORWARD:
        return lambda: forward(images[0], p, config, room, n)[:1]
    chunks = [np.array_split(a, min(n, len(a))) for a in images]
    each = HANDS.enter_context(ThreadPoolExecutor(n)).map if len(chunks[0]) > 1 else map

    def part(x, target):
        g = p.zeros_like()
        y, cache = forward(x, p, config, room)
        return y, (cea.cea_backward if config else nafblock_backward)(target, cache, g), g.flat

    def both():
        *outputs, g = zip(*each(part, *chunks))
        return *(np.concatenate(o) if len(o) > 1 else o[0] for o in outputs), sum(g)
    return both


def jaxed(kind, size, threads=1):
    """The job in JAX, as `theirs`: the text of ops/reference on jax.numpy, compiled. It changes the modules of its process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])      # JAX takes every core that it sees
    import jax

    def windows(x, *_):
        shifts = [x[:, i:x.shape[1] - 2 + i, j:x.shape[2] - 2 + j] for i, j in np.ndindex(3, 3)]
        return jax.numpy.stack(shifts, -1).reshape(*shifts[0].shape, 3, 3)
    config, p, *images = job_data(kind, size)
    x, target, w, m, v = map(jax.numpy.asarray, (*images, p.flat, 0 * p.flat, 0 * p.flat))
    reference.sliding_window_view = windows
    reference.np = nafnet.np = SimpleNamespace(**vars(jax.numpy) | {"ndindex": np.ndindex})

    def net(w, x):
        return forward(x, p.over(w), config, reference)[0]

    def both(w, x, target, m, v):
        y, backward = jax.vjp(net, w, x)
        return y, *reversed(backward(target))

    def step(w, x, target, m, v):
        loss, g = jax.value_and_grad(lambda w: reference.psnr_loss(net(w, x), target)[0])(w)
        g = g * jax.numpy.minimum(1, CLIP / jax.numpy.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        return loss, g, (w - LR * (m / 0.1 / (jax.numpy.sqrt(v / 0.01) + 1e-8) + DECAY * w), m, v)
    run = jax.jit((lambda w, x, *_: (net(w, x),)) if kind in FORWARD else step if kind == "training step" else both)
    return (lambda: jax.block_until_ready(run(w, x, target, m, v)),
            lambda arrays: [np.asarray(a) for a in arrays if not isinstance(a, tuple)])


def theirs(kind, size, layout, threads, device="cpu"):
    """The job in PyTorch, eager or "compiled", and a function that makes arrays like `ours` of what it returned."""
    import torch

    from . import twin
    torch.set_num_threads(threads)
    compiled, layout = layout == "compiled", torch.contiguous_format if layout == "NCHW" else torch.channels_last
    config, p, *arrays = job_data(kind, size)
    if kind.startswith("CEA"):
        net = twin.CEA(p, config)
    elif kind.startswith("NAFBlock"):
        net = twin.NAFBlock(size[-1])
    else:
        heads = config.adapter.heads
        net = twin.NAFNet(config, {stage: twin.CEA(under(p, f"adapters.{stage}"), heads) for stage in config.adapted()})
    net = net.to(device, memory_format=layout)
    parameters = twin.named(net)
    with torch.no_grad():
        for name, value in p.items():
            parameters[name].copy_(torch.as_tensor(value))
    net = torch.compile(net) if compiled else net
    x, target = (torch.as_tensor(a, device=device).permute(0, 3, 1, 2).contiguous(memory_format=layout) for a in arrays)
    optimizer = torch.optim.AdamW(net.parameters(), LR, (0.9, 0.99), weight_decay=DECAY, fused=True)

    def restored():
        return (net(2 * x - 1) + 1) / 2

    def both():
        net.zero_grad()
        x.requires_grad, x.grad = True, None
        y = net(x)
        y.backward(target)
        return y, x.grad

    def step():
        net.zero_grad()
        mse = (restored() - target).square().mean((1, 2, 3))
        loss = 10 * torch.log10(mse + 1e-8).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        return (loss,)

    def answers(images):
        gradients = [parameters[name].grad.reshape(-1) for name in p if parameters[name].grad is not None]
        images = [y.detach().permute(0, 2, 3, 1) if y.ndim == 4 else y.detach() for y in images]
        return [tensor.cpu().numpy() for tensor in images + ([torch.cat(gradients)] if gradients else [])]
    run = {"inference": lambda: (restored(),), "CEA forward": lambda: (net(x),), "training step": step}.get(kind, both)
    return torch.no_grad()(run) if kind in FORWARD else run, answers


# ---- processes --------------------------------------------------------------------------------------------------------

HERE, HANDS = {}, ExitStack()                 # of a side's own process: the job that it prepared, and who computes it


def serve(task, job, side, threads=1, device="cpu"):
    """Do as a side's process is asked: prepare a job, then time it, or tell its memory in MB."""
    room = backend(device) if side == "tinycea" else None
    gpu = device != "cpu" and (room or importlib.import_module("torch").cuda)
    if task == "prepare":
        HANDS.close()
        HERE["run"], answers = (ours(*job, room, threads), lambda arrays: [*map(room.to_host, arrays)]) if room else \
            jaxed(*job, threads) if side == "JAX" else theirs(*job, side, threads, device)
        return answers(HERE["run"]())
    if task == "time":
        return seconds_of(HERE["run"], (room.cp.cuda.get_current_stream() if room else gpu).synchronize if gpu else int)
    pool = room.cp.get_default_memory_pool() if gpu and room else None
    return (pool.total_bytes() if pool else gpu.max_memory_reserved()) / 2**20 if gpu else peak_memory()


def seconds_of(run, wait):
    """Seconds of one run: the mean over TURN, after one that is not timed; each is waited for."""
    run()                                     # untimed: brings its data back into the caches
    wait()
    runs, start = 0, time.perf_counter()
    while not runs or time.perf_counter() - start < TURN:
        run()
        wait()
        runs += 1
    return (time.perf_counter() - start) / runs


@contextmanager
def contender(*side):
    """A process of a side; within: ask(task, *job), which returns what it serves. InputError when it dies."""
    with pool(1) as executor:
        def ask(task, *job):
            try:
                return executor.submit(serve, task, job, *side).result()
            except BrokenExecutor:
                raise InputError(f"the bench's process ended at {(task, *job)}; its own words are above") from None
        yield ask


def race(asks, kind, size, rounds):
    """Seconds of every run, one list per side; the sides take turns. InputError where an output is not the first side's."""
    outputs = {side: ask("prepare", kind, size) for side, ask in asks.items()}
    first, *others = outputs
    for side in others:
        if not _alike(outputs[first], outputs[side]):
            raise InputError(f"{kind} {size}: {side} computes something else than {first}")
    seconds = {side: [] for side in asks}
    for _ in range(rounds):
        for side, ask in asks.items():
            seconds[side].append(ask("time"))
    return seconds


def _alike(a, b):
    return len(a) == len(b) and all(np.abs(x - y.reshape(np.shape(x))).max() <= TOLERANCE * np.abs(y).max() for x, y in zip(a, b))


# ---- the rows ---------------------------------------------------------------------------------------------------------

def row(name, mine, other, rival, unit):
    """Medians, their ratio, and the quartiles of the ratios of single rounds; the rival's are None where there is none."""
    ours = float(np.median(mine))
    theirs = ratio = spread = None
    if other is not None:
        theirs = float(np.median(other))
        ratio, spread = ours / theirs, np.quantile(np.divide(mine, other), (0.25, 0.75)).tolist()
    return {"name": name, f"ours_{unit}": ours, f"theirs_{unit}": theirs, "ratio": ratio, "spread": spread, "rival": rival}


def rows(name, values, threads, unit):
    """A row for each rival on so many threads; PyTorch's is that of its faster layout."""
    for sides in (("NCHW", "channels_last"), ("JAX",)):
        found = [side for side in sides if (side, threads) in values]
        for best in sorted(found, key=lambda side: np.median(values[side, threads]))[:1]:
            rival = f"{'PyTorch ' * (best != 'JAX')}{best}, {threads} thread{'s' * (threads > 1)}"
            yield row(name, values["tinycea", threads], values[best, threads], rival, unit)
    if all(side == "tinycea" for side, _ in values):
        yield row(name, values["tinycea", threads], None, "PyTorch and JAX are not installed", unit)


def label(kind, size):
    """A job in words."""
    if kind.startswith("CEA"):
        return f"{kind}, N {size[0]}, C {size[1]}, R {size[2]}"
    return f"{kind}, batch {size[0]}, {size[1]} x {size[1]}" + (f", C {size[3]}" if len(size) > 2 else "")


def bench(quick=False):
    """Yield the rows, dicts as `row` makes them; twelve minutes, one or two with `quick`. Without rivals: ours alone.

    Three times each side gets a new process: PyTorch's on two threads may be twice as slow as the one before, for all its life.
    """
    counts = sorted({1, os.cpu_count()})
    rivals = (("NCHW", "torch"), ("channels_last", "torch"), ("JAX", "jax"))
    names = ["tinycea", *(side for side, package in rivals if importlib.util.find_spec(package))]
    jobs, peaks = QUICK if quick else (JOBS, PEAKS)
    seconds = defaultdict(lambda: defaultdict(list))
    for life in range(1 if quick else 3):
        with ExitStack() as stack:
            asks = {(name, n): stack.enter_context(contender(name, n)) for n in counts for name in names}
            for job in tqdm(jobs, desc=f"processes {life + 1}", leave=False, disable=None):
                for side, turns in race(asks, *job, 3).items():
                    seconds[job][side] += turns
    for job, found in seconds.items():
        for n in counts:
            yield from rows(label(*job), found, n, "s")
        for n in counts[1:]:
            yield row(f"{label(*job)}, {n} threads", *(found["tinycea", k] for k in (n, 1)), "tinycea, 1 thread", "s")
    for kind, size in peaks:
        memory = {(name, 1): [peak(kind, size, name)] for name in names}
        yield from rows(f"peak memory, {label(kind, size)}", memory, 1, "mb")


def bench_gpu(quick=False):
    """Yield the rows of the cuda backend: bytes a second of every op, then time and memory of CEA and the training step.

    The ops are held against a copy on the device; the rest against PyTorch on the same GPU, eager and compiled (where it is
    installed and sees the GPU).
    """
    room = backend("cuda")
    wait = room.cp.cuda.get_current_stream().synchronize
    rounds = 3 if quick else 21
    N, C, R = KERNELS[0] // (8 if quick else 1), *KERNELS[1:]
    a = room.to_device(np.ones(N * C, np.float32))
    copies = [2 * a.nbytes / seconds_of(a.copy, wait) / 1e9 for _ in range(rounds)]
    for name, run, numbers in kernels(room, N, C, R):
        rates = [4 * numbers / seconds_of(run, wait) / 1e9 for _ in range(rounds)]
        yield row(f"{name}, N {N}, C {C}, R {R}", rates, copies, "copy on the device", "gb")
    sides = ["tinycea"]
    if importlib.util.find_spec("torch") and importlib.import_module("torch").cuda.is_available():
        sides += ["channels_last", "compiled"]
    for kind, size in GPU_JOBS[4:5] if quick else GPU_JOBS:
        with ExitStack() as stack:
            seconds = race({side: stack.enter_context(contender(side, 1, "cuda")) for side in sides}, kind, size, rounds)
        memory = {side: [peak(kind, size, side, 1, "cuda")] for side in sides}
        for side in sides[1:] or [None]:
            rival = f"PyTorch {side}" if side else "PyTorch is not installed, or sees no GPU"
            yield row(label(kind, size), seconds["tinycea"], seconds.get(side), rival, "s")
            yield row(f"GPU memory, {label(kind, size)}", memory["tinycea"], memory.get(side), rival, "mb")


def least_work(N, C, R, heads=4):
    """GPU kernel -> how many numbers it must at least read and write, and its FLOPs: the heads of ops/kernels, in figures."""
    M = heads * R
    return {"adamw": (9 * N, 16 * N), "layernorm": (2 * N * C, 8 * N * C), "layernorm_backward": (3 * N * C, 14 * N * C),
            "probe": (N * C, 4 * N * M * C), "probe_backward": (2 * N * C, 10 * N * M * C),
            "assembly": (3 * N * C, 4 * N * R * C), "assembly_backward": (3 * N * C, 10 * N * R * C),
            "depthwise": (2 * N * C, 18 * N * C), "scale": (2 * N * C, N * C), "scale_backward": (3 * N * C, 3 * N * C),
            "gated_depthwise": (3 * N * C, 38 * N * C), "gated_depthwise_backward": (5 * N * C, 76 * N * C)}


def kernels(room, N, C, R):
    """Yield (name, run, numbers): each op with a kernel of its own, and how many numbers it must at least read and write."""
    rng = np.random.default_rng(0)

    def n(*shape):
        return room.to_device(rng.normal(size=shape).astype(np.float32))

    side = int(N**0.5)
    image, N = n(1, side, side, C), side * side
    tokens = image.reshape(1, -1, C)

    def pair(name, kernel, *arguments):
        y, cache = getattr(room, name)(*arguments)
        dy, backward = room.to_device(np.ones(y.shape, np.float32)), getattr(room, f"{name}_backward")
        least = least_work(N, y.shape[-1], R)
        yield name, lambda: getattr(room, name)(*arguments), least[kernel][0]
        yield f"{name}_backward", lambda: backward(dy, cache), least[f"{kernel}_backward"][0]
    yield from pair("layernorm", "layernorm", tokens, n(C), n(C))
    yield from pair("scale_channels", "scale", image, n(1, 1, 1, C))
    yield from pair("gated_depthwise3x3", "gated_depthwise", image, n(C, 1, 3, 3), n(C))
    yield from pair("summarize", "probe", tokens, n(C, C), n(C, C), n(R, C), 4)
    yield from pair("assembly", "assembly", tokens, tokens, n(1, R, C), n(1, R, C))
    flat = [n(N * C // 8) for _ in range(4)]
    flat[3] = abs(flat[3])
    yield "adamw", lambda: room.adamw(*flat, 1, LR, DECAY), least_work(flat[0].size, C, R)["adamw"][0]


def peak(kind, size, *settings):
    """MB at the peak of a process of its own that ran the job a few times."""
    with contender(*settings) as ask:
        ask("prepare", kind, size)
        ask("time")
        return ask("peak memory")


def format_row(r):
    """One line of the table."""
    unit = next(key[5:] for key in r if key.startswith("ours_"))
    factor, text = {"s": (1e3, "{:.4g} ms"), "mb": (1, "{:.0f} MB"), "gb": (1, "{:.4g} GB/s")}[unit]
    mine, other = ("" if x is None else text.format(factor * x) for x in (r[f"ours_{unit}"], r[f"theirs_{unit}"]))
    ratio = f"{r['ratio']:.2f}" if other else ""
    spread = "{:.2f}-{:.2f}".format(*r["spread"]) if other and r["spread"][0] < r["spread"][1] else ""
    return f"{r['name']:62s} {mine:>10s} {other:>10s} {ratio:>6s} {spread:>10s}  {r['rival'] if other else ''}".rstrip()


def publish(backend_name, quick, as_json):
    """Print the rows of a backend, or all as JSON, then what machine they were measured on."""
    rows = bench_gpu(quick) if backend_name == "cuda" else bench(quick)
    if as_json:
        return print(json.dumps(list(rows), indent=1))
    print(f"{'':62s} {'tinycea':>10s} {'rival':>10s} {'ratio':>6s} {'quartiles':>10s}  rival")
    for row in rows:
        print(format_row(row), flush=True)
    versions = ["numpy", *filter(importlib.util.find_spec, ("torch", "jax"))]
    gpu = [backend("cuda").cp.cuda.runtime.getDeviceProperties(0)["name"].decode()] if backend_name == "cuda" else []
    print(f"{', '.join([*gpu, machine()])}; {', '.join(f'{name} {version(name)}' for name in versions)}; float32; {date.today()}")
