"""Restoring photographs of so many megapixels: seconds per megapixel, peak memory; then the seams of windows on smooth skies.

    python data/sizes.py 1 12 48 100          # data/sizes.sh
"""
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path


def photograph(megapixels):
    """A built-in photograph, enlarged, (2n,3n,3) in [0,1], with noise of strength 15/255."""
    import numpy as np
    from scipy.ndimage import zoom
    from skimage import data
    n = round((megapixels * 1e6 / 6)**0.5)
    rng, photo = np.random.default_rng(0), data.rocket() / np.float32(255)
    large = zoom(photo, (2 * n / photo.shape[0], 3 * n / photo.shape[1], 1), order=1)
    for rows in np.array_split(large, 16):
        rows += rng.normal(0, 15 / 255, rows.shape)
    return large.clip(0, 1, out=large)


def make(megapixels, path):
    import numpy as np

    from tinycea.images import write_image
    write_image(path, photograph(float(megapixels)), np.dtype(np.uint8))


def growth(sizes):
    """Each photograph is restored by the command, reading and writing included. This process stays small: a child's
    peak is at least its parent's."""
    print(f"{'megapixels':>10s} {'seconds':>8s} {'s/megapixel':>11s} {'peak MB':>8s}")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            paths = Path(folder) / "photo.jpg", Path(folder) / "restored.jpg"
            subprocess.run([sys.executable, __file__, "make", size, paths[0]], check=True)
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "tinycea", "restore", paths[0], "-o", paths[1]],
                                       stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"restoring {size} megapixels failed")
            seconds, unit = time.perf_counter() - start, 2**20 if sys.platform == "darwin" else 2**10
            print(f"{size:>10s} {seconds:8.1f} {seconds / float(size):11.3f} {usage.ru_maxrss / unit:8.0f}", flush=True)


def seams():
    """The largest step from one side of an overlap to the other, of means over 16 x 16 pixels, in levels of 255; PSNR of
    windows against the whole."""
    import numpy as np
    from scipy.ndimage import uniform_filter

    from tinycea import restore
    from tinycea.restoration import OVERLAP, WINDOW, windows
    from tinycea.runtime import machine
    height, width = 1200, 1800
    fade = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    sky = np.array([0.45, 0.6, 0.85], np.float32) * (1 - fade) + np.array([0.8, 0.87, 0.95], np.float32) * fade
    sky = np.broadcast_to(sky, (height, width, 3)) + np.random.default_rng(0).normal(0, 0.01, (height, width, 3))
    starts = [[start for start, _ in windows(n, WINDOW)[1:]] for n in (height, width)]

    def largest(image):
        means = uniform_filter(image, (16, 16, 0))
        return 255 * max(np.abs(means.take(s + OVERLAP, axis) - means.take(s, axis)).max()
                         for axis in (0, 1) for s in starts[axis])
    print(f"\n{'':20s} {'in the input':>13s} {'whole':>13s} {'windows':>13s} {'their difference':>17s} {'PSNR':>9s}")
    for name, image in (("smooth sky", sky.clip(0, 1).astype(np.float32)), ("rocket, enlarged", photograph(2.16))):
        cut, whole = restore(image), restore(image, window=0)
        steps = [largest(x) for x in (image, whole, cut, cut - whole)]
        print(f"{name:20s} {steps[0]:13.2f} {steps[1]:13.2f} {steps[2]:13.2f} {steps[3]:17.2f} "
              f"{-10 * np.log10(np.mean((cut - whole)**2)):6.2f} dB", flush=True)
    print(f"levels of 255; {machine()}; {date.today()}")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(*sys.argv[2:])
    else:
        growth(sys.argv[1:])
        seams()
