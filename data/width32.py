"""NAFNet of width 32 with 29 million parameters at 512 and 2048 pixels a side, two threads: tinycea beside PyTorch.

`python data/width32.py [ROUNDS] > data/results/width32.txt`. Every measurement is a fresh process: random weights, a warm-up on
256 x 256 pixels, one timed run; the sides take turns.
"""
import json
import os
import subprocess
import sys
import time

import numpy as np

SEED = 0
SIDES = ("tinycea, whole", "tinycea, windows of 512", "PyTorch", "PyTorch channels_last")


def measure(side, size):
    """One run in this process -> seconds, peak memory in MB, and sixteen of the result's numbers."""
    from tinycea.nafnet import NAFNetConfig, init
    from tinycea.restoration import restore
    from tinycea.runtime import peak_memory
    config = NAFNetConfig(32, (2, 2, 4, 8), 12, (2, 2, 2, 2), unshuffle=1, adapter=None, centered=False)
    p = init(config, np.random.default_rng(SEED))
    for name, value in p.items():
        if name.endswith(("beta", "gamma")):
            value[...] = 0.1                  # else the blocks are skipped
    images = [np.random.default_rng(SEED).random((n, n, 3), np.float32) for n in (256, size)]
    if side.startswith("tinycea"):
        def run(image):
            return restore(image, (p, config), 0 if side.endswith("whole") else 512, 2)
    else:
        import torch

        from tinycea.lab.twin import NAFNet
        torch.set_num_threads(2)
        layout = torch.channels_last if side.endswith("last") else torch.contiguous_format
        net = NAFNet(config)
        net.load_state_dict({name: torch.tensor(value) for name, value in p.items()})
        net.to(memory_format=layout)

        def run(image):
            with torch.inference_mode():
                y = net(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).contiguous(memory_format=layout))
            return y[0].clamp(0, 1).permute(1, 2, 0).numpy()
    run(images[0])
    start = time.perf_counter()
    y = run(images[1])
    return time.perf_counter() - start, peak_memory(), y[100, 100:116, 0].tolist()


def ask(side, size):
    threads = "1" if "windows" in side else "2"           # windows are threads themselves; a whole image leaves them to BLAS
    found = subprocess.run([sys.executable, __file__, side, str(size)], env=os.environ | {"OPENBLAS_NUM_THREADS": threads},
                           capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


if __name__ == "__main__":
    if sys.argv[2:]:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        sys.exit()
    from importlib.metadata import version

    from tinycea.runtime import machine
    rounds = int(sys.argv[1]) if sys.argv[1:] else 5
    print(f"NAFNet width 32, blocks [2,2,4,8]/12/[2,2,2,2], random weights, seed {SEED}; two threads, {rounds} rounds; "
          f"{machine()}; numpy {version('numpy')}, torch {version('torch')}; load of the machine before {os.getloadavg()[0]:.1f}")
    print(f"{'':12s} {'':24s} {'seconds, median (least)':>24s} {'peak memory':>12s}")
    for size in (512, 2048):
        runs = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                runs[side].append(ask(side, size))
        for side, found in runs.items():
            seconds, memory, numbers = zip(*found)
            print(f"{size} x {size:4d}  {side:24s} {np.median(seconds):16.2f} ({min(seconds):.2f}) {max(memory):9d} MB",
                  flush=True)
        off = max(abs(np.subtract(found[0][2], runs["PyTorch"][0][2])).max() for found in runs.values())
        print(f"{size} x {size:4d}  largest difference from PyTorch in a row of 16 pixels {off:.1e}")
    print(f"load of the machine after {os.getloadavg()[0]:.1f}")
