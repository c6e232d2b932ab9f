"""A thousand ways to hurt tinycea, and what must hold after each: one sentence and exit status 2, or a right result and 0."""
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from tinycea import InputError, cli, degrade, restore
from tinycea.lab.comparison import finished
from tinycea.nafnet import NAFNetConfig, init
from tinycea.zoo import load_model, save_model

SECONDS, MEGABYTES = 20, 2000                 # an input may take at most so long, and the process so much
TINY = NAFNetConfig(width=4, encoders=(1,), middle=0, decoders=(1,), adapter=None)


def spoiled(data, rng):
    """Bytes with some flipped, cut, doubled, or replaced."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place, kind = int(rng.integers(max(len(data), 1))), rng.integers(4)
        if kind == 0 and data:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place:place + int(rng.integers(64))]
        else:
            data[place:place + 4] = rng.bytes(4)
    return bytes(data)


class Fuzzer:
    """Inputs in a folder of their own, from one seed."""

    def __init__(self, folder, seed):
        self.folder, self.rng = Path(folder, "inputs"), np.random.default_rng(seed)
        self.folder.mkdir()                   # so that ".." leads to nothing but itself
        pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
        self.images = {}
        os.mkfifo(self.folder / "pipe")       # has no end as an input, and is nobody's to replace as an output
        for suffix, values in ((".png", pixels), (".jpg", pixels), (".tif", np.uint16(pixels) * 257), (".tiff", pixels[..., 0])):
            iio.imwrite(self.folder / f"good{suffix}", values)
            self.images[suffix] = (self.folder / f"good{suffix}").read_bytes()
        save_model(self.folder / "good.safetensors", init(TINY, np.random.default_rng(0)), TINY)
        self.model = (self.folder / "good.safetensors").read_bytes()
        self.words = ["", "--", "-", "-1", "0", "nan", "inf", "1e308", "9" * 30, "\0", "é" * 300, "pipe", "pipe", "/",
                      "..", "cea:", "cea:rank=0", "cea:width=[2]", "cea:rank=" + "[" * 5000, "cea:slots=attic", "none", "a+b",
                      "+", "haze+haze", "aio5", str(self.folder / "good.png"), str(self.folder / "good.safetensors")]

    def image(self):
        suffix = self.rng.choice(list(self.images))
        photo = self.folder / f"bad{suffix}"
        photo.write_bytes(spoiled(self.images[suffix], self.rng))
        return ["restore", photo, "-o", self.folder / "out.png", "--weights", self.folder / "good.safetensors"]

    def checkpoint(self):
        path, data = self.folder / "bad.safetensors", self.model
        if self.rng.random() < 0.5:           # the header alone, which is JSON
            size = 8 + int.from_bytes(data[:8], "little")
            header = spoiled(data[8:size], self.rng)
            data = len(header).to_bytes(8, "little") + header + data[size:]
        else:
            data = spoiled(data, self.rng)
        path.write_bytes(data)
        return ["restore", self.folder / "good.png", "-o", self.folder / "out.png", "--weights", path]

    def command(self):
        options = {"restore": ("-o", "--weights", "--window", "--threads", "--megapixels"), "degrade": ("-o", "--as", "--seed"),
                   "convert": ("-o", "--local"), "evaluate": ("--weights", "--csv", "--luma"), "demo": ("-o",)}
        good = {"restore": ["good.png", "-o", "out.png", "--weights", "good.safetensors", "--window", "0"],
                "degrade": ["good.png", "-o", "out.png", "--as", "haze"], "evaluate": [".", ".", "--weights", "good.safetensors"],
                "convert": ["good.safetensors", "-o", "out.safetensors", "--local", "8"]}
        name = str(self.rng.choice(list(options)))
        if name in good and self.rng.random() < 0.6:      # a right one with one word changed
            words = good[name]
            words[self.rng.integers(len(words))] = str(self.rng.choice(self.words))
            return [name, *words]
        words = [self.rng.choice([*options[name], "--no-such"]) if self.rng.random() < 0.5 else
                 self.rng.choice(self.words) for _ in range(self.rng.integers(1, 6))]
        words = [word if word != "demo.png" else "x" for word in map(str, words)]
        return [name if name != "demo" or "-o" in words else "convert", *words]

    def folder_of_a_run(self):
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        recipe = {"steps": 4, "seed": 0, "batch": 2, "patch": 16, "scenes": 1} | {
            str(self.rng.choice(["steps", "patch", "batch", "adapter", "suite", "lr", "images", "odd"])):
            [None, -8, 0, "4", 5, [], {}, 1e400, True, "x" * 999, 2**70][self.rng.integers(11)]}
        metadata = {"version": 1, "recipes": [recipe]} if self.rng.random() < 0.8 else [[]] * int(self.rng.integers(3))
        header = json.dumps({"__metadata__": {"tinycea": json.dumps(metadata)}}).encode()
        (run / "state.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        return ["train", "--resume", "--out", run]

    def lines(self):
        folder = self.folder / "compare"
        folder.mkdir(exist_ok=True)
        line = json.dumps({"recipe": {"suite": "aio5", "adapter": "cea"}, "split": "test", "psnr": {}}).encode() + b"\n"
        (folder / "runs.jsonl").write_bytes(line + spoiled(line, self.rng) + b"\n" + line)
        return lambda: finished(folder)

    def array(self):
        """A call in Python instead of a command; returns what it gave."""
        shape = tuple(self.rng.integers(0, 4, self.rng.integers(0, 5)))
        kinds = ("uint8", "uint16", "float16", "float32", "float64", "int64", "complex64", "object", "U3", "bool")
        image = np.zeros(shape, kinds[self.rng.integers(len(kinds))])
        if image.dtype.kind == "f" and image.size:
            with np.errstate(over="ignore"):  # 1e30 is infinite as a float16
                image.flat[0] = [0, 1, -1, np.nan, np.inf, 1e30][self.rng.integers(6)]
        names = ["haze", "noise25", "stains", "patchwork", "low+haze", "", "haze+haze", "x"][self.rng.integers(8)]
        function = (lambda: degrade(image, names), lambda: restore(image, load_model(self.folder / "good.safetensors")))
        return function[self.rng.integers(2)]

    def next(self):
        """(what it is, a command line or a function)."""
        kind = str(self.rng.choice(["image", "checkpoint", "command", "folder_of_a_run", "lines", "array"],
                                   p=[0.3, 0.25, 0.2, 0.1, 0.05, 0.1]))
        return kind, getattr(self, kind)()

    def problem(self):
        """Try one input -> None, or what is wrong with tinycea's answer."""
        kind, job = self.next()
        told = f"{kind} {job if callable(job) else ' '.join(map(str, job))[:200]!r}"
        before, out, err = {path.name for path in self.folder.iterdir()}, io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(SECONDS)
        began, here = time.perf_counter(), os.getcwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                if callable(job):
                    try:
                        job()
                        status = 0
                    except InputError as error:
                        status, _ = 2, err.write(f"tinycea: {error}\n")
                else:
                    try:
                        status = cli.main(list(map(str, job)))
                    except SystemExit as end:             # --help
                        status = end.code
        except BaseException as error:
            return f"{told}: {type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.alarm(0)
            os.chdir(here)
            left = {path.name for path in self.folder.iterdir()} - before
            for name in left - {"run", "compare"}:
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if not (self.folder / "pipe").is_fifo():
            return f"{told}: replaced a pipe"
        sentence = err.getvalue()
        if status not in (0, 2) or status == 2 and not (sentence.startswith("tinycea: ") and sentence.count("\n") == 1):
            return f"{told}: status {status}, {sentence[:300]!r}"
        if status == 2 and any(name.startswith(("out", ".tinycea")) for name in left):
            return f"{told}: left {left}"
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MEGABYTES * 1024:
            return f"{told}: memory of the process is above {MEGABYTES} MB"
        if time.perf_counter() - began > SECONDS:
            return f"{told}: took longer than {SECONDS} s"
        return None


def _late(number, frame):
    raise TimeoutError(f"longer than {SECONDS} s")
