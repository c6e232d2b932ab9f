"""The command `tinycea`: mechanism, train, compare, restore, explain, evaluate, convert, degrade, demo, gradcheck, bench.

Bad input ends in one sentence and exit status 2.
"""
import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from . import __version__
from .runtime import InputError, ranks

# Before NumPy is imported: small products gain nothing from a second BLAS thread, which spins if another process wants its core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are an InputError that lists the valid options."""

    def error(self, message):
        options = " ".join(option for action in self._actions for option in action.option_strings[-1:])
        raise InputError(f"{message}; `{self.prog}` takes {options}")


def parser():
    """The parser of all commands; each command's function is its `run`."""
    top = Parser(prog="tinycea", allow_abbrev=False, description="Continuous Expert Assembly for image restoration, in NumPy.")
    top.add_argument("--version", action="version", version=f"tinycea {__version__}")
    commands = top.add_subparsers(required=True, metavar="mechanism|train|compare|restore|evaluate|...")

    def command(run, description):
        sub = commands.add_parser(run.__name__, help=description, description=description, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command(mechanism, "what the layer is for: one layer alone cleans photographs under unknown colors (a minute)")
    sub.add_argument("-o", "--out", type=png, default="mechanism.png", help="the picture, a .png (default mechanism.png)")
    sub.add_argument("--test", type=path, metavar="DIR", help="test on a folder's last hundred photographs by name instead")
    sub.add_argument("--long", action="store_true", help="sizes and rates tuned, five seeds, other tasks: tables alone, an hour")

    sub = command(train, "train a model on a suite of degradations and leave a run folder (one to two minutes by default)")
    sub.add_argument("--suite", help="aio3, aio5, cdd11, patchwork, stains, everyday, lens, or some joined by + (default aio5)")
    sub.add_argument("--adapter", help="none, wider (no adapter), cea (default), a rival: static, mlp, descriptor, prompt, "
                     "experts-image, experts-token, or an ablation: cea-softmax, cea-topk, cea-image, cea-static-A, "
                     "cea-static-U, cea-static; with options as in cea:rank=16,sca=false")
    sub.add_argument("--steps", type=count, help="training steps (default 2400)")
    sub.add_argument("--seed", type=natural, help="of everything random (default 0)")
    sub.add_argument("--backend", help="cpu, cuda or reference (default cpu)")
    sub.add_argument("--images", type=folder, metavar="DIR", help="a folder of photographs to train on instead of scikit-image's")
    sub.add_argument("--pairs", type=folder, nargs=2, metavar=("DEGRADED", "CLEAN"), help="folders of degraded and clean images, "
                     "matched as by evaluate, to train on instead of a suite, or half and half with --suite; a tenth is held out")
    sub.add_argument("--threads", type=count, metavar="N", help="processes, each with a chunk of the batch (default: cores)")
    sub.add_argument("--out", type=path, metavar="DIR", help="the run folder (default runs/SUITE-ADAPTER-seedN)")
    sub.add_argument("--resume", action="store_true", help="go on with the interrupted run in the run folder")

    sub = command(compare, "train adapters on the same batches, test them, and print what each buys (45 minutes by default)")
    sub.add_argument("--suites", nargs="+", help="of aio3, aio5, cdd11, patchwork, stains, everyday, lens (default: first four)")
    sub.add_argument("--adapters", nargs="+", help="as train's --adapter; and told, the ceiling (default wider, cea, rivals)")
    sub.add_argument("--seeds", type=count, help="seeds 0 to N-1 (default 5)", metavar="N")
    sub.add_argument("--steps", type=count, nargs="+", help="training steps, one grid for each number (default 1000)")
    sub.add_argument("--rates", type=positive, nargs="+", help="learning rates of the adapters, times the network's")
    sub.add_argument("--split", choices=("test", "validation"), default="test", help="photographs to test on (default test)")
    sub.add_argument("--test", type=folder, metavar="DIR", help="a folder of photographs to test on: its last, or first, hundred")
    sub.add_argument("--images", type=folder, metavar="DIR", help="a folder of photographs to train on")
    sub.add_argument("--jobs", type=count, default=os.cpu_count(), help="processes (default one for each core)")
    sub.add_argument("--out", type=path, default="runs/compare", metavar="DIR", help="what it holds is not trained again")
    sub.add_argument("--quick", action="store_true", help="two adapters, one suite, one seed, 60 steps: a minute")

    sub = command(restore, "restore photographs with a trained model; ours leaves what it would hardly change as it came")
    sub.add_argument("photos", type=path, nargs="+", metavar="PHOTO", help="image files, or folders of them")
    sub.add_argument("-o", "--out", type=path, required=True, help="an image file for one photo, a folder for several")
    sub.add_argument("--weights", type=path, metavar="FILE", help="a run's model, a NAFNet's .pth or safetensors (default: ours)")
    sub.add_argument("--window", type=natural, metavar="N", help="pixels a side of overlapping windows, 0 for none (default 512)")
    sub.add_argument("--threads", type=count, metavar="N", help="windows or halves restored at a time (default: cores)")
    sub.add_argument("--megapixels", type=positive, help="the largest photograph that is read (default 128)")

    sub = command(explain, "look into a photograph's restoration: every component's map, and the photograph without it")
    sub.add_argument("photo", type=path, metavar="PHOTO", help="an image file; reduced to 512 pixels a side")
    sub.add_argument("-o", "--out", type=html, required=True, help="the page to write, an .html that needs nothing beside it")
    sub.add_argument("--weights", type=path, metavar="FILE", help="a run's model with CEA layers (default: ours)")

    sub = command(evaluate, "PSNR and SSIM of degraded images, and of what a model makes of them, against clean ones")
    sub.add_argument("degraded", type=folder, metavar="DEGRADED", help="a folder of images")
    sub.add_argument("clean", type=folder, metavar="CLEAN", help="a folder of clean images; data/README.md: which names pair")
    sub.add_argument("--weights", type=path, metavar="FILE", help="a model, as restore's: its results are judged as well")
    sub.add_argument("--luma", action="store_true", help="judge Y of YCbCr (BT.601) instead of RGB")
    sub.add_argument("--classical", action="store_true", help="non-local means as well, told nothing: it estimates the noise")
    sub.add_argument("--csv", type=path, metavar="OUT", help="a table of all images")

    sub = command(convert, "write a NAFNet's weights (.pth or safetensors) as tinycea's model.safetensors")
    sub.add_argument("weights", type=path, metavar="IN")
    sub.add_argument("-o", "--out", type=path, required=True, help="the model.safetensors to write")
    sub.add_argument("--local", type=natural, metavar="N", help="average locally (TLC), for training patches of N pixels a side")

    sub = command(degrade, "degrade a photograph")
    sub.add_argument("photo", type=path, metavar="PHOTO", help="an image file")
    sub.add_argument("-o", "--out", type=path, required=True, help="the image file to write, 8-bit RGB")
    sub.add_argument("--as", dest="names", required=True, metavar="NAMES", help="some of low, rain, snow, haze, blur, motion, "
                     "defocus, noise15, noise25, noise50, gray-noise, jpeg, joined by +; patchwork, stains, stains-overlapping")
    sub.add_argument("--seed", type=natural, default=0, help="of the degradation (default 0)")

    sub = command(demo, "restore a photograph with three degradations in three regions, and draw it")
    sub.add_argument("-o", "--out", type=png, default="demo.png", help="the picture to write, a .png (default demo.png)")

    sub = command(gradcheck, "hold every hand-written gradient against central differences")
    sub.add_argument("--json", action="store_true", help="print a list of rows as JSON")
    sub.add_argument("--backend", default="cpu", help="cpu, cuda or reference (default cpu)")
    sub.add_argument("--seed", type=natural, default=0, help="of inputs and directions (default 0)")

    sub = command(bench, "race against the same network in PyTorch, where that is installed (twelve minutes)")
    sub.add_argument("--json", action="store_true", help="print a list of rows as JSON")
    sub.add_argument("--quick", action="store_true", help="a few rows and rounds, in about a minute")
    sub.add_argument("--backend", default="cpu", choices=("cpu", "cuda"), help="cuda: the kernels, and PyTorch on the same GPU")
    return top


def number(convert, valid, expected):
    """An argparse type: `convert`, then refuse what is not `valid`."""
    def parse(text):
        with suppress(ValueError):
            if valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return parse


path = number(str, str.strip, "a path")
png = number(str, lambda name: name.lower().endswith(".png"), "the name of a .png file")
html = number(str, lambda name: name.lower().endswith(".html"), "the name of an .html file")
count = number(int, lambda n: n > 0, "a positive integer")
natural = number(int, lambda n: n >= 0, "an integer of at least 0")
# The same folder from wherever a run is resumed.
folder = number(lambda text: text.strip() and os.path.realpath(text), os.path.isdir, "a folder")
positive = number(float, lambda x: 0 < x < float("inf"), "a positive number")


# ---- the commands: each takes the parsed arguments; a failed check returns 1 -----------------------------------------

def given(args, *names):
    """The options that were typed."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def mechanism(args):
    from .lab import limits, mechanism
    limits.publish(args.test) if args.long else mechanism.publish(args.test, args.out)


def train(args):
    from .evaluation import format_table
    from .training import train
    options = given(args, "suite", "adapter", "steps", "seed", "backend", "images", "pairs")
    result = train(args.out, resume=args.resume, threads=args.threads, **options)
    print(format_table(result["rows"]))
    print("held-out photographs, {parameters} parameters, {seconds:.0f} s of training, peak memory {peak_memory_mb} MB; "
          "pictures and weights in {folder}".format_map(result))


def compare(args):
    from .lab import comparison
    quick = {"suites": ["aio5"], "adapters": ["wider", "cea"], "seeds": 1, "steps": [60]} if args.quick else {}
    recipes = comparison.grid(**quick | given(args, "suites", "adapters", "seeds", "steps", "rates", "images"))
    comparison.publish(comparison.compare(recipes, args.out, args.split, args.jobs, args.test), Path(args.out))


def restore(args):
    from .restoration import WEIGHTS, restore_files
    for target in restore_files(args.photos, args.out, args.weights or WEIGHTS, **given(args, "window", "threads", "megapixels")):
        print(target)


def explain(args):
    from .lab.explain import publish
    publish(args.photo, args.out, **given(args, "weights"))


def evaluate(args):
    from .lab.pairs import publish
    publish(args.degraded, args.clean, args.weights, args.luma, args.classical, args.csv)


def convert(args):
    from .zoo import load_model, save_model
    save_model(args.out, *load_model(args.weights, args.local))
    print(args.out)


def degrade(args):
    from .degradations import degrade
    from .images import as_rgb, read_pixels, write_image
    from .restoration import refuse_overwriting
    refuse_overwriting([args.photo], args.out)
    write_image(args.out, degrade(as_rgb(read_pixels(args.photo)), args.names, args.seed))
    print(args.out)


def demo(args):
    from .lab.demo import publish
    publish(args.out)


def gradcheck(args):
    from .cases import report
    start = time.perf_counter()
    rows = report(args.backend, args.seed)
    passed = sum(row["passed"] for row in rows)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{'pair':42s} {'worst argument':30s} {'analytic':>13s} {'numeric':>13s} {'rel. error':>10s} {'slope':>6s}")
        for row in rows:
            print(f"{row['name']:42s} {row['argument']:30s} {row['analytic']:13.6e} {row['numeric']:13.6e} "
                  f"{row['relative_error']:10.1e} {row['taylor_slope']:6.3f}  {row['verdict']}")
        print(f"{passed} of {len(rows)} passed in {time.perf_counter() - start:.1f} s, backend {args.backend}, seed {args.seed}")
    return int(passed < len(rows))


def bench(args):
    from .lab.bench import publish
    publish(args.backend, args.quick, args.json)


def main(argv=None):
    """Run the command line -> exit status: 0, 1 for a failed check, 2 for bad input."""
    try:
        args, unknown = parser().parse_known_args(None if argv is None else list(argv))
        if any(value == [] for value in vars(args).values()):             # what argparse makes of `--option=--`
            raise InputError("an option is given the value --, which is none")
        if unknown:
            args.parser.error(f"unknown argument {unknown[0]}")
        with ranks() as acting:
            return acting and args.run(args) or 0
    except BrokenPipeError:                   # the reader of our output has gone, as in `tinycea gradcheck | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError, MemoryError) as error:
        print(f"tinycea: {'out of memory ' * isinstance(error, MemoryError)}{error}", file=sys.stderr)
        return 2

