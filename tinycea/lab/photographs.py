"""Fetch the free photographs that the shipped weights and the longer experiments are taught on, from seven Debian packages.

`python -m tinycea.lab.photographs FOLDER [PACKAGE or DEB ...]` downloads them with apt-get (or takes .deb files that are already
here), picks the photographs below, halves each until its longer side has at most 1,400 pixels, which removes JPEG blocks and
sensor noise, and writes PNG files; without a name those of the first four packages, 37. All are in Debian 13. Authors and free
licenses: usr/share/doc/PACKAGE/copyright in each package. Nothing is committed.
"""
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ..images import as_rgb, read_pixels, write_image
from ..runtime import make_folder
from ..scenes import halve

LARGEST = 1400                                # pixels of the longer side
PACKAGES = {                                  # name -> patterns of the photographs below usr/share
    "lomiri-wallpapers-16.04": ["backgrounds/[!au]*.jpg", "backgrounds/aitzgorri*.jpg"],      # not analogpattern, not umang
    "lomiri-wallpapers-20.04": ["backgrounds/Kleiber*.jpg"],
    "mate-backgrounds": ["backgrounds/mate/nature/*.jpg"],
    "plasma-workspace-wallpapers": [f"wallpapers/{name}/contents/images/2560x1600.jpg" for name in (
        "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite", "OneStandsOut",
        "Path", "summer_1am")],
    "budgie-backgrounds": ["backgrounds/budgie/[!osvw]*.jpg", "backgrounds/budgie/oakland*.jpg", "backgrounds/budgie/si*.jpg"],
    "lxqt-themes": [f"lxqt/wallpapers/{name}*g" for name in (     # .jpg or .png
        "[BV]", "a", "beam", "butterfly", "cloud", "drop", "flowers", "fog", "this")],
    "palapeli-data": ["palapeli/collection/*.jpg"]}


def fetch(folder, sources=()):
    """Write the photographs of packages or .deb files into a folder; yields each one's name."""
    make_folder(folder)
    with TemporaryDirectory() as place:
        if names := [source for source in sources or list(PACKAGES)[:4] if source in PACKAGES]:
            subprocess.run(["apt-get", "download", *names], cwd=place, check=True)
        for deb in [*(source for source in sources if source not in PACKAGES), *sorted(Path(place).glob("*.deb"))]:
            package = Path(deb).name.split("_")[0]
            unpacked = Path(place) / package
            subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True)
            for file in sorted(file for pattern in PACKAGES[package] for file in (unpacked / "usr/share").glob(pattern)):
                pixels = as_rgb(read_pixels(file))
                while max(pixels.shape) > LARGEST:
                    pixels = halve(pixels)
                name = file.parts[-4] if file.stem[0].isdigit() else file.stem      # Plasma names the folder, not the file
                write_image(Path(folder) / f"{name}.png", pixels)
                yield name


if __name__ == "__main__":
    print(*fetch(sys.argv[1], sys.argv[2:]), "written", sep="\n")
