"""The microscope: a photograph restored, and what each component of each CEA layer did to it, in one page. `tinycea explain`.

How far such maps may be believed: notebooks/06_what_the_maps_say.
"""
import base64
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import PIL.Image
from scipy.stats import entropy

from ..ablations import CEAConfig
from ..images import as_rgb, read_pixels
from ..nafnet import anatomies, centered
from ..ops import cpu
from ..restoration import refuse_overwriting, restore_rgb
from ..runtime import InputError, atomic
from ..zoo import WEIGHTS, load_model

SIDE = 512                                    # pixels of the photograph's longer side, at most


def rank(added):
    """Effective rank of what is added to the tokens (B,N,C) of an image: the exponential of the entropy of its energies."""
    return np.exp(entropy(np.linalg.eigvalsh(np.einsum("bni,bnj->bij", added, added, dtype=float)).clip(1e-30), axis=1)).mean()


def publish(photo, out, weights=WEIGHTS):
    """Write the page `out` on what a model file makes of a photograph; InputError where there is nothing to show."""
    refuse_overwriting([photo, weights], out)
    model = load_model(weights)
    if not isinstance(model.config.adapter, CEAConfig) or not model.config.adapted():
        raise InputError(f"{weights}: this network has no CEA layer to look into")
    pixels, m = read_pixels(photo), model.config.multiple()
    small = PIL.Image.fromarray(np.rint(255 * as_rgb(pixels)).astype(np.uint8))
    small.thumbnail((SIDE, SIDE))
    if min(small.size) < m:
        raise InputError(f"{photo}: reduced to {small.width} x {small.height} pixels, expected at least {m} a side")
    image = as_rgb(np.asarray(small)[:small.height // m * m, :small.width // m * m])
    found = {"name": Path(photo).name, "file": pixels.shape[1::-1], "size": image.shape[1::-1]} | explained(image, *model)
    page = Path(__file__).with_suffix(".html").read_text("utf-8").replace("DATA", json.dumps(found).replace("<", "\\u003c"))
    with atomic(out) as temporary:
        temporary.write_text(page, "utf-8")
    print(out)


def explained(image, p, config):
    """What the page shows of an image (H,W,3) in [0,1], both sides multiples of config.multiple(): pictures as data URLs."""
    restored, found = restore_rgb(image, p, config), anatomies(centered(image[None], p, config)[1])
    R, layers = config.adapter.rank, []
    with ThreadPoolExecutor() as executor:
        off = executor.map(lambda which: restore_rgb(image, p, config, silenced(*which)), product(range(len(found)), range(R)))
    for (stage, t), without in zip(found.items(), np.split(np.array(list(off)), len(found))):
        side = round((image[..., 0].size / t["S"].shape[1])**0.5)               # of a token, in pixels
        S = t["S"][0].T.reshape(-1, image.shape[1] // side)                     # R maps, one below the other
        P = S * 0 if t["P"] is None else t["P"][0].mean(0).reshape(S.shape)
        most, peak = (float(abs(m).max()) or 1.0 for m in (S, P))
        layers.append({
            "stage": stage, "side": side, "rank": [float(rank(t[name])) for name in "AU"], "U": (t["U"][0] * R**-0.5).tolist(),
            "most": most, "S": url((128 + 127 * S / most) / 255, ".png"), "P": url((P / peak)**0.5, ".png"),
            "changes": [url((128 + 127 * change) / 255) for change in without - restored],
            "moved": (((without - restored)**2).mean((1, 2, 3))**0.5).tolist()})
    return {"degraded": url(image), "restored": url(restored), "layers": layers}


def silenced(layer, r):
    """The CPU's ops, but component r adds nothing in one CEA layer, the layers counted from 0 as the forward pass meets them."""
    calls = count()

    def without(op):
        return lambda x, *AU: op(x, *AU[:-1], AU[-1] * ((np.arange(AU[-1].shape[1]) != r) | (next(calls) != layer))[:, None])
    return SimpleNamespace(**vars(cpu) | {name: without(getattr(cpu, name)) for name in ("assembly", "combine")})


def url(image, extension=".webp"):
    """An image in [0,1] as the data URL of an 8-bit file; WebP of quality 80."""
    data = iio.imwrite("<bytes>", np.rint(255 * image).astype(np.uint8), extension=extension, plugin="pillow", quality=80)
    return f"data:image/{extension[1:]};base64,{base64.b64encode(data).decode()}"
