"""Proves the GPU backend: host code and kernels against reference, in the emulator and, marked `gpu`, on a GPU where one is."""
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cudacpu import cudacpu, cupy, nvrtc

from tinycea import cases, cli, gradcheck, training
from tinycea.ablations import CEAConfig
from tinycea.lab import bench
from tinycea.nafnet import NAFNetConfig, init
from tinycea.ops import backend, cpu, reference
from tinycea.optim import decay_mask
from tinycea.runtime import InputError

TOLERANCE = {"float16": 2**-11, "float32": 2e-5, "float64": 1e-12}


@pytest.fixture(scope="module")
def emulated():
    """ops/cuda.py on the stand-in for CuPy, which nobody else sees: a GPU's own tests must find the real one, or skip."""
    if missing := cudacpu.missing():
        pytest.skip(f"the emulator needs {missing}")
    with cupy.installed():
        return importlib.import_module("tinycea.ops.cuda")


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def ops(request):
    """ops/cuda.py, on either."""
    if request.param == "emulator":
        return request.getfixturevalue("emulated")
    try:
        return backend("cuda")
    except InputError as error:
        pytest.skip(str(error))


def n(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


def parts(C, N, R):
    return {"x": n(2, N, C), "xhat": n(2, N, C), "A": n(2, R, C), "U": n(2, R, C)}


# door -> sizes that are odd, past a warp's 32 lanes, or single, and more tokens than a grid takes at once
DOORS = {
    "layernorm": lambda C, N: ({"x": n(2, N, C), "weight": n(C), "bias": n(C)}, ()),
    "gated_depthwise3x3": lambda C, N: ({"x": n(2, 3, N, 2 * C), "weight": n(2 * C, 1, 3, 3), "bias": n(2 * C)}, ()),
    "scale_channels": lambda C, N: ({"x": n(2, 3, N, C), "scale": n(2, 1, 1, C)}, ()),
    "summarize": lambda C, N: ({"xhat": n(2, N, C), "W_K": n(C, 6), "W_V": n(C, 6), "Q": n(5, 6)}, (2,)),
    "assembly": lambda C, N: (parts(C, N, 5), ()),
}
SIZES = [(1, 1), (5, 31), (33, 65), (65, 1700)]


def run(room, name, arrays, settings):
    """Output and every gradient, as NumPy arrays."""
    y, cache = getattr(room, name)(*map(room.to_device, arrays), *settings)
    dy = np.random.default_rng(0).normal(size=y.shape).astype(y.dtype)
    gradients = getattr(room, name + "_backward")(room.to_device(dy), cache)
    return [room.to_host(a) for a in (y, *(gradients if isinstance(gradients, tuple) else [gradients]))]


def compare(ops, name, C, N, dtype):
    return compare_on(ops, name, *DOORS[name](C, N), dtype)


def compare_on(ops, name, inputs, settings, dtype):
    arrays = [a.astype(dtype) for a in inputs.values()]
    expected = run(reference, name, [a.astype(float) for a in arrays], settings)
    got = run(ops, name, arrays, settings)
    for what, a, b in zip(["y", *inputs], got, expected):
        assert a.shape == b.shape and a.dtype == dtype
        assert np.abs(a - b).max() <= TOLERANCE[dtype] * max(1, np.abs(b).max()), what
    return got


@pytest.mark.parametrize("C, N, dtype", [
    pytest.param(*size, dtype, marks=[pytest.mark.slow] * ((*size, dtype) != (5, 31, "float32")))
    for size in SIZES for dtype in ("float32", "float64")])
@pytest.mark.parametrize("name", DOORS)
def test_it_is_reference_under_any_schedule(ops, name, C, N, dtype):
    results = []
    for seed in (0, 1, 2) if N < 100 else (3,):
        with cupy.schedule(seed=seed):
            results.append(compare(ops, name, C, N, dtype))
    for other in results[1:]:                                                   # the same bytes, whatever runs first
        assert all(a.tobytes() == b.tobytes() for a, b in zip(results[0], other))


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_no_race_no_uninitialized_read_no_stray_access(emulated, name):
    for seed in (0, 1):
        with cupy.schedule(seed=seed, check=True):
            compare(emulated, name, 33, 65, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("C, R", [(16, 32), (48, 48), (64, 64)])
def test_the_assembly_on_tensor_cores(ops, C, R):
    for N in (1, 31, 33, 900):
        results = []
        for seed in (0, 1):
            with cupy.schedule(seed=seed):
                results.append(compare_on(ops, "assembly", parts(C, N, R), (), "float32"))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(*results))


@pytest.mark.slow
def test_the_assembly_on_tensor_cores_checked(emulated, monkeypatch):
    launched, launch = [], emulated._launch
    monkeypatch.setattr(emulated, "_launch", lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest)))
    for seed in (0, 1):
        with cupy.schedule(seed=seed, check=True):
            compare_on(emulated, "assembly", parts(48, 65, 32), (), "float32")
    assert launched.count("assembly_tf32") == launched.count("assembly_tf32.assembly_tf32_backward") == 2


def compare_half(ops, C, N):
    """The assembly with its tokens in float16, held against reference in float64 on the same, rounded numbers."""
    arrays = [a.astype(dtype) for a, dtype in zip(parts(C, N, 5).values(), "eeff")]
    dy = n(2, N, C)[::-1].astype("e")
    exact = [a.astype(float) for a in arrays]
    expected, got = ([room.to_host(a) for a in (y, *room.assembly_backward(room.to_device(upstream), cache))]
                     for room, factors, upstream in ((reference, exact, dy.astype(float)), (ops, arrays, dy))
                     for y, cache in [room.assembly(*map(room.to_device, factors))])
    for what, a, b in zip(("y", "x", "xhat", "A", "U"), got, expected):
        tolerance = TOLERANCE["float32" if what in "AU" else "float16"]        # one rounding to 11 bits, where it is stored
        assert a.dtype == ("f" if what in "AU" else "e") and np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max()), what
    return got


@pytest.mark.slow
@pytest.mark.parametrize("C, N", SIZES)
def test_the_assembly_on_tokens_stored_in_half_precision(ops, C, N):
    results = []
    for seed, check in ((0, False), (1, False)) + ((2, True),) * (N < 100):
        with cupy.schedule(seed=seed, check=check):
            results.append(compare_half(ops, C, N))
    for other in results[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(results[0], other))


def test_half_precision_is_all_tokens_or_none(emulated):
    x, xhat, A, U = parts(5, 31, 3).values()
    for dtypes in ("efff", "feff", "eeef", "eefe", "eedd"):
        with pytest.raises(InputError, match="expected"):
            emulated.assembly(*(a.astype(dtype) for a, dtype in zip((x, xhat, A, U), dtypes)))


TOKENS_OF_A_WARP = '''; t += W::SHARES) {
            #pragma unroll
            for (int j = 0; j < W::CHUNKS; ++j) {
                const int c = W::channel(j);
                if (c >= C) continue;
                const size_t i = image + (size_t)(n0 + t) * C + c;
                T v'''
MUTANTS = [                                   # file, what is written there, what is broken, the door that must notice
    ("common.cuh", "s[EACH] = {};\n    for (int c0 = 0; c0 < C; c0 += K) {\n        __syncthreads();",
     "s[EACH] = {};\n    for (int c0 = 0; c0 < C; c0 += K) {", "assembly"),
    ("common.cuh", "T(0);\n        }\n        __syncthreads();\n        #pragma unroll 8",
     "T(0);\n        }\n        #pragma unroll 8", "assembly"),
    ("common.cuh", "= scale * s[k];\n    __syncthreads();", "= scale * s[k];", "assembly"),
    ("common.cuh", "token < n && c < C ?", "token <= n && c < C ?", "assembly"),
    ("common.cuh", "SHARES = ALL / ACROSS", "SHARES = ALL", "assembly"),
    ("common.cuh", "factor[r * C + Warps<C>::channel(j)]", "factor[Warps<C>::channel(j) * R + r]", "assembly"),
    ("common.cuh", "T(rows[(size_t)token * C + c])", "T(rows[(size_t)token * C + c / 2 * 2])", "half"),
    ("assembly.cu", "dxhat[i] = H(v);", "dxhat[i] = xi;", "half"),
    ("assembly.cu", "da[j][r] += ds[t][r] * xi;", "da[j][r] += s[t][r] * xi;", "assembly"),
    ("assembly.cu", "n0 + t < n" + TOKENS_OF_A_WARP, "n0 + t <= n" + TOKENS_OF_A_WARP, "assembly"),
    ("assembly_tf32.cu", "wmma::mma_sync(sum, a.small, b.big, sum);", "", "tensor cores"),
    ("layernorm.cu", "dbias[j] : dweight[j];\n        __syncthreads();", "dbias[j] : dweight[j];", "layernorm"),
    ("layernorm.cu", "sum - xhat[j] * product", "sum", "layernorm"),
    ("layernorm.cu", "if (lane + 32 * j < C) squares", "squares", "layernorm"),
    ("column_sum.cu", "= total;\n    __syncthreads();", "= total;", "layernorm"),
    ("column_sum.cu", "i = 1; i < 8", "i = 1; i < 7", "layernorm"),
    ("probe.cu", "highest[warp][m] = most;\n        }\n        __syncthreads();",
     "highest[warp][m] = most;\n        }", "summarize"),
    ("probe.cu", "peak[k] = now;\n        }\n        __syncthreads();", "peak[k] = now;\n        }", "summarize"),
    ("probe.cu", "for (int m = 0; m < M; ++m) means[j][m] *= shrink[m];", "", "summarize"),
    ("probe.cu", "lane + 32 * k] = mass[k];", "lane + 32 * k] = mass[k] + 1;", "summarize"),
    ("probe.cu", "(dl[t][m] - center[query + m]);\n        }\n        __syncthreads();",
     "(dl[t][m] - center[query + m]);\n        }", "summarize"),
    ("depthwise.cu", "h + i < H", "h + i <= H", "gated_depthwise3x3"),
    ("depthwise.cu", "[threadIdx.x] = sums[k / 10][k % 10];\n        __syncthreads();",
     "[threadIdx.x] = sums[k / 10][k % 10];", "gated_depthwise3x3"),
    ("scale.cu", "= sum;\n    __syncthreads();", "= sum;", "scale_channels"),
    ("scale.cu", "blockIdx.z * C + c];\n    for", "blockIdx.x * C + c];\n    for", "scale_channels"),
]


@pytest.mark.slow
@pytest.mark.parametrize("file, right, wrong, name", MUTANTS, ids=range(len(MUTANTS)))
def test_a_broken_kernel_is_seen(emulated, monkeypatch, file, right, wrong, name):
    whole = emulated.source

    def broken(asked):
        common, own = whole(asked).split(f'#line 1 "{asked}.cu"')
        part = common if file == "common.cuh" else own if file == f"{asked}.cu" else ""
        return whole(asked).replace(part, part.replace(right, wrong)) if part else whole(asked)
    assert right in whole("assembly" if file == "common.cuh" else file[:-3])
    monkeypatch.setattr(emulated, "source", broken)
    emulated._kernel.cache_clear()
    try:
        with pytest.raises((AssertionError, cudacpu.KernelError)):
            for seed, check in ((0, False), (1, False), (2, True), (3, True)):
                with cupy.schedule(seed=seed, check=check):
                    if name == "tensor cores":
                        compare_on(emulated, "assembly", parts(16, 65, 32), (), "float32")
                        continue
                    if name == "half":
                        compare_half(emulated, 33, 65)
                        continue
                    compare(emulated, name, 33, 65, "float32")
                    compare(emulated, name, 5, 1700, "float32")         # more than one tile for some blocks
    finally:
        emulated._kernel.cache_clear()


def instances(emulated, C, R, heads=4):
    """Every kernel as a network of C channels and R components launches it: file -> names, in both types."""
    result = {}
    for T, size in (("float", 4), ("double", 8)):
        tile, wide = (emulated._tile(M, np.dtype(f"f{size}")) for M in (R, heads * R))
        for file, names in {"layernorm": (f"layernorm<{T}, {C}>", f"layernorm_backward<{T}, {C}>"),
                            "column_sum": (f"column_sum<{T}>",),
                            "depthwise": (f"depthwise<{T}>", f"gated_depthwise<{T}>", f"gated_depthwise_backward<{T}>"),
                            "scale": (f"scale<{T}>", f"scale_backward<{T}>"), "adamw": (f"adamw<{T}>",),
                            "assembly": (f"assembly<{T}, {C}, {R}, {tile}>", f"assembly_backward<{T}, {C}, {R}, {tile}>"),
                            "probe": (f"probe<{T}, {C}, {heads * R}, {wide}>", f"probe_combine<{T}, {C}>",
                                      f"probe_backward<{T}, {C}, {heads * R}, {wide}>")}.items():
            result.setdefault(file, []).extend(names)
    tile = emulated._tile(R, np.dtype("f4"))
    result["assembly"] += [f"{name}<float, {C}, {R}, {tile}, __half>" for name in ("assembly", "assembly_backward")]
    c = 16 * -(-C // 16)                                  # tensor cores: float alone, multiples of 16, R of 32 at least
    result["assembly_tf32"] = [f"assembly_tf32<float, {c}, 32, 64>", f"assembly_tf32_backward<float, {c}, 32, 32>"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("file", sorted(path.stem for path in (Path(reference.__file__).parent / "kernels").glob("*.cu")))
def test_every_kernel_compiles_for_gpus_without_spills(emulated, arch, file):
    if missing := nvrtc.missing():
        pytest.skip(f"NVRTC needs {missing}")
    names = {name: None for C in (24, 48, 128) for name in instances(emulated, C, 8)[file]}      # some do not depend on C
    written = re.findall(r"__launch_bounds__\([^)]*\) (\w+)\(", emulated.source(file))
    assert set(written) == {name.split("<")[0] for name in names}
    costs = nvrtc.compile("#include <cuda_fp16.h>\n" + emulated.source(file), names, arch)
    assert set(costs) == set(names)
    for name, cost in costs.items():
        assert cost["spills"] == cost["stack"] == 0, (name, cost)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adamw_is_optims(ops, dtype):
    w, g, m, v, lr, decay = abs(n(6, 5000)).astype(dtype)
    mine, theirs = [ops.to_device(a) for a in (w, g, m, v)], [w.copy(), g, m.copy(), v.copy()]
    for step in (1, 2, 3):
        ops.adamw(*mine, step, *map(ops.to_device, (lr, decay)))
        reference.adamw(*theirs, step, lr, decay)
    for a, b in zip(map(ops.to_host, mine), theirs):
        assert np.abs(a - b).max() <= TOLERANCE[dtype] * np.abs(b).max()


@pytest.mark.slow
def test_a_training_step_of_the_whole_network_is_the_cpus(ops):
    config = NAFNetConfig(width=6, middle=1, adapter=CEAConfig(rank=3, heads=2))
    rng = np.random.default_rng(0)
    start = init(config, rng)
    start.flat[:] += rng.normal(0, 0.05, start.flat.size)                       # beta, gamma and W_U are zero at initialization
    degraded, clean = rng.random((2, 2, 13, 10, 3), np.float32)
    after = []
    for room in (ops, cpu):
        p = start.over(room.to_device(start.flat.copy()))
        g, m, v = p.zeros_like(), np.zeros_like(p.flat), np.zeros_like(p.flat)
        loss = training.gradient(degraded, clean, p, config, room, g, care=4)
        room.adamw(p.flat, g.flat, m, v, 1, 1e-2, 1e-4 * decay_mask(p))
        after.append((loss, room.to_host(g.flat), room.to_host(p.flat)))
    (loss, g, p), (loss_cpu, g_cpu, p_cpu) = after
    assert abs(loss - loss_cpu) < 1e-4 * abs(loss_cpu) and np.abs(g - g_cpu).max() < 1e-4 * np.abs(g_cpu).max()
    moved = np.abs(g_cpu) > 1e-3 * np.abs(g_cpu).max()                       # Adam's first step is a sign: not where it is noise
    assert moved.mean() > 0.5 and np.abs(p - p_cpu)[moved].max() < 1e-4 * np.abs(p_cpu).max()


@pytest.mark.slow
def test_gradients_in_float64(ops):
    names = {"layernorm", "groupnorm", "norm_conv1x1", "gated_depthwise3x3", "scale_channels", "summarize",
             "assembly (tokens first)", "cea (signed, token, static none)",
             "cea (signed, token, static none, token norm, of Xhat)"}
    for name, tolerance, forward, backward, inputs in cases.cases(ops):
        if name in names:
            names.remove(name)
            pair = cases.hosted(forward, backward, ops)
            assert all(row.passed for row in gradcheck.check_gradients(*pair, inputs, tolerance=tolerance)), name
    assert not names


@pytest.mark.slow
def test_what_does_not_fit_goes_to_reference(ops):
    big = parts(5, 31, 70).values()
    for got, expected in zip(run(ops, "assembly", big, ()), run(reference, "assembly", big, ())):
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    probe = [n(2, 9, 5), n(5, 6), n(5, 6), n(50, 6)]
    for got, expected in zip(run(ops, "summarize", probe, (2,)), run(reference, "summarize", probe, (2,))):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.slow
def test_attention_is_references(ops):
    inputs, settings = DOORS["summarize"](5, 31)
    P = [room.to_host(room.attention(room.summarize(*map(room.to_device, inputs.values()), *settings)[1]))
         for room in (ops, reference)]
    np.testing.assert_allclose(*P, rtol=1e-12)


@pytest.mark.parametrize("name", [n for n in DOORS if n != "summarize"])         # its products refuse such shapes themselves
def test_a_wrong_shape_is_refused_before_a_kernel_reads_past_the_end(emulated, name):
    inputs, settings = DOORS[name](5, 31)
    y, cache = getattr(emulated, name)(*inputs.values(), *settings)
    with pytest.raises(InputError, match="is expected"):
        getattr(emulated, name + "_backward")(y[..., :-1], cache)
    for wrong in list(inputs)[1:]:
        with pytest.raises(InputError, match="is expected"):
            getattr(emulated, name)(*(inputs | {wrong: inputs[wrong][:-1]}).values(), *settings)


@pytest.mark.parametrize("change, sentence", [
    (lambda a: a | {"weight": a["weight"].astype(np.float32)}, "float32"),
    (lambda a: a | {"x": a["x"].astype(np.float16)}, "not float16"),
    (lambda a: a | {"bias": [0.0] * 5}, "expected an array on the GPU")])
def test_launches_refuse_what_cupy_accepts(emulated, change, sentence):
    inputs = change(DOORS["layernorm"](5, 31)[0])
    with pytest.raises(InputError, match=sentence):
        emulated.layernorm(*inputs.values())


def test_without_cupy_or_a_gpu_it_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)                              # import cupy: ImportError
    assert cli.main(["gradcheck", "--backend", "cuda"]) == 2
    assert "pip install" in capsys.readouterr().err
    for count in (lambda: 0, no_driver):
        with cupy.installed():
            monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", count)
            with pytest.raises(InputError, match="NVIDIA GPU"):
                backend("cuda")


def no_driver():
    raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorInsufficientDriver")


@pytest.mark.slow
def test_tinycea_does_not_import_cupy():
    code = "import sys, tinycea.cli, tinycea.training, tinycea.cases; assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_run_on_the_gpu_trains_saves_and_resumes(emulated, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "network", lambda name: NAFNetConfig(width=6, middle=1, adapter=CEAConfig(rank=3, heads=2)))
    monkeypatch.setattr(training, "test_set", lambda *which: [("", "", *[np.zeros((8, 8, 3), np.float32)] * 2)])
    monkeypatch.setattr(training, "finish", lambda recipe, p, *rest: p)
    recipe = {"steps": 2, "scenes": 1, "batch": 2, "patch": 12}
    monkeypatch.setattr(training, "backend", {"cuda": emulated, "cpu": cpu}.get)
    p = training.train(tmp_path / "run", backend="cuda", **recipe)
    on_cpu = training.train(tmp_path / "cpu", threads=1, **recipe)               # another process does not know this network
    assert np.abs(p.flat - on_cpu.flat).max() < 1e-3 and (tmp_path / "run" / "state.safetensors").exists()
    again = training.train(tmp_path / "run", resume=True)       # nothing left to do: the saved state, on the device again
    assert np.array_equal(again.flat, p.flat)


@pytest.mark.slow
@pytest.mark.parametrize("kind, size", [("CEA forward", (64, 12, 3)), ("CEA forward+backward", (64, 12, 3)),
                                        ("training step", (2, 10))])
def test_the_benchs_jobs_compute_the_same_on_the_gpu(ops, kind, size, monkeypatch):
    monkeypatch.setattr(training, "backend", {"cuda": ops, "cpu": cpu}.get)
    for a, b in zip(bench.ours(kind, size, ops)(), bench.ours(kind, size)(), strict=True):
        assert np.abs(ops.to_host(a) - b).max() <= bench.TOLERANCE * np.abs(b).max()


@pytest.mark.slow
def test_the_gpu_bench_has_a_row_for_every_op(emulated, monkeypatch):
    monkeypatch.setattr(bench, "KERNELS", (2048, 16, 3))
    monkeypatch.setattr(bench, "GPU_JOBS", [])
    monkeypatch.setattr(bench, "TURN", 0)
    monkeypatch.setattr(bench, "backend", lambda name: emulated)
    rows = list(bench.bench_gpu(quick=True))
    assert len(rows) == 11 and all(row["ours_gb"] > 0 and "copy on the device" in bench.format_row(row) for row in rows)


def test_the_gpu_bench_on_the_command_line(emulated, monkeypatch, capsys):
    row = bench.row("layernorm", [2.0], [3.0], "copy on the device", "gb")
    monkeypatch.setattr(bench, "bench_gpu", lambda quick: iter([row]))
    with cupy.installed():
        assert cli.main(["bench", "--backend", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert "2 GB/s" in printed and "0.67" in printed and "emulated" in printed
