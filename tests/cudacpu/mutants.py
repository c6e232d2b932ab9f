"""Sample kernels with one error each, and the check that sees it."""
from typing import NamedTuple


class Mutant(NamedTuple):
    """A case whose kernel has `new` for the nth `old`.

    `check` sees it: "numeric" (results over five seeds, or a launch that is stopped) or "checked" (the checking mode), and `says`
    this.
    """
    case: str
    error: str
    old: str
    new: str
    nth: int
    check: str
    says: str

    def apply(self, source):
        """The source with the error."""
        parts = source.split(self.old)
        return self.old.join(parts[:self.nth + 1]) + self.new + self.old.join(parts[self.nth + 1:])


BARRIER, WARP_BARRIER = "__syncthreads();", "__syncwarp();"
RACE, UNINITIALIZED = "read of a concurrent write in", "uninitialized shared memory read in"
ALWAYS = "wrong with seeds 0 1 2 3 4"
# Not here: assembly_tiled's load overrun by two columns, which stays in the padding of its rows and changes nothing.
MUTANTS = (
    Mutant("assemble", "no barrier after the load", BARRIER, "", 0, "checked", UNINITIALIZED),
    Mutant("tiled", "no barrier after the load", BARRIER, "", 1, "checked", UNINITIALIZED),
    Mutant("tiled", "no barrier before the next load", BARRIER, "", 2, "checked", RACE),
    Mutant("tiled", "no barrier between the phases", BARRIER, "", 3, "checked", UNINITIALIZED),
    Mutant("attention", "no barrier before the next load", BARRIER, "", 0, "checked", RACE),
    Mutant("attention", "no barrier after the load", BARRIER, "", 1, "checked", UNINITIALIZED),
    Mutant("attention", "no barrier after the maxima", BARRIER,
           "", 2, "checked", "write while read concurrently in static shared memory"),
    Mutant("attention", "no barrier before reuse", BARRIER, "", 3, "checked", RACE),
    Mutant("attention", "no barrier after the sums", BARRIER, "", 4, "checked", RACE),
    Mutant("layernorm", "no barrier in ln_backward", BARRIER, "", 0, "checked", UNINITIALIZED),
    Mutant("layernorm", "no barrier in column_sum", BARRIER, "", 1, "checked", UNINITIALIZED),
    Mutant("tf32", "no warp barrier", WARP_BARRIER, "", 0, "checked", RACE),
    Mutant("warp_tricks", "no warp barrier after the write", WARP_BARRIER, "", 0, "checked", UNINITIALIZED),
    Mutant("warp_tricks", "no warp barrier after the read", WARP_BARRIER,
           "", 1, "checked", "write while read concurrently in static shared memory"),
    Mutant("warp_tricks", "no warp barrier after the second write", WARP_BARRIER, "", 2, "checked", RACE),
    Mutant("last_block_sum", "no barrier after the warps' sums", BARRIER, "", 0, "checked", UNINITIALIZED),
    Mutant("last_block_sum", "no barrier after the ticket", BARRIER, "", 1, "checked", RACE),
    Mutant("histogram", "no barrier after the zeros", BARRIER, "", 2, "checked", "write/write race in static shared memory"),
    Mutant("histogram", "no barrier after the counts", BARRIER, "", 3, "checked", RACE),
    Mutant("pipe_scale", "no barrier after the wait", BARRIER, "", 0, "checked", RACE),
    Mutant("pipe_scale", "no barrier before the next load", BARRIER, "", 1, "checked", RACE),
    Mutant("pipe_scale", "waits for too little", "wait_prior(1)", "wait_prior(2)", 0, "numeric", "wrong with seeds 0 2 4"),
    Mutant("pipe_scale", "no wait", "__pipeline_wait_prior(1);", "", 0, "checked", UNINITIALIZED),
    Mutant("assemble", "one token too many", "n < n_tokens; n +=",
           "n <= n_tokens; n +=", 0, "numeric", "out-of-bounds access at assembly.cu"),
    Mutant("tiled", "reads one token too many", "(n0 + n < n_tokens) ?",
           "(n0 + n <= n_tokens) ?", 0, "numeric", "out-of-bounds access at assembly.cu"),
    Mutant("tiled", "no guard", "if (n0 + n + m < n_tokens) {", "{", 0, "numeric", "out-of-bounds access at"),
    Mutant("layernorm", "no guard", "if (row >= n) return;", "", 0, "numeric", "out-of-bounds access at"),
    Mutant("saxpy", "no guard", "if (i < n) y", "y", 0, "numeric", "out-of-bounds access at"),
    Mutant("saxpy", "guard one too far", "if (i < n) y", "if (i <= n) y", 0, "numeric", "element 1000 of argument 0 (1000,)"),
    Mutant("saxpy", "one element before the array", "fmaf(a, x[i], y[i])",
           "fmaf(a, x[i], y[i]) + 0.f * x[i - 1]", 0, "checked", "access outside in argument 1"),
    Mutant("tiled", "static shared memory overflows", "i < TOK * KC; i += 256",
           "i < TOK * KC + 256; i += 256", 0, "numeric", "outside a fixed-size array at assembly.cu"),
    Mutant("assemble", "dynamic shared memory too small", "float* Bs = smem + r * C;",
           "float* Bs = smem + r * C + 1;", 0, "numeric", "out-of-bounds access at assembly.cu"),
    Mutant("layernorm", "index past registers", "= ag[j];",
           "= ag[j + 1];", 0, "numeric", "index 4 outside a fixed-size array at layernorm.cu"),
    Mutant("tiled", "misaligned float4", "&xs[c][tok]", "&xs[c][tok + 1]", 0, "numeric", "misaligned access at assembly.cu"),
    Mutant("assemble", "uninitialized registers", "acc[j] = 0.f;", "", 0, "numeric", ALWAYS),
    Mutant("layernorm", "a row group left out", "for (int i = threadIdx.y; i < rows; i += 8) a +=",
           "if (threadIdx.y < 2) for (int i = threadIdx.y; i < rows; i += 8) a +=", 0, "numeric", ALWAYS),
    Mutant("layernorm", "uninitialized shared memory", "s[threadIdx.y][threadIdx.x] = a;",
           "if (threadIdx.y != 5) s[threadIdx.y][threadIdx.x] = a;", 0, "checked", UNINITIALIZED),
    Mutant("histogram", "uninitialized counters", "h[threadIdx.x] = 0;", "", 0, "checked", UNINITIALIZED),
    Mutant("layernorm", "missing column", "c < C; c += blockDim.x", "c < C - 1; c += blockDim.x", 0, "numeric", ALWAYS),
    Mutant("layernorm", "divergent barrier on one line", BARRIER,
           "if (threadIdx.y) __syncthreads(); else __syncthreads();", 1, "numeric", "divergent __syncthreads at line"),
    Mutant("layernorm", "divergent barrier", BARRIER,
           "if (threadIdx.y)\n __syncthreads();\n else\n __syncthreads();", 1, "numeric", "divergent __syncthreads at line"),
    Mutant("attention", "barrier under a condition", "if (qi < r) {\n                float s",
           "if (qi < r) { __syncthreads();\n                float s", 0, "numeric", "divergent __syncthreads at line"),
    Mutant("layernorm", "shuffle under a condition", "v += __shfl_xor",
           "if ((threadIdx.x & 31) < 16) v += __shfl_xor",
           0, "numeric", "shuffle from a lane that is not in the mask or has exited"),
    Mutant("layernorm", "wrong mask", "v += __shfl_xor_sync(0xffffffffu",
           "v += __shfl_xor_sync(0x0000ffffu", 0, "numeric", "shuffle from a lane that is not in the mask or has exited"),
    Mutant("layernorm", "divergent shuffles", "v += __shfl_xor_sync(0xffffffffu, v, o);",
           "if (threadIdx.x & 1)\n v += __shfl_xor_sync(0xffffffffu, v, o);\n else\n v += __shfl_xor_sync(0xffffffffu, v, o);",
           0, "numeric", "divergent warp operation at line"),
    Mutant("layernorm", "shuffle from a lane that left", "if (row >= n) return;",
           "if (row >= n || lane == 7) return;", 0, "numeric", "shuffle from a lane that is not in the mask or has exited"),
    Mutant("numbers", "half a sum", "sum += __shfl_down_sync(0xffffffffu, sum, o)",
           "sum += __shfl_down_sync(0xffffffffu, sum, o, 16)", 0, "numeric", ALWAYS),
    Mutant("numbers", "every lane adds", "if (threadIdx.x == 0) atomicAdd", "atomicAdd", 0, "numeric", ALWAYS),
    Mutant("layernorm", "blocks write one place", "part[((size_t)blockIdx.x * 2 + 0) * C + c] = a;",
           "part[c] = a;", 0, "checked", "write/write race in argument 1"),
    Mutant("histogram", "no atomic in a block", "atomicAdd(&h[x[i]], 1)",
           "h[x[i]] += 1", 0, "checked", "write/write race in static shared memory"),
    Mutant("histogram", "no atomic between blocks", "atomicAdd(&out[threadIdx.x], h[threadIdx.x])",
           "out[threadIdx.x] += h[threadIdx.x]", 0, "checked", "write/write race in argument 0"),
    Mutant("last_block_sum", "no fence", "__threadfence();", "", 0, "checked", "read of a concurrent write in argument 1"),
    Mutant("last_block_sum", "ticket off by one", "gridDim.x - 1;",
           "gridDim.x - 2;", 0, "checked", "write while read concurrently in argument 1"),
    Mutant("pipe_scale", "division by zero", "n / 1024", "n / (n - 5120)", 0, "numeric", "integer division by zero at pipe.cu"),
)
