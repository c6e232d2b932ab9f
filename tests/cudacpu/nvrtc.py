"""Compiles kernels with NVRTC, the compiler that CuPy uses, for real GPUs, and says what they cost there. Needs no GPU."""
import io
import re

from . import cudacpu

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
ENTRY = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                   r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)", re.DOTALL)


def missing():
    """What this machine lacks to compile, in words; None where nothing is missing."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program  # noqa: F401
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):                  # a wheel, or the library that one of them loads
        return "the wheels cuda-core, cuda-bindings and nvidia-cuda-nvrtc"
    return None if cudacpu.headers() else "CUDA's headers: CUDA_PATH, or the wheels nvidia-cuda-runtime and nvidia-cuda-crt"


def compile(code, name_expressions=(), arch="sm_90"):
    """{kernel: {"registers", "spills", "shared", "stack"}} of CUDA C++17 source: a thread's registers, and bytes.

    Kernels are those of `name_expressions` and every `extern "C"` one. KernelError, with the compiler's log, for source that it
    refuses.
    """
    from cuda.core import Program, ProgramOptions
    log = io.StringIO()
    options = ProgramOptions(std="c++17", arch=arch, include_path=[str(cudacpu.headers())], ptxas_options="-v")
    try:
        binary = Program(code, "c++", options).compile("cubin", name_expressions=tuple(name_expressions), logs=log)
    except Exception as error:                           # NVRTCError is not public; its text ends with the compiler's log
        raise cudacpu.KernelError(f"NVRTC refuses this source for {arch}:\n{str(error).rstrip(chr(0))}") from None
    names = {symbol.decode(): name for name, symbol in binary.symbol_mapping.items()}
    return {names.get(symbol, symbol): {
        "registers": int(registers), "spills": int(stores) + int(loads), "stack": int(stack),
        "shared": sum(map(int, re.findall(r"(\d+)(?:\+\d+)? bytes smem", rest)))}
        for symbol, stack, stores, loads, registers, rest in ENTRY.findall(log.getvalue())}
