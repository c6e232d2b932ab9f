# %% [markdown]
# # 9. One kernel: the assembly on a GPU, from one thread per number to the fused kernel
#
# **Question.** The assembly, $S = X A^\top / \sqrt C$ and $Y = X + S U / \sqrt R$, is two small matrix products. How does one
# write it in CUDA, and what makes one version faster than another?
#
# **You need** the two equations ([notebook 1](01_token_assembly.ipynb)) and some C. No GPU: where there is none, an *emulator*
# runs the same CUDA source on the CPU and checks it more strictly than a GPU would. **Minutes:** 20.
#
# **The answer**, in the picture below: count what a kernel computes and what it moves. Step by step the same $Y$ takes a
# sixteenth of the arithmetic and a 250th of the traffic, until nothing moves but what must. What is left waits for the memory.
#
# The steps, each a small change of the one before: one thread per number (1); $S$ kept (2); two kernels fused into one (3);
# tokens loaded once (4); factors loaded once (5). A sixth has a mistake in it that no test of values is sure to see.

# %%
import re
import sys
from contextlib import nullcontext

import matplotlib.pyplot as plt
import numpy as np

from tinycea.ops import reference as ops

C, R, TOK = 32, 8, 4                                        # channels, rank components, tokens of a tile
PEAK, BANDWIDTH, BLOCKS = 67e12, 3.35e12, 4 * 132           # NVIDIA H100 SXM, section 1; four blocks a multiprocessor

# FLOPs, numbers that threads ask the memory for, and numbers that must move at least; of N tokens
WORK = {
    "1 one thread per number": lambda N: (N * C * R * (2 * C + 2), N * C * (R * (2 * C + 1) + 2), 2 * N * C + 2 * R * C),
    "2 S kept": lambda N: (4 * N * R * C, N * R * (4 * C + 1) + 2 * N * C, 3 * N * C + 2 * N * R + 2 * R * C),
    "3 fused": lambda N: (4 * N * R * C, N * R * 3 * C + 2 * N * C, 2 * N * C + 2 * R * C),
    "4 tokens once": lambda N: (4 * N * R * C, N * R * 2 * C + 2 * N * C, 2 * N * C + 2 * R * C),
    "5 factors once": lambda N: (4 * N * R * C, 2 * N * C + BLOCKS * 5 * R * C, 2 * N * C + 2 * R * C),
}

def times(name, N=512 * 512):
    """Seconds that an H100 needs at the least, if caches catch all that was asked before, or nothing."""
    flops, asked, least = WORK[name](N)
    return [max(flops / PEAK, 4 * numbers / BANDWIDTH) for numbers in (least, asked)]


figure, (bars, roof) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 2))
intensity = np.geomspace(0.5, 200, 300)
roof.loglog(intensity, np.minimum(PEAK, BANDWIDTH * intensity) / 1e12, "k-")
for place, (name, work) in enumerate(WORK.items()):
    low, high = times(name)
    bars.barh(place, 1e6 * (high - low), left=1e6 * low, height=0.5, color="C0")
    flops, asked, least = work(512 * 512)
    roof.plot(flops / (4 * least), 4e-12 * 512 * 512 * R * C / low, "o", color="C1")
    if name[0] in "125":
        roof.annotate("3, 4, 5" if name[0] == "5" else name[0], (flops / (4 * least), 4e-12 * 512 * 512 * R * C / low),
                      (4, -11), textcoords="offset points")
bars.axvline(1e6 * times("5 factors once")[0], color="C1", ls="--")
bars.set(xscale="log", xlim=(10, 1e4), yticks=range(5), yticklabels=WORK, title="In the end nothing moves but X in and Y out",
         xlabel="μs on an H100, if caches catch all (left end) or nothing (right)")
bars.invert_yaxis()
roof.set(xlabel="FLOPs per byte that must move", ylabel="TFLOP/s of use, at most", title="That waits for memory",
         yticks=(2, 5, 10, 20, 50), yticklabels=(2, 5, 10, 20, 50))
roof.minorticks_off()
plt.show()

# %% [markdown]
# ## 1. A roof over every kernel
#
# A kernel that computes $F$ FLOPs (an addition or a multiplication each) and moves $b$ bytes takes, on a GPU with a peak of $p$
# FLOP/s and a bandwidth of $w$ bytes/s, at least
#
# $$t \ge \max\Big(\frac{F}{p}, \frac{b}{w}\Big), \qquad\text{so}\qquad \frac{F}{t} \le \min\big(p,\; w\, I\big),
# \qquad I = \frac{F}{b} .$$
#
# $I$ is the *arithmetic intensity*, the bound is the *roofline* (Williams et al. 2009). NVIDIA's data sheet of the H100 gives for
# the SXM card 67 TFLOP/s in float32 without tensor cores, and 3.35 TB/s. The two roofs meet at 20 FLOPs per byte.
#
# The assembly has $4NRC$ FLOPs: two products of $NRC$ multiply-adds. At the least $X$ comes in and $Y$ goes out, $8NC$ bytes in
# float32; $A$ and $U$ are small. So
#
# $$I \le \frac{4NRC}{8NC} = \frac R2 .$$
#
# Below $R = 40$ an H100 waits for its memory. No cleverness with the arithmetic helps; moving nothing twice does.

# %%
ridge = PEAK / BANDWIDTH
print(f"the roofs meet at {ridge:.0f} FLOPs per byte; the assembly with R = {R} has at most {R / 2:.0f}")
for name, work in WORK.items():
    flops, asked, least = work(512 * 512)
    low, high = (1e6 * seconds for seconds in times(name))
    print(f"{name:24s} {flops / 1e9:4.2f} GFLOP, asked {4e-6 * asked:7.0f} MB, at least {4e-6 * least:4.0f} MB: "
          f"{low:3.0f} to {high:4.0f} μs at best")
(one, asked_one, _), (five, asked_five, least) = (WORK[name](512 * 512) for name in (list(WORK)[0], list(WORK)[-1]))
assert round(one / five) == 16 and 245 < asked_one / asked_five < 255           # as the first lines of the notebook say
assert ridge == 20 and np.isclose(five / (4 * least), R / 2, rtol=1e-3)

# %% [markdown]
# *Asked* counts every access of every thread. Caches answer most that were asked before, so the memory moves something between
# *at least* and *asked*. A cache promises nothing, though; the steps below lower the second number until it meets the first.
#
# Kernel 1 stands far right under the roof, at a high intensity, and low: it computes $S$ again for every channel, and only the
# first time is of use. Intensity is no merit by itself.
#
# ## 2. Where it runs, and what is watched
#
# Here the device is found: a GPU with CuPy, else the emulator in [`tests/cudacpu`](../tests/cudacpu/README.md), which stands in
# for CuPy, else none. `step` compiles a kernel, launches it, and holds three things against each other:
#
# - **values**: $Y$ against [`assembly`](../tinycea/ops/reference.py) in float64;
# - **counts**: the formulas above against what the threads did. For that, `counted` adds to every access of an array with a
#   capital letter, and to every multiply-add into `s` or `sum`, a tally;
# - **races**: in the emulator, each launch runs twice, with another order of blocks, warps and lanes, and with every access to
#   shared memory watched.

# %%
N = 205                                                     # tokens: 51 tiles and a piece of one
try:
    import cupy as cp
    cp.cuda.runtime.getDeviceCount()
    device, N = cp.cuda.runtime.getDeviceProperties(0)["name"].decode(), 512 * 512
except (ImportError, RuntimeError):
    cp, device = None, None
if cp is None:
    sys.path.append("../tests")
    try:
        from cudacpu import cudacpu
        from cudacpu import cupy as emulator
        lacking = cudacpu.missing()
    except ImportError:
        lacking = "tests/cudacpu, which is in the repository"
    if not lacking:
        cp, device = emulator, "the emulator"
print(f"the kernels run on {device}" if cp else
      f"The kernels below do not run here, neither on a GPU nor in the emulator, which lacks {lacking}; read them as they stand.")

# %%
SIZES = f"""constexpr int N = {N}, C = {C}, R = {R}, TOK = {TOK};
constexpr float ROOT_C = {np.sqrt(C):.9f}f, ROOT_R = {np.sqrt(R):.9f}f;
"""
TALLY = """#define ASKED (atomicAdd(tally, 1ull), 0)
#define SPENT (atomicAdd(tally + 1, 2ull), 0.f)
"""
rng = np.random.default_rng(0)
X, A, U = (rng.normal(size=shape).astype(np.float32) for shape in ((N, C), (R, C), (R, C)))
exact = ops.assembly(*(a.astype(np.float64)[None] for a in (X, X, A, U)))[0][0]
if cp:
    BLOCKS = 3 if device == "the emulator" else 4 * cp.cuda.Device().attributes["MultiProcessorCount"]


def counted(code):
    """The same kernels, which count the numbers that they ask for, and their FLOPs."""
    code = re.sub(r"(__global__ [^{]*)\)", r"\1, unsigned long long* tally)", code)
    code = re.sub(r"\b([XAUSY])\[", r"\1[ASKED + ", code)
    return TALLY + re.sub(r"\b(s|sum) \+= ", r"\1 += SPENT + ", code)


def launch(code, launches, tally=()):
    """Run kernels (name, blocks, threads, names of arrays) one after the other; returns Y."""
    module = cp.RawModule(code=SIZES + code)
    arrays = {name: cp.asarray(a) for name, a in (("X", X), ("A", A), ("U", U))}
    arrays |= {"Y": cp.empty((N, C), "float32"), "S": cp.empty((N, R), "float32")}

    def run():
        for name, blocks, threads, names in launches:
            module.get_function(name)((blocks,), (threads,), (*(arrays[a] for a in names), *tally))
    run()
    if device != "the emulator" and not len(tally):
        from cupyx.profiler import benchmark
        print(f"    {1e6 * np.median(benchmark(run, n_repeat=100, n_warmup=10).gpu_times):.1f} μs on {device}")
    return cp.asnumpy(arrays["Y"])


def step(title, code, *launches):
    """Values, counts and races of one step; says nothing where there is no device."""
    if cp is None:
        return
    if device != "the emulator":
        launch(code, launches)                              # without tallies: the time
    for seed in (0, 1):
        tally = cp.zeros(2, "uint64")
        with cp.schedule(seed=seed, check=True) if device == "the emulator" else nullcontext():
            Y = launch(counted(code), launches, (tally,))
        error = np.abs(Y - exact).max() / np.abs(exact).max()
        flops, asked, _ = WORK[title](N)
        assert error < 1e-6 and tuple(map(int, tally)) == (asked, flops), (error, tally, asked, flops)
    print(f"{title}: as the reference to {error:.0e}; asked {asked} numbers, {flops} FLOPs, as counted"
          + "; no race" * (device == "the emulator"))


# %% [markdown]
# ## 3. Kernel 1: one thread per number
#
# A *kernel* is a function that very many *threads* run at once; each learns from its indices which piece is its own. Threads
# stand in *blocks*, here of 128. The simplest kernel gives every number $y_{nc}$ a thread of its own, which computes whatever it
# needs:
#
# $$y_{nc} = x_{nc} + \frac{1}{\sqrt R} \sum_r \Big( \frac{1}{\sqrt C} \sum_k x_{nk} a_{rk} \Big) u_{rc} .$$

# %%
ONE = """
extern "C" __global__ void assembly(float* Y, const float* X, const float* A, const float* U)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= N) return;                                     // the last block has threads to spare
    float sum = 0;
    for (int r = 0; r < R; ++r) {
        float s = 0;
        for (int k = 0; k < C; ++k) s += X[n * C + k] * A[r * C + k];
        sum += s / ROOT_C * U[r * C + c];
    }
    Y[i] = X[i] + sum / ROOT_R;
}
"""
step("1 one thread per number", ONE, ("assembly", -(-N * C // 128), 128, "YXAU"))

# %% [markdown]
# Neighboring threads take neighboring channels, so a *warp*, 32 threads in step, writes 128 bytes in a row: one transaction. That
# is right already, and stays. But the $C$ threads of a token all compute the same $s_{nr}$:
#
# $$F = NC \cdot R\, (2C + 2) \quad\text{instead of}\quad 4NRC .$$
#
# ## 4. Kernel 2: keep $S$
#
# A kernel for each equation. The first gives every $s_{nr}$ a thread, the second every $y_{nc}$. Between them $S$ lies in the
# GPU's memory.

# %%
TWO = """
extern "C" __global__ void affinity(float* S, const float* X, const float* A)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i / R, r = i % R;
    if (n >= N) return;
    float s = 0;
    for (int k = 0; k < C; ++k) s += X[n * C + k] * A[r * C + k];
    S[i] = s / ROOT_C;
}

extern "C" __global__ void combine(float* Y, const float* X, const float* S, const float* U)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= N) return;
    float sum = 0;
    for (int r = 0; r < R; ++r) sum += S[n * R + r] * U[r * C + c];
    Y[i] = X[i] + sum / ROOT_R;
}
"""
step("2 S kept", TWO, ("affinity", -(-N * R // 128), 128, "SXA"), ("combine", -(-N * C // 128), 128, "YXSU"))

# %% [markdown]
# The arithmetic is what it should be. The price: $X$ is read twice and $S$ goes out and comes in, since the second kernel starts
# when the first has ended. At least $12NC + 8NR$ bytes instead of $8NC$:
#
# $$I \le \frac{4NRC}{12NC + 8NR} = \frac{RC}{3C + 2R} .$$

# %%
flops, _, least = WORK["2 S kept"](10**9)
assert np.isclose(flops / (4 * least), R * C / (3 * C + 2 * R))
print(f"at most {flops / (4 * least):.2f} FLOPs per byte, of {R / 2:.0f} that are possible")

# %% [markdown]
# ## 5. Kernel 3: both in one
#
# A block has *shared memory*, a few kilobytes on the chip that all its threads see. Let a block take a tile of 4 tokens: 128
# threads, one for each of its numbers of $Y$. The first 32 of them make the tile's $S$ and leave it in shared memory; then all
# read it. $S$ never leaves the chip.
#
# `__syncthreads()` is a *barrier*: no thread passes it before all have come. Without it a thread might read an affinity that is
# not there yet. Where threads write and read the same place with no barrier between, there is a *race*.

# %%
FUSED = """
extern "C" __global__ void assembly(float* Y, const float* X, const float* A, const float* U)
{
    __shared__ float S_tile[TOK][R];                        // on the chip
    const int t = threadIdx.x / C, c = threadIdx.x % C, n0 = blockIdx.x * TOK, n = n0 + t;
    const int st = threadIdx.x / R, sr = threadIdx.x % R;   // the number of S that this thread makes, if any
    if (st < TOK && n0 + st < N) {
        float s = 0;
        for (int k = 0; k < C; ++k) s += X[(n0 + st) * C + k] * A[sr * C + k];
        S_tile[st][sr] = s / ROOT_C;
    }
    __syncthreads();                                        // S is whole
    if (n >= N) return;
    float sum = 0;
    for (int r = 0; r < R; ++r) sum += S_tile[t][r] * U[r * C + c];
    Y[n * C + c] = X[n * C + c] + sum / ROOT_R;
}
"""
step("3 fused", FUSED, ("assembly", -(-N // TOK), 128, "YXAU"))

# %% [markdown]
# ## 6. Kernel 4: every token once
#
# Each number of $X$ is still asked for $R + 1$ times: by the threads of its affinities, and for the residual. A thread loads one
# number, keeps it for the residual, and leaves it in shared memory for the others.

# %%
TOKENS = """
extern "C" __global__ void assembly(float* Y, const float* X, const float* A, const float* U)
{
    __shared__ float X_tile[TOK][C], S_tile[TOK][R];
    const int t = threadIdx.x / C, c = threadIdx.x % C, n = blockIdx.x * TOK + t;
    const int st = threadIdx.x / R, sr = threadIdx.x % R;
    const float x = n < N ? X[n * C + c] : 0;               // once
    X_tile[t][c] = x;
    __syncthreads();                                        // X is whole
    if (st < TOK && blockIdx.x * TOK + st < N) {
        float s = 0;
        for (int k = 0; k < C; ++k) s += X_tile[st][k] * A[sr * C + k];
        S_tile[st][sr] = s / ROOT_C;
    }
    __syncthreads();                                        // S is whole
    if (n >= N) return;
    float sum = 0;
    for (int r = 0; r < R; ++r) sum += S_tile[t][r] * U[r * C + c];
    Y[n * C + c] = x + sum / ROOT_R;
}
"""
step("4 tokens once", TOKENS, ("assembly", -(-N // TOK), 128, "YXAU"))

# %% [markdown]
# ## 7. Kernel 5: the factors once
#
# What is left are the factors, which every tile asks for again. So let there be only as many blocks as the GPU runs at once, and
# let each take many tiles in turn. $A$ goes to shared memory once per block. A thread stays with its channel $c$, so it needs one
# column of $U$: $R$ numbers, in *registers*, which are its own.

# %%
FACTORS = """
extern "C" __global__ void assembly(float* Y, const float* X, const float* A, const float* U)
{
    __shared__ float X_tile[TOK][C], S_tile[TOK][R], A_all[R][C];
    const int t = threadIdx.x / C, c = threadIdx.x % C;
    const int st = threadIdx.x / R, sr = threadIdx.x % R;
    float u[R];                                             // a column of U, in registers
    for (int r = 0; r < R; ++r) u[r] = U[r * C + c];
    for (int i = threadIdx.x; i < R * C; i += blockDim.x) A_all[i / C][i % C] = A[i];
    for (int n0 = blockIdx.x * TOK; n0 < N; n0 += gridDim.x * TOK) {                // tiles in turn
        const int n = n0 + t;
        const float x = n < N ? X[n * C + c] : 0;
        X_tile[t][c] = x;
        __syncthreads();                                    // X is whole
        if (st < TOK && n0 + st < N) {
            float s = 0;
            for (int k = 0; k < C; ++k) s += X_tile[st][k] * A_all[sr][k];
            S_tile[st][sr] = s / ROOT_C;
        }
        __syncthreads();                                    // S is whole
        float sum = 0;
        for (int r = 0; r < R && n < N; ++r) sum += S_tile[t][r] * u[r];
        if (n < N) Y[n * C + c] = x + sum / ROOT_R;
    }
}
"""
step("5 factors once", FACTORS, ("assembly", BLOCKS, 128, "YXAU"))

# %% [markdown]
# Every number of $X$ is asked for once, every number of $Y$ written once, and the factors a few hundred times in all, whatever
# $N$ is. What the threads ask is what must move: the two ends of the last line in the picture meet.
#
# The library's [`assembly.cu`](../tinycea/ops/kernels/assembly.cu) is this kernel with $C$ and $R$ as template parameters, larger
# tiles whose affinities all warps make together, half precision, and its backward. It must agree:

# %%
if cp:
    with emulator.installed() if device == "the emulator" else nullcontext():
        from tinycea.ops import cuda
        Y_library = cp.asnumpy(cuda.assembly(*(cp.asarray(a[None]) for a in (X, X, A, U)))[0][0])
    error = np.abs(Y_library - exact).max() / np.abs(exact).max()
    print(f"the library's kernel: as the reference to {error:.0e}")
    assert error < 1e-6

# %% [markdown]
# ## 8. A race, caught
#
# Someone reads kernel 4 and finds a costly barrier too many. The affinities are made by the first warp alone, so it seems enough
# that *this warp* waits for its own 32 threads: `__syncwarp()` instead of `__syncthreads()`. And where the first warp happens to
# be the first, all is well: a test of values passes today, and fails once a month. The emulator runs the same source in any
# order. First the values under five orders of blocks, warps and lanes (0: as numbered, 1: reversed, then shuffled), then with
# every access to shared memory watched:

# %%
RACE = TOKENS.replace("__syncthreads();                                        // S is whole", "__syncwarp();")
assert RACE != TOKENS
race = [("assembly", -(-N // TOK), 128, "YXAU")]
if device == "the emulator":                                # a GPU has no watch
    wrong = []
    for seed in range(5):
        with cp.schedule(seed=seed):
            wrong.append(~(np.abs(launch(RACE, race) - exact) < 1e-5))          # NaN is wrong, too
        print(f"order {seed}: {wrong[-1].mean():.0%} of the numbers are wrong")
    assert not wrong[1].any() and wrong[0].any()

    with cp.schedule(seed=1, check=True):
        try:
            launch(RACE, race)
        except cudacpu.KernelError as error:
            caught = str(error)
    print("\n" + caught)
    assert "race" in caught or "read of a concurrent write" in caught

# %%
if device == "the emulator":
    text = (SIZES + RACE).splitlines()
    for line in sorted({int(number) for number in re.findall(r"kernel\.cu:(\d+)", caught)}):
        print(f"line {line}: {text[line - 1].strip()}")
        assert "S_tile" in text[line - 1]

# %% [markdown]
# Order 1 gives the right answer in every number, and the watch is not deceived even there: it names the line that writes, the
# line that reads, and two threads that met there with no barrier between. That is why the tests of this project run every kernel
# in the emulator, on every machine that has its wheels, and not only where there is a GPU.
#
# ## Exercises
#
# **1.** Shared memory lies in 32 *banks*: the number at address $i$ (in floats) is in bank $i \bmod 32$. When the threads of a
# warp read different addresses in one bank, they wait for each other; the same address is read once for all. In kernel 5 the
# first warp reads `X_tile[st][k]` and `A_all[sr][k]`. How many turns does each take? What does one more column per row change?

# %% jupyter={"source_hidden": true}
# Solution
# Rows of 32 floats begin in the same bank, so 4 tokens take 4 turns, and 8 rows of A take 8. With rows of 33, row i begins in
# bank i: one turn. That is why the library's tiles are declared [K + 1].
def turns(addresses):
    """Of one warp: the most different addresses that fall into one bank."""
    return np.bincount(np.unique(addresses) % 32).max()


lane = np.arange(32)
for row in (C, C + 1):
    found = [turns(index * row + 5) for index in (lane // R, lane % R)]         # k = 5, as any other
    print(f"rows of {row}: X_tile {found[0]} turns, A_all {found[1]}")
    assert found == ([TOK, R] if row == C else [1, 1])

# %% [markdown]
# **2.** Get $\partial L / \partial X$ from $\partial L / \partial Y$ with kernel 5 as it is, without a new line of CUDA.
# ($A$ and $U$ are held.) Hold it against `assembly_backward`.

# %% jupyter={"source_hidden": true}
# Solution
# dX = dY + (dY U^T / sqrt R) A / sqrt C: the assembly of dY, with A and U exchanged. The scales only meet as a product.
dY = rng.normal(size=(N, C)).astype(np.float32)
dx, dxhat, _, _ = ops.assembly_backward(dY.astype(float)[None], ops.assembly(*(a.astype(float)[None] for a in (X, X, A, U)))[1])
swapped = ops.assembly(*(a.astype(float)[None] for a in (dY, dY, U, A)))[0]
assert np.allclose(swapped, dx + dxhat)                     # X enters twice: as itself and through S
if cp:
    forward = X, A, U
    X, A, U = dY, U, A
    dX = launch(FACTORS, [("assembly", BLOCKS, 128, "YXAU")])
    X, A, U = forward
    print(f"kernel 5 as its own backward: as the reference to {np.abs(dX - (dx + dxhat)[0]).max() / np.abs(dX).max():.0e}")
    assert np.allclose(dX, (dx + dxhat)[0], rtol=1e-4, atol=1e-5)

# %% [markdown]
# **3.** With tokens stored in half precision (2 bytes) and FLOPs in float32: from which $R$ on is the fused kernel bound by
# arithmetic on the H100? And for which $R$ is it faster to compute $M = A^\top U$ first, with $C = 32$? (That
# takes $RC^2$ multiply-adds for $M$ and $NC^2$ for $X M$.)

# %% jupyter={"source_hidden": true}
# Solution
# Bytes halve, so I = R: arithmetic binds from R = 20 on (40 in float32). M first moves as many bytes and has 2 N C^2 FLOPs
# instead of 4 N R C, fewer from R = C/2 = 16 on: but there both orders wait for memory, until R reaches 40.
def at_least(flops, bytes_):
    return max(flops / PEAK, bytes_ / BANDWIDTH)


many, ranks = 512 * 512, np.arange(1, 100)
bound = {size: next(r for r in ranks if 4 * many * r * C / PEAK >= 2 * size * many * C / BANDWIDTH) for size in (2, 4)}
both = [[at_least(4 * many * r * C, 8 * many * C), at_least(2 * (many + r) * C * C, 8 * many * C)] for r in ranks]
faster = next(r for r, (tokens_first, M_first) in zip(ranks, both) if M_first < tokens_first)
print(f"bound by arithmetic from R = {bound[2]} (half), {bound[4]} (float32); M first is faster from R = {faster}")
assert bound == {2: 20, 4: 40} and faster == 41

# %% [markdown]
# ## What to read next
#
# - The library's kernels: [`assembly.cu`](../tinycea/ops/kernels/assembly.cu),
#   [`assembly_tf32.cu`](../tinycea/ops/kernels/assembly_tf32.cu) on tensor cores, [`probe.cu`](../tinycea/ops/kernels/probe.cu).
# - How the emulator is used, and what it does not do: [`tests/cudacpu`](../tests/cudacpu/README.md).
# - S. Williams, A. Waterman, D. Patterson (2009), "Roofline: an insightful visual performance model".
# - T. Dao et al. (2022), "FlashAttention": the same thought, where $S$ is $N \times N$.
# - The [CUDA C++ programming guide](https://docs.nvidia.com/cuda/cuda-c-programming-guide/).
