"""tinycea against its twin, the same network in PyTorch: time, peak memory, growth with the image, cold start.

Each side lives in a process of its own and both are run in turn, so that a slow moment of the machine strikes both; what is
compared is first shown to give the same outputs and gradients. tinycea computes on one thread; PyTorch gets one thread, then all
cores.
"""
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
import tracemalloc
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version

import numpy as np
from tqdm import tqdm

from .. import cea
from ..nafnet import NAFNetConfig, block_shapes, centered, init, nafblock, nafblock_backward
from ..ops import backend, cpu
from ..optim import clip_by_norm
from ..params import Params, under
from ..runtime import InputError, machine, peak_memory
from ..training import gradient, on_device

LAYERS = [(4096, 48, 8), (16384, 24, 8), (65536, 32, 16)]                       # (N,C,R) of the CEA rows
JOBS = ([(kind, size) for kind in ("CEA forward", "CEA forward+backward") for size in LAYERS]
        + [("NAFBlock forward+backward", (8, 64, 64, 32)), ("training step", (8, 48)), ("training step", (8, 96)),
           ("inference", (1, 256)), ("inference", (1, 512)), ("inference", (1, 1024))])
PEAKS = [("training step", (8, 48)), ("training step", (8, 96)), ("inference", (1, 1024))]
GROWTH = [64, 128, 256, 512, 1024]
FULL, QUICK = (JOBS, PEAKS, GROWTH), ([JOBS[3], JOBS[6], JOBS[7], JOBS[9]], PEAKS[:1], GROWTH[:3])
GPU_JOBS = [*JOBS[3:6], ("CEA forward+backward", (2**20, 128, 16)), JOBS[7], ("training step", (32, 128))]
KERNELS = 2**20, 128, 16                      # (N,C,R) of the kernels' rows
TOLERANCE = 1e-3                              # largest difference over largest value: float32 through a whole network and back
TURN = 0.05                                   # seconds that a side runs before it is the other's turn
LR, DECAY, CLIP = 1e-4, 1e-4, 1.0


# ---- the two sides: (kind, size) -> a function that runs the job once ------------------------------------

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


def ours(kind, size, room=cpu):
    """The job in tinycea on a backend; it returns the arrays to compare."""
    cpu.keep_memory()
    config, p, *images = job_data(kind, size)
    p, x, target = on_device(p, room), *map(room.to_device, images)
    g, m, v = p.zeros_like(), np.zeros_like(p.flat), np.zeros_like(p.flat)

    def forward():
        return cea.cea(x, p, config, room) if config else nafblock(x, p, room)

    def both():
        g.flat[:] = 0
        y, cache = forward()
        dx = (cea.cea_backward if config else nafblock_backward)(target, cache, g)
        return y, dx, g.flat

    def step():
        loss = gradient(x, target, p, config, room, g)
        clip_by_norm(g.flat, CLIP)
        room.adamw(p.flat, g.flat, m, v, 1, LR, DECAY)
        return loss, g.flat
    return {"inference": lambda: (centered(x, p, config, room, keep=False)[0],), "training step": step,
            "CEA forward": lambda: forward()[:1]}.get(kind, both)


def theirs(kind, size, layout, threads, device="cpu", compiled=False):
    """The job in PyTorch, eager or by torch.compile, and a function that makes arrays like `ours` of what it returned."""
    import torch

    from . import twin
    torch.set_num_threads(threads)
    layout = getattr(torch, {"NCHW": "contiguous_format"}.get(layout, layout))
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

    @torch.no_grad()
    def forward():
        return (net(x) if kind.startswith("CEA") else (net(2 * x - 1) + 1) / 2,)

    def both():
        net.zero_grad()
        x.requires_grad, x.grad = True, None
        y = net(x)
        y.backward(target)
        return y, x.grad

    def step():
        net.zero_grad()
        mse = ((net(2 * x - 1) + 1) / 2 - target).square().mean((1, 2, 3))
        loss = 10 * torch.log10(mse + 1e-8).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        return (loss,)

    def answers(images):
        gradients = [parameters[name].grad.reshape(-1) for name in p if parameters[name].grad is not None]
        images = [y.detach().permute(0, 2, 3, 1) if y.ndim == 4 else y.detach() for y in images]
        return [tensor.cpu().numpy() for tensor in images + ([torch.cat(gradients)] if gradients else [])]
    return {"inference": forward, "training step": step, "CEA forward": forward}.get(kind, both), answers


# ---- processes --------------------------------------------------------------------------------------------------------

def serve(connection, layout=None, threads=1, device="cpu", compiled=False):
    """One side's process: prepares the job it is sent and runs it when asked, until it is terminated."""
    room = None if layout else backend(device)
    wait = waiter(device, room)
    while True:
        task, *job = connection.recv()
        if task == "prepare":
            run, answers = (theirs(*job, layout, threads, device, compiled) if layout
                            else (ours(*job, room), lambda arrays: [*map(room.to_host, arrays)]))
            connection.send(answers(run()))
        elif task == "time":
            connection.send(seconds_of(run, wait))
        elif task == "peak memory":
            connection.send(peak_memory() if device == "cpu" else reserved(room))
        elif task == "peak of arrays":
            tracemalloc.start()
            run()
            connection.send(tracemalloc.get_traced_memory()[1] / 2**20)


def waiter(device, room):
    """A function that waits for the device: nothing on a CPU, else PyTorch's, or that of our backend."""
    if device == "cpu":
        return lambda: None
    return room.synchronize if room else importlib.import_module("torch").cuda.synchronize


def reserved(room):
    """MB that our backend, or without one PyTorch, has reserved on the GPU."""
    return (room.reserved() if room else importlib.import_module("torch").cuda.max_memory_reserved()) / 2**20


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
def contender(*settings):
    """A process that serves; within: ask(task, *job), which returns its answer. InputError when it dies."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=serve, args=(other, *settings), daemon=True)
    process.start()
    other.close()                             # the process's alone, so that we hear of its end

    def ask(*message):
        try:
            connection.send(message)
            return connection.recv()
        except (EOFError, ConnectionError):
            raise InputError(f"the bench's process ended at {message}; its own words are above") from None
    try:
        yield ask
    finally:
        process.terminate()
        process.join()
        connection.close()


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


def fastest(values, threads):
    """PyTorch's side of smallest median on so many threads: its key in `values` (None without PyTorch), and its name in a row."""
    best = min(((layout, n) for layout, n in values if layout != "tinycea" and n == threads),
               key=lambda side: np.median(values[side]), default=None)
    return best, f"PyTorch {best[0]}, {threads} thread{'s' * (threads > 1)}" if best else "PyTorch is not installed"


def label(kind, size):
    """A job in words."""
    if kind.startswith("CEA"):
        return f"{kind}, N {size[0]}, C {size[1]}, R {size[2]}"
    return f"{kind}, batch {size[0]}, {size[1]} x {size[1]}" + (f", C {size[3]}" if len(size) > 2 else "")


def bench(quick=False):
    """Yield the rows, dicts as `row` makes them; ten minutes on two cores, a minute with `quick`. Without PyTorch: ours alone."""
    torch = importlib.util.find_spec("torch") is not None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    layouts = ("NCHW", "channels_last") if torch else ()
    threads = sorted({1, cores}) if torch else [1]
    jobs, peaks, growth = QUICK if quick else FULL
    with tqdm(total=len(jobs) + len(peaks) + 2 * len(growth) + 3, desc="bench", leave=False, disable=None) as bar:
        settings = {("tinycea", 1): ()} | {(layout, n): (layout, n) for n in threads for layout in layouts}
        with ExitStack() as stack:
            asks = {name: stack.enter_context(contender(*arguments)) for name, arguments in settings.items()}
            for kind, size in jobs:
                bar.set_postfix_str(label(kind, size))
                seconds = race(asks, kind, size, 3 if quick else 21)
                for n in threads:
                    best, rival = fastest(seconds, n)
                    yield row(label(kind, size), seconds["tinycea", 1], seconds.get(best), rival, "s")
                bar.update()
            yield from growth_rows(asks, growth, 3 if quick else 5, bar)
        for kind, size in peaks:
            memory = {name: [peak("peak memory", kind, size, 3, *setting)] for name, setting in settings.items() if name[1] == 1}
            best, rival = fastest(memory, 1)
            yield row(f"peak memory, {label(kind, size)}", memory["tinycea", 1], memory.get(best), rival, "mb")
            bar.update()
        yield from cold_start(torch, 1 if quick else 9, bar)


def bench_gpu(quick=False):
    """Yield the rows of the cuda backend: bytes a second of every op, then time and memory of CEA and the training step.

    The ops are held against a copy on the device; the rest against PyTorch on the same GPU, eager and compiled (where it is
    installed and sees the GPU).
    """
    room = backend("cuda")
    rounds = 3 if quick else 21
    N, C, R = KERNELS[0] // (8 if quick else 1), *KERNELS[1:]
    a = room.to_device(np.ones(N * C, np.float32))
    copies = [2 * a.nbytes / seconds_of(a.copy, room.synchronize) / 1e9 for _ in range(rounds)]
    for name, run, numbers in kernels(room, N, C, R):
        rates = [4 * numbers / seconds_of(run, room.synchronize) / 1e9 for _ in range(rounds)]
        yield row(f"{name}, N {N}, C {C}, R {R}", rates, copies, "copy on the device", "gb")
    settings = {("tinycea", 1): (None, 1, "cuda")}
    if importlib.util.find_spec("torch") and importlib.import_module("torch").cuda.is_available():
        settings |= {(name, 1): ("channels_last", 1, "cuda", name == "compiled") for name in ("eager", "compiled")}
    for kind, size in GPU_JOBS[4:5] if quick else GPU_JOBS:
        with ExitStack() as stack:
            asks = {name: stack.enter_context(contender(*arguments)) for name, arguments in settings.items()}
            seconds = race(asks, kind, size, rounds)
        memory = {name: [peak("peak memory", kind, size, 3, *arguments)] for name, arguments in settings.items()}
        for name in list(settings)[1:] or [None]:
            rival = f"PyTorch {name[0]}" if name else "PyTorch is not installed, or sees no GPU"
            yield row(label(kind, size), seconds["tinycea", 1], seconds.get(name), rival, "s")
            yield row(f"GPU memory, {label(kind, size)}", memory["tinycea", 1], memory.get(name), rival, "mb")


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


def peak(what, kind, size, runs, *settings):
    """MB at the peak of a process of its own that ran the job a few times."""
    with contender(*settings) as ask:
        ask("prepare", kind, size)
        for _ in range(runs - 1):
            ask("time")
        return ask(what)


def exponent(sizes, values):
    """The slope of log value over log pixels."""
    return np.polyfit(2 * np.log(sizes), np.log(values), 1)[0]


def growth_rows(asks, sizes, rounds, bar):
    """Exponents of time and of the arrays' memory over the pixels of one image; PyTorch's time at its faster layout."""
    asks = {side: ask for side, ask in asks.items() if side[1] == 1}
    for kind in ("inference", "training step"):
        seconds, megabytes = [], []
        for n in sizes:
            bar.set_postfix_str(f"growth, {kind}, {n} x {n}")
            seconds.append(race(asks, kind, (1, n), rounds))
            megabytes.append(peak("peak of arrays", kind, (1, n), 1))
            bar.update()
        best, rival = fastest(seconds[-1], 1)
        name = f"{kind} over {sizes[0]} x {sizes[0]} to {sizes[-1]} x {sizes[-1]} pixels"
        exponents = {side: [exponent(sizes, [np.median(s[side]) for s in seconds])] for side in asks}
        yield row(f"time, {name}", exponents["tinycea", 1], exponents.get(best), rival, "exponent")
        yield row(f"memory of arrays, {name}", [exponent(sizes, megabytes)], None, "none", "exponent")


def cold_start(torch, rounds, bar):
    """Whole processes: importing the network, against importing NumPy and PyTorch; the gradient check."""
    commands = {"tinycea": ["-c", "import tinycea.nafnet"], "numpy": ["-c", "import numpy"]}
    commands |= {"torch": ["-c", "import torch"]} if torch else {}
    seconds = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            seconds[name].append(process_seconds(arguments))
    for name in list(commands)[1:]:
        yield row("cold start, import tinycea.nafnet", seconds["tinycea"], seconds[name], f"import {name}", "s")
    bar.update(2)
    yield row("cold start, tinycea gradcheck", [process_seconds(["-m", "tinycea", "gradcheck"])], None, "none", "s")
    bar.update()


def process_seconds(arguments):
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def format_row(r):
    """One line of the table."""
    unit = next(key[5:] for key in r if key.startswith("ours_"))
    factor, text = {"s": (1e3, "{:.4g} ms"), "mb": (1, "{:.0f} MB"), "gb": (1, "{:.4g} GB/s"), "exponent": (1, "{:.2f}")}[unit]
    mine, other = ("" if x is None else text.format(factor * x) for x in (r[f"ours_{unit}"], r[f"theirs_{unit}"]))
    ratio, spread = (f"{r['ratio']:.2f}", "{:.2f}-{:.2f}".format(*r["spread"])) if other else ("", "")
    if len(set(r["spread"] or [0])) == 1:
        spread = ""
    return f"{r['name']:62s} {mine:>10s} {other:>10s} {ratio:>6s} {spread:>10s}  {r['rival'] if other else ''}".rstrip()


HEADER = f"{'':62s} {'tinycea':>10s} {'rival':>10s} {'ratio':>6s} {'quartiles':>10s}  rival"


def publish(backend_name, quick, as_json):
    """Print the rows of a backend as they come, or all as JSON, then what machine they were measured on."""
    rows = bench_gpu(quick) if backend_name == "cuda" else bench(quick)
    if as_json:
        print(json.dumps(list(rows), indent=1))
        return
    print(HEADER)
    versions = {"numpy"}
    for row in rows:
        versions |= {"torch"} if "PyTorch" in row["rival"] and row["ratio"] else set()
        print(format_row(row), flush=True)
    where = machine() if backend_name == "cpu" else f"{backend('cuda').device_name()}, {machine()}"
    print(f"{where}; {', '.join(f'{name} {version(name)}' for name in sorted(versions))}; float32; {date.today()}")
