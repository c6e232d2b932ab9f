"""Compiles CUDA C++ kernels for the CPU and launches them on NumPy arrays behind CuPy's RawModule interface, each launch checked.

    kernel = RawModule(code=source, name_expressions=["f<float, 64>"]).get_function("f<float, 64>")
    kernel((grid,), (block,), (x, y, np.int32(n)), shared_mem=0, seed=0)        # arrays are updated in place

A launch refuses arguments of the wrong type, puts each array between guard pages and poisons shared memory. Seeds 0, 1 and
2, 3, ... run blocks, warps and lanes in order, reversed and shuffled. check=True also reports data races, reads of uninitialized
shared memory and every access beside an array, with source lines.
"""
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O1", "-gdwarf-4", "-fPIC", "-march=native", "-fvisibility=hidden", "-fno-exceptions", "-w",
         "-U_FORTIFY_SOURCE",
         "-ftrivial-auto-var-init=pattern",              # an uninitialized register is -1.7e38
         "-fsanitize=bounds,alignment", f"-I{HERE / 'include'}", f"-I{HERE}")
CHECKS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
KINDS = {1: "write/write race", 2: "read of a concurrent write", 3: "write while read concurrently",
         4: "uninitialized shared memory read", 5: "access outside"}
KEEP_DAYS = 30                                           # a compiled kernel that no test used for so long leaves the cache
DEFAULT_SHARED, MOST_SHARED = 48 << 10, 227 << 10        # bytes of dynamic shared memory: without asking for more, and at all
MANY = 2**32 - 1                                         # in a report: several threads
ALIGNMENT = r"(?:(?:__align__|alignas)\s*\(\s*\d+\s*\)\s*)?"
BOUNDS = r"(?:__launch_bounds__\s*\(\s*(\d+)[^)]*\)\s*)?"
EXTERN_SHARED = re.compile(rf"extern\s+__shared__\s+{ALIGNMENT}([\w ]+?)\s+{ALIGNMENT}(\w+)\s*\[\s*\]\s*;")
EXTERN_KERNEL = re.compile(rf'extern\s+"C"\s+__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)')
launching = threading.Lock()                             # the runtime's state is global


class KernelError(RuntimeError):
    """A kernel does not compile, or its launch did what it must not do."""


class Report(ctypes.Structure):
    """cudacpu.cpp's struct of that name: one access that the checking mode objects to."""
    _fields_ = [("kind", ctypes.c_int), ("range", ctypes.c_int), ("offset", ctypes.c_int64)] + [
        (name, ctypes.c_uint32) for name in ("block", "thread", "other_thread", "other_block", "pc", "other_pc")]


def missing():
    """What this machine lacks to run the emulator, in words; None where nothing is missing."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "x86-64 Linux"
    if not shutil.which("g++") or int(_run("g++", "-dumpversion").split(".")[0]) < 12:
        return "g++ 12 or newer"
    if not headers():
        return "CUDA's headers: CUDA_PATH, or the wheels nvidia-cuda-runtime and nvidia-cuda-crt"
    return None


@functools.cache
def headers():
    """CUDA's include folder, of CUDA_PATH or of NVIDIA's wheels; None where there is none."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(os.environ["CUDA_PATH"]) / "include"] if "CUDA_PATH" in os.environ else []
    for root in wheels.submodule_search_locations if wheels else ():
        folders += sorted(Path(root).glob("cu*/include"), reverse=True)
    for folder in folders:
        if (folder / "vector_functions.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
            return folder
    return None


# ---- compiling -------------------------------------------------------------------------------------------------------

def _run(*command, folder=None):
    result = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise KernelError(f"{result.stderr}\n{command[0]} returned {result.returncode}")
    return result.stdout


@functools.cache
def _compiler():
    """The compiler's version, what -march=native means to it here, and the emulator's own source: part of every cache key."""
    own = [path.read_text() for path in sorted(HERE.rglob("*.h"))]
    return "\0".join([_run("g++", "-dumpfullversion"), _run("g++", "-march=native", "-Q", "--help=target"), *own])


@functools.cache
def _cache():
    """The user's cache folder, rid of what nobody used lately."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinycea-cudacpu"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.*"):
        if time.time() - path.stat().st_mtime > KEEP_DAYS * 86400:
            path.unlink(missing_ok=True)
    return folder


def _cached(ending, build, *ingredients):
    """A file out of the cache, or what `build(folder)` leaves as "it" in a folder of its own, to be found there.

    Its name is a hash of everything that enters it, and it is moved into place whole: processes may build the same one at once.
    """
    path = _cache() / f"{hashlib.sha256(chr(0).join([_compiler(), *ingredients]).encode()).hexdigest()[:32]}{ending}"
    try:
        os.utime(path)                                   # used today
    except FileNotFoundError:
        with tempfile.TemporaryDirectory(dir=_cache()) as work:
            build(Path(work))
            os.replace(Path(work) / "it", path)
    return path


@functools.cache
def _header(flags):
    """cudacpu.h and all that it includes, precompiled: two thirds of the time of every kernel."""
    command = ("g++", *flags, "-x", "c++-header", HERE / "cudacpu.h", "-o", "it")
    return _cached(".gch", lambda work: _run(*command, folder=work), *flags)


def _library(source, filename, flags, *libraries, header=None):
    """A shared library compiled from C++ source, with cudacpu.h, perhaps precompiled."""
    flags = (*FLAGS, *flags, f"-isystem{headers()}")
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    included = [path.read_text() for folder in folders for path in sorted(folder.glob("*.cuh"))]

    def build(work):
        (work / filename).write_text(source)
        if header:
            (work / "cudacpu.h.gch").symlink_to(header)  # found before cudacpu.h, and passed over should it not fit
        _run("g++", *flags, "-include", "cudacpu.h", "-x", "c++", "-c", filename, "-o", "it.o", folder=work)
        _run("g++", "-shared", "it.o", *libraries, "-o", "it", folder=work)
    return _cached(".so", build, source, filename, *flags, *map(str, libraries), *included)


@functools.cache
def _runtime():
    """The emulator itself, loaded."""
    flags = ("-O2", "-fno-sanitize=all", "-fvisibility=default")
    lib = ctypes.CDLL(str(_library((HERE / "cudacpu.cpp").read_text(), "cudacpu.cpp", flags)))
    lib.cpu_message.restype, lib.cpu_alloc.restype = ctypes.c_char_p, ctypes.c_void_p
    lib.cpu_alloc.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    lib.cpu_free.argtypes = lib.cpu_intact.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return lib


class RawModule:
    """Kernels compiled from CUDA C++ source: those of `name_expressions` (templates), and every `extern "C" __global__`.

    Of `options`, only -D and -I mean something here. `filename` is what reports call the source.
    """

    def __init__(self, *, code, options=(), name_expressions=None, check=False, filename="kernel.cu"):
        self.check = check
        self.bounds = {name: int(outer or inner or 1024) for outer, inner, name in EXTERN_KERNEL.findall(code)}
        for name in name_expressions or ():
            found = re.search(rf"{BOUNDS}void\s+{BOUNDS}{name.split('<')[0].strip()}\s*\(", code)
            self.bounds[name] = int(found and (found[1] or found[2]) or 1024)
        source = "\n".join([
            EXTERN_SHARED.sub(r"\1* const \2 = static_cast<\1*>(cpu::dynamic_shared());", code),
            *(f"CPU_ENTRY({i}, {name})" for i, name in enumerate(self.bounds)), ""])
        own, checks = [option for option in options if option.startswith(("-D", "-I"))], CHECKS if check else ()
        header = _header((*FLAGS, *checks, f"-isystem{headers()}"))
        self.path = _library(source, filename, (*own, *checks), _runtime()._name, header=header)
        self.library = ctypes.CDLL(str(self.path))

    def get_function(self, name):
        """The kernel called `name`."""
        if name not in self.bounds:
            raise KernelError(f"no kernel is called {name}: the module has {', '.join(self.bounds)}")
        return RawKernel(self, name)

    def lines(self, addresses):
        """{address: "file:line"} of return addresses; what is inlined from the emulator's headers counts as its caller's line."""
        asked = {f"0x{address - 1:016x}": address for address in addresses}
        lines, address = {}, None
        for row in _run("addr2line", "-a", "-i", "-e", self.path, *asked).splitlines():
            if row in asked:
                address = asked[row]
            elif address not in lines and not row.startswith((str(HERE), str(headers()))):
                lines[address] = row.split("/")[-1].split()[0]
        return lines


# ---- launching -------------------------------------------------------------------------------------------------------

class RawKernel:
    """One kernel. Its call launches it and returns when it has ended."""

    def __init__(self, module, name):
        self.module, self.name = module, name
        self.max_dynamic_shared_size_bytes = DEFAULT_SHARED      # must be raised before a launch that takes more, as in CUDA
        number = list(module.bounds).index(name)
        self.run = getattr(module.library, f"cpu_run_{number}")
        signature = getattr(module.library, f"cpu_signature_{number}")
        signature.restype = ctypes.c_char_p
        self.parameters, self.pointees, self.mutable = signature().decode().split("/")

    def __call__(self, grid, block, args, *, shared_mem=0, seed=0):
        arrays = self._arrays(args)
        dims = [(*size, 1, 1)[:3] for size in (grid, block)]
        threads = dims[1][0] * dims[1][1] * dims[1][2]
        if min(*dims[0], *dims[1]) < 1 or max(dims[0][1:]) > 65535 or threads > self.module.bounds[self.name] or dims[1][2] > 64:
            most = self.module.bounds[self.name]
            raise ValueError(f"{self.name}: cannot launch {grid} blocks of {block}, at most {most} threads each")
        if not 0 <= shared_mem <= min(self.max_dynamic_shared_size_bytes, MOST_SHARED):
            raise ValueError(f"{self.name}: {shared_mem} bytes of shared memory, max_dynamic_shared_size_bytes is "
                             f"{self.max_dynamic_shared_size_bytes} and at most {MOST_SHARED}")
        runtime, buffers = _runtime(), {}
        with launching:
            try:
                for i, a in arrays.items():
                    buffers[i] = runtime.cpu_alloc(a.nbytes, a.ctypes.data % 16)
                    if not buffers[i]:
                        raise MemoryError(f"{self.name}: no memory for argument {i}")
                    ctypes.memmove(buffers[i], a.ctypes.data, a.nbytes)
                self._launch(dims, args, buffers, shared_mem, seed)
                for i, a in arrays.items():
                    if not runtime.cpu_intact(buffers[i], a.nbytes):
                        raise KernelError(f"{self.name}: wrote beside argument {i} {a.shape}")
                    if self.mutable[i] == "m":
                        ctypes.memmove(a.ctypes.data, buffers[i], a.nbytes)
            finally:
                for i, buffer in buffers.items():
                    runtime.cpu_free(buffer, arrays[i].nbytes)

    def _arrays(self, args):
        """{index: array} of the arguments that are arrays; TypeError unless all are exactly what the kernel takes."""
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}: {len(self.parameters)} parameters, {len(args)} arguments")
        arrays = {}
        for i, (a, parameter, pointee) in enumerate(zip(args, self.parameters, self.pointees)):
            if not isinstance(a, (np.ndarray, np.generic)):
                raise TypeError(f"{self.name}: argument {i} is {type(a).__name__}; "
                                "pass a NumPy array or scalar of the exact type")
            pointer = parameter == "P"
            want = pointee if pointer else parameter
            got = {"l": "q", "L": "Q"}.get(a.dtype.char, a.dtype.char)
            if isinstance(a, np.ndarray) != pointer or got != want:
                raise TypeError(f"{self.name}: argument {i} is {type(a).__name__} of {a.dtype}, "
                                f"the kernel takes {'a pointer to ' * pointer}{_spell(want)}")
            if pointer:
                if not a.flags.c_contiguous:
                    raise TypeError(f"{self.name}: argument {i} is not C-contiguous")
                if self.mutable[i] == "m" and not a.flags.writeable:
                    raise TypeError(f"{self.name}: argument {i} is written and read-only")
                for j, b in arrays.items():
                    if "m" in (self.mutable[i], self.mutable[j]) and np.may_share_memory(a, b):
                        raise TypeError(f"{self.name}: arguments {j} and {i} overlap and one is written")
                arrays[i] = a
        return arrays

    def _launch(self, dims, args, buffers, shared_mem, seed):
        """Run the kernel on copies of its arrays; KernelError for anything that it must not do."""
        values = [ctypes.c_void_p(buffers[i]) if i in buffers else ctypes.create_string_buffer(a.tobytes())
                  for i, a in enumerate(args)]
        pointers = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, values))
        n = len(buffers)
        addresses = (ctypes.c_void_p * n)(*buffers.values())
        sizes = (ctypes.c_size_t * n)(*(args[i].nbytes for i in buffers))
        shifts = (ctypes.c_int * n)(*(args[i].itemsize.bit_length() - 1 for i in buffers))
        grid, block = ((ctypes.c_uint * 3)(*size) for size in dims)
        runtime = _runtime()
        failed = runtime.cpu_launch(self.run, pointers, grid, block, ctypes.c_size_t(shared_mem), ctypes.c_uint64(seed),
                                    addresses, sizes, shifts, n, int(self.module.check))
        if failed:
            raise KernelError(f"{self.name}: {self._explain(runtime.cpu_message().decode(), args, buffers)}")
        first = ctypes.POINTER(Report)()
        count = runtime.cpu_reports(ctypes.byref(first))
        if count:
            raise KernelError("\n  ".join([f"{self.name}: seed {seed}", *self._describe(first[:count], args, buffers)]))

    def _explain(self, message, args, buffers):
        """The runtime's message, with a program counter and an address put into words."""
        found = re.match(r"(\w+) pc=(\w+) value=(\w+) (.*)", message)
        if not found:
            return message
        pc, value = int(found[2], 16), int(found[3], 16)
        place = f"{self.module.lines([pc]).get(pc, 'the emulator')}, {found[4]}"
        if found[1] == "DIVISION":
            return f"integer division by zero at {place}"
        if found[1] == "INDEX":
            return f"index {ctypes.c_int64(value).value} outside a fixed-size array at {place}"
        near = "shared memory, a thread's stack or a stray pointer"
        for i, start in buffers.items():
            a = args[i]
            if -(1 << 26) <= value - start < a.nbytes + (1 << 26):
                near = f"element {(value - start) // a.itemsize} of argument {i} {a.shape}"
        return f"{'misaligned' if found[1] == 'MISALIGNED' else 'out-of-bounds'} access at {place}: {near}"

    def _describe(self, reports, args, buffers):
        """One line for each report of the checking mode."""
        places = ["dynamic shared memory", "static shared memory",
                  *(f"argument {i} {args[i].shape}" for i in buffers if args[i].nbytes)]
        lines = self.module.lines({pc for r in reports for pc in (r.pc, r.other_pc) if pc})
        told = set()
        for r in reports:
            line, other = lines.get(r.pc, "the emulator"), lines.get(r.other_pc)
            if (r.kind, line, other) in told:
                continue
            told.add((r.kind, line, other))
            text = f"{KINDS[r.kind]} in {places[r.range]}, byte {r.offset}: {line} block {r.block} thread {r.thread}"
            if other:
                text += f", other {other}"
            if r.other_thread != MANY:
                text += f" block {r.other_block} thread {r.other_thread}"
            yield text


def _spell(char):
    """NumPy's type character in words."""
    return "a type that NumPy lacks" if char == "V" else np.dtype(char).name
