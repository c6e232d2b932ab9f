"""Proves the emulator that runs the GPU kernels in tests: right kernels pass, and every error put into one is seen."""
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cudacpu import cudacpu, nvrtc
from cudacpu import cupy as stand_in
from cudacpu.cases import CASES, NAMES, source, wrong
from cudacpu.mutants import MUTANTS

SEEDS = range(5)
CHECKED_SEEDS = (2, 3)                            # even and odd differ: the poison, and when an asynchronous copy lands
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cudacpu.missing()), reason=f"the emulator needs {cudacpu.missing()}")]
needs_nvrtc = pytest.mark.skipif(bool(nvrtc.missing()), reason=f"NVRTC needs {nvrtc.missing()}")


@functools.cache
def module(file, check=False, mutant=None):
    code = mutant.apply(source(file)) if mutant else source(file)
    return cudacpu.RawModule(code=code, name_expressions=NAMES[file], filename=f"{file}.cu", check=check)


def inline(code, name, **options):
    return cudacpu.RawModule(code=code, **options).get_function(name)


# ---- right kernels ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_results_equal_numpy(name, seed):
    case = CASES[name]
    for computed, expected in case.run(module(case.file), seed=seed):
        assert not wrong(computed, expected, case.rtol)


@pytest.mark.parametrize("seed", CHECKED_SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_the_checking_mode_reports_nothing(name, seed):
    case = CASES[name]
    for computed, expected in case.run(module(case.file, check=True), seed=seed):
        assert not wrong(computed, expected, case.rtol)


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_gives_the_same_bits(name):
    first, *others = ([computed.tobytes() for computed, _ in CASES[name].run(module(CASES[name].file), seed=seed)]
                      for seed in (0, 1, 7, 8))
    assert all(other == first for other in others)


def test_float_math_stays_float():
    code = """extern "C" __global__ void f(float* y) {
        y[0] = abs(-0.75f);  y[1] = exp(1.f);  y[2] = rsqrt(2.f);  y[3] = min(3u, 4);
        y[4] = sizeof(rsqrt(2.f)) + sizeof(exp(1.f)); }"""
    y = np.zeros(5, np.float32)
    inline(code, "f")((1,), (1,), (y,))
    np.testing.assert_allclose(y, [0.75, np.e, 0.5**0.5, 3, 8], rtol=1e-6)


def test_half_precision():
    if not (cudacpu.headers() / "nv" / "target").is_file():
        pytest.skip("half precision needs the wheel nvidia-cuda-cccl too")
    code = '#include <cuda_fp16.h>\nextern "C" __global__ void f(__half* y, __half a) { y[threadIdx.x] = y[threadIdx.x] * a; }'
    y = np.arange(32, dtype=np.float16)
    inline(code, "f")((1,), (32,), (y, np.float16(0.5)))
    assert np.array_equal(y, np.arange(32) / 2)


# ---- wrong kernels ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.check}-{m.case}-{m.error}".replace(" ", "_"))
def test_a_check_sees_the_error(mutant):
    case, checked = CASES[mutant.case], mutant.check == "checked"
    kernels, found, said = module(case.file, checked, mutant), [], []
    for seed in CHECKED_SEEDS if checked else SEEDS:
        try:
            if any(wrong(*pair, case.rtol) for pair in case.run(kernels, seed=seed)):
                found.append(seed)
        except cudacpu.KernelError as error:
            said.append(str(error))
    if found and not checked:
        said.append(f"wrong with seeds {' '.join(map(str, found))}")
    assert mutant.says in "\n".join(said)


def test_a_report_names_both_lines():
    mutant = next(m for m in MUTANTS if m.error == "no barrier before reuse")
    with pytest.raises(cudacpu.KernelError) as caught:
        CASES["attention"].run(module("attention", True, mutant), seed=2)
    rows = str(caught.value).splitlines()
    lines = source("attention").splitlines()
    writes, reads = (1 + [i for i, line in enumerate(lines) if text in line][-1]
                     for text in ("red[warp] = l", "m = fmaxf(m, red[i])"))
    assert rows[0] == "attn_combine<64>: seed 2"
    assert any(f"attention.cu:{writes} " in row and row.endswith(f"other attention.cu:{reads}") for row in rows[1:])


def test_lines_follow_line_directives():
    code = '\n\n#line 7 "elsewhere.cu"\nextern "C" __global__ void f(float* y) { y[threadIdx.x] = 0; }\n'
    said = r"f: out-of-bounds access at elsewhere.cu:7, block \(0,0,0\) .* argument 0 \(4,\)"
    with pytest.raises(cudacpu.KernelError, match=said):
        inline(code, "f")((1,), (32,), (np.zeros(4, np.float32),))


def test_a_view_keeps_its_alignment():
    code = 'extern "C" __global__ void f(float* y, const float* x) { y[0] = reinterpret_cast<const float4*>(x)->w; }'
    x, y = np.arange(9, dtype=np.float32), np.zeros(1, np.float32)
    inline(code, "f")((1,), (1,), (y, x[4 - x.ctypes.data // 4 % 4:][:4]))
    with pytest.raises(cudacpu.KernelError, match="misaligned access at kernel.cu:1.*element 0 of argument 1"):
        inline(code, "f")((1,), (1,), (y, x[5 - x.ctypes.data // 4 % 4:][:4]))


def test_a_write_just_before_an_array():
    code = 'extern "C" __global__ void f(float* y) { y[-1] = 0; }'
    with pytest.raises(cudacpu.KernelError, match=r"f: wrote beside argument 0 \(4,\)"):
        inline(code, "f")((1,), (1,), (np.zeros(4, np.float32),))


# ---- launches --------------------------------------------------------------------------------------------------------

def launch(*, args=None, grid=(1,), block=(32,), shared_mem=0, **changed):
    values = {"y": np.zeros(32, np.float32), "x": np.zeros(32, np.float32), "a": np.float32(1), "n": np.int32(32)} | changed
    module("misc").get_function("saxpy")(grid, block, tuple(values.values()) if args is None else args, shared_mem=shared_mem)


@pytest.mark.parametrize("change, sentence", [
    ({"args": ()}, "4 parameters, 0 arguments"),
    ({"n": 32}, "argument 3 is int; pass a NumPy array or scalar"),
    ({"a": 1.0}, "argument 2 is float; pass a NumPy array or scalar"),
    ({"a": np.float64(1)}, "argument 2 is float64 of float64, the kernel takes float32"),
    ({"n": np.int64(32)}, "argument 3 is int64 of int64, the kernel takes int32"),
    ({"x": np.zeros(32)}, "argument 1 is ndarray of float64, the kernel takes a pointer to float32"),
    ({"x": np.zeros(64, np.float32)[::2]}, "argument 1 is not C-contiguous"),
    ({"x": np.float32(1)}, "argument 1 is float32 of float32, the kernel takes a pointer to float32"),
    ({"a": np.zeros(1, np.float32)}, "argument 2 is ndarray of float32, the kernel takes float32"),
    ({"y": np.broadcast_to(np.float32(1), (1,))}, "argument 0 is written and read-only"),
])
def test_arguments_of_the_wrong_type_are_refused(change, sentence):
    launch()
    with pytest.raises(TypeError, match=f"saxpy: {sentence}"):
        launch(**change)


def test_overlapping_arguments_are_refused():
    a = np.zeros(40, np.float32)
    with pytest.raises(TypeError, match="arguments 0 and 1 overlap and one is written"):
        launch(y=a[:32], x=a[8:])


@pytest.mark.parametrize("change", [
    {"block": (1025,)}, {"block": (1, 1, 65)}, {"grid": (0,)}, {"grid": (1, 65536)}, {"shared_mem": 48 * 1024 + 1}])
def test_launches_of_the_wrong_size_are_refused(change):
    with pytest.raises(ValueError, match="saxpy: "):
        launch(**change)


def test_launch_bounds_and_larger_shared_memory():
    kernel = module("assembly").get_function("assemble<float,128>")
    x, a = np.zeros((1, 128), np.float32), np.zeros((60, 128), np.float32)
    args = (x.copy(), x, a, a.copy(), np.int32(1), np.int32(60))
    with pytest.raises(ValueError, match="at most 256 threads each"):
        kernel((1,), (288,), args)
    with pytest.raises(ValueError, match="61440 bytes of shared memory, max_dynamic_shared_size_bytes is 49152"):
        kernel((1,), (256,), args, shared_mem=2 * a.nbytes)
    kernel.max_dynamic_shared_size_bytes = 2 * a.nbytes
    kernel((1,), (256,), args, shared_mem=2 * a.nbytes)


def test_source_that_does_not_compile():
    with pytest.raises(cudacpu.KernelError, match=r"kernel.cu:1:\d+: error: .*nonsense"):
        cudacpu.RawModule(code='extern "C" __global__ void f() { nonsense; }')
    said = "no kernel is called g: the module has saxpy, last_block_sum, warp_tricks, histogram"
    with pytest.raises(cudacpu.KernelError, match=said):
        module("misc").get_function("g")


def test_two_processes_may_compile_the_same_kernel(tmp_path):
    script = "from cudacpu import cudacpu; cudacpu.RawModule(code='extern \"C\" __global__ void f() {}')"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    both = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    left = sorted(path.suffix for path in (tmp_path / "tinycea-cudacpu").iterdir())
    assert left == [".gch", ".so", ".so"]                                  # the header, the runtime and the kernel


# ---- NVRTC -----------------------------------------------------------------------------------------------------------

@needs_nvrtc
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("file", NAMES)
def test_nvrtc_compiles_without_spills(file, arch):
    kernels = nvrtc.compile(source(file), NAMES[file], arch)
    assert kernels.keys() == module(file).bounds.keys()
    for cost in kernels.values():
        assert cost["spills"] == cost["stack"] == 0 and 0 < cost["registers"] <= 64 and cost["shared"] <= 48 * 1024


@needs_nvrtc
def test_nvrtc_says_what_a_kernel_costs():
    assert nvrtc.compile(source("pipe"))["pipe_scale"]["shared"] == 2 * 1024 * 4
    crowded = """extern "C" __global__ void __launch_bounds__(1024) f(float* y, int n) { float a[200];
        for (int i = 0; i < 200; ++i) a[i] = y[i];
        for (int k = 0; k < n; ++k) for (int i = 0; i < 200; ++i) a[i] = a[i] * a[(i + 7) % 200];
        for (int i = 0; i < 200; ++i) y[i] = a[i]; }"""
    cost = nvrtc.compile(crowded)["f"]
    assert cost["spills"] + cost["stack"] > 0


@needs_nvrtc
def test_nvrtc_refuses_with_the_compilers_log():
    said = r'NVRTC refuses this source for sm_90:(.|\n)*error: identifier "INFINITY" is undefined'
    with pytest.raises(cudacpu.KernelError, match=said):
        nvrtc.compile('extern "C" __global__ void f(float* y) { y[0] = INFINITY; }')


# ---- the stand-in for CuPy -------------------------------------------------------------------------------------------

def test_the_stand_in_leaves_no_trace():
    watched = ("cupy", "tinycea.ops.cuda")
    before = [sys.modules.get(name) for name in watched]
    with stand_in.installed():
        import cupy
        assert cupy is stand_in
        sys.modules["tinycea.ops.cuda"] = stand_in             # as if a test had imported it
    assert [sys.modules.get(name) for name in watched] == before


def test_the_fixture_installs_the_stand_in(emulated_cupy):
    import cupy
    assert cupy is emulated_cupy is stand_in


def test_arrays_are_numpys_and_empty_ones_poisoned(emulated_cupy):
    cp = emulated_cupy
    host = np.arange(6.0).reshape(2, 3)
    device = cp.asarray(host)
    assert isinstance(device, cp.ndarray) and cp.ndarray is np.ndarray and not np.shares_memory(device, host)
    assert not np.shares_memory(cp.asnumpy(device), device)
    assert np.isnan(cp.empty((2, 3), np.float32)).all() and (cp.empty(2, np.int32) == 2**31 - 1).all()
    assert np.isnan(cp.empty_like(device)).all() and cp.empty_like(device, np.float32).dtype == np.float32
    assert cp.zeros is np.zeros and cp.einsum is np.einsum
    with pytest.raises(AttributeError, match="no_such_name"):
        cp.no_such_name


def test_the_device(emulated_cupy):
    cuda = emulated_cupy.cuda
    cuda.get_current_stream().synchronize()
    cuda.Device().synchronize()
    assert cuda.runtime.getDeviceCount() == 1 and cuda.Device().id == 0
    assert cuda.Device(0).compute_capability == "90" and cuda.Device().attributes["WarpSize"] == 32
    with pytest.raises(cuda.runtime.CUDARuntimeError):
        cuda.Device(1)


def test_raw_modules_follow_the_schedule(emulated_cupy):
    cp = emulated_cupy
    kernels = cp.RawModule(code=source("misc"), options=("-std=c++17",), backend="nvrtc")
    histogram = kernels.get_function("histogram")
    x, expected = np.arange(300).astype(np.uint8), np.bincount(np.arange(300) % 256, minlength=256)
    for seed, check in ((0, False), (3, True)):
        with cp.schedule(seed=seed, check=check):
            assert (cp.seed, cp.check) == (seed, check)
            out = cp.zeros(256, cp.int32)
            histogram((2,), (256,), (out, cp.asarray(x), np.int32(300)))
            assert np.array_equal(out, expected)
    assert (cp.seed, cp.check) == (0, False)
    with pytest.raises(ValueError, match="50000 bytes of shared memory"):
        histogram((2,), (256,), (out, x, np.int32(300)), shared_mem=50000)
    histogram.max_dynamic_shared_size_bytes = 50000
    histogram((2,), (256,), (out, x, np.int32(300)), shared_mem=50000)
    racy = cp.RawModule(code=source("misc").replace("atomicAdd(&h[x[i]], 1)", "h[x[i]] += 1")).get_function("histogram")
    with cp.schedule(check=True), pytest.raises(cudacpu.KernelError, match="write/write race in static shared memory"):
        racy((2,), (256,), (out, np.zeros(300, np.uint8), np.int32(300)))
