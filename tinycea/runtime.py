"""What a program needs of its machine: InputError, files whole or not at all, process pools, Ctrl-C, what machine this is."""
import json
import multiprocessing
import os
import platform
import re
import secrets
import signal
import stat
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm


class InputError(ValueError):
    """Bad input: one sentence that names the argument or file, what came and what was expected."""


# ---- files -----------------------------------------------------------------------------------------------------------

TEMPORARY = ".tinycea-"                       # begins the names of files under way


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed and `path` stays as it was.

    An OSError on the way (no such folder, no permission, a full disk) becomes an InputError that names `path`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # else who may would replace a device
        raise InputError(f"{path}: cannot be written (not a regular file)")
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(4)}{path.suffix}"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())           # else a power cut may leave the new name with nothing behind it
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_bytes(path, most=2**30):
    """The bytes of a regular file of at most so many; InputError for a folder, a device, a pipe, or what cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                raise InputError(f"{path}: cannot be read (expected a regular file of at most {most >> 20} MB)")
            return file.read(found.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def make_folder(path):
    """Make a folder and its parents if need be, or raise InputError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error.strerror})") from None


@contextmanager
def locked(folder):
    """Within, a folder (made if need be) is this process's alone; InputError if it is another's. The system frees it at the end.

    What a killed process left half-written is removed; so is the folder, if it is still empty afterwards, and the parents made.
    """
    made = [Path(folder), *(parent for parent in Path(folder).parents if not parent.exists())]
    make_folder(folder)
    with ExitStack() as stack:
        with suppress(ImportError):           # Windows has no such lock
            import fcntl
            place = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, place)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{folder}: another process is at work in this folder") from None
        for left in Path(folder).glob(f"{TEMPORARY}*"):
            left.unlink()
        stack.callback(lambda: [place.rmdir() for place in made if not any(place.iterdir())])
        yield


def write_json(path, value):
    """JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


# ---- Ctrl-C and processes --------------------------------------------------------------------------------------------

@contextmanager
def interruptible():
    """Within, Ctrl-C, SIGTERM and SIGHUP are remembered: yields a function that tells if one came. A second one is raised."""
    came, numbers = [], [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def handler(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield lambda: bool(came)
    finally:
        for number, old in zip(numbers, before):
            signal.signal(number, old)


@contextmanager
def uninterrupted():
    """Within, Ctrl-C waits; a process started within never hears of it: it is ended by the one that started it."""
    masked = hasattr(signal, "pthread_sigmask")           # not on Windows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else None
    try:
        yield
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def pool(workers, initializer=None, *arguments):
    """A ProcessPoolExecutor of fresh (spawned) processes, each prepared by initializer(*arguments).

    They end with the block, whatever they do, and with this process, however that ends. InputError where one has died. A script
    that uses one needs `if __name__ == "__main__"` around it.
    """
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare, (initializer, *arguments))
    processes = []
    try:
        with uninterrupted():
            for _ in range(workers):                      # each starts a process
                executor.submit(int)
            processes += executor._processes.values()
        yield executor
    except BrokenProcessPool:
        raise InputError("one of the processes at work has died, perhaps for want of memory") from None
    finally:
        with uninterrupted():
            for process in processes:
                process.terminate()
            executor.shutdown(cancel_futures=True)


def _prepare(initializer, *arguments):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())          # its own is shared by processes: one that is ended would leave a semaphore behind
    if initializer:
        initializer(*arguments)


def _end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


# ---- other hands: processes, the ranks of MPI ------------------------------------------------------------------------

RANKS = None                                  # an executor whose workers are the other ranks, where this is rank 0 of several


@contextmanager
def shared(processes, initializer=None):
    """Within: a function as itertools.starmap, whose calls are shared with the other ranks, or else among so many processes.

    This one is the first; the others are prepared by initializer(). Threads would wait for each other: a step on small patches is
    a thousand short calls, and Python makes one at a time. Processes take three quarters of the time that threads take.
    """
    def share(function, jobs):
        given = {i: executor.submit(function, *job) for i, job in enumerate(jobs) if i % hands}
        return [given[i].result() if i in given else function(*job) for i, job in enumerate(jobs)]
    hands = RANKS.num_workers + 1 if RANKS else processes
    with nullcontext(RANKS) if RANKS or hands == 1 else pool(hands - 1, initializer) as executor:
        yield share


@contextmanager
def ranks():
    """Within: whether this process is the one that acts. Under `mpiexec -n N`, N > 1, the others serve rank 0 until it ends."""
    global RANKS
    if int(os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1) == 1:
        yield True
        return
    runs_us = "mpi4py.futures" in sys.modules             # as `python -m mpi4py.futures -m tinycea` does, on rank 0 alone
    try:
        from mpi4py import futures
    except ImportError as error:
        raise InputError(f"several ranks of MPI need the package mpi4py, the extra mpi ({error})") from None
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with futures.MPIPoolExecutor() if runs_us else futures.MPICommExecutor() as RANKS:
        if RANKS:
            signal.signal(signal.SIGINT, before)
        yield bool(RANKS)


# ---- the machine -----------------------------------------------------------------------------------------------------

def machine():
    """The processor, its cores and the system, as far as the system tells."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, TypeError):        # not Linux, or a processor without a name there
        model = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def peak_memory():
    """Peak resident memory in MB of this process; None where the system does not tell."""
    if sys.platform == "linux":               # getrusage's peak is at least the parent process's
        return round(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10)
    with suppress(ImportError):               # Windows has none
        import resource
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
