"""What a comparison's models do when something is changed that they were trained with: controls and open questions of the paper.

    python -m tinycea.lab.questions runs/headline > data/results/questions.txt

Reads runs.jsonl and models/ of `tinycea compare`, 1000 steps, and tests on the 96 x 96 crops of the test photographs. Minutes on
two cores.
"""
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from skimage.transform import resize
from skimage.util import random_noise

from ..degradations import apply, patchwork, suite
from ..evaluation import CROP, TEST_SEED, psnr, test_set
from ..nafnet import anatomies, centered
from ..ops import cpu
from ..runtime import machine
from ..scenes import Scene, crop, photographs
from ..training import recipe_for
from ..zoo import load_model
from .comparison import interval, model_path

SEEDS = 5
SHORT = ("wider", "static", "mlp", "descriptor", "cea")


def jpeg(scene, rng):
    """The image after JPEG of quality 15."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(255 * scene.image + 0.5)).save(file, "JPEG", quality=15)
    return np.asarray(Image.open(file), np.float32) / 255


UNSEEN = {"jpeg": jpeg, "salt and pepper": lambda scene, rng: np.float32(random_noise(scene.image, "s&p", rng=rng, amount=0.03))}


def models(suite_name, adapter):
    """The trained networks of all seeds."""
    return [load_model(model_path(recipe_for(adapter, suite=suite_name, seed=seed, steps=1000), FOLDER)) for seed in range(SEEDS)]


def restored(p, config, images, ops=cpu):
    """A batch of images of one size."""
    return np.clip(centered(images, p, config, ops, keep=False)[0], 0, 1)


def mean_psnr(outputs, cleans):
    """Mean over a batch, of each image's PSNR in dB."""
    return np.mean([psnr(a, b) for a, b in zip(outputs, cleans)])


def crops(entries, strength=1.0, draws=16):
    """(photograph, degraded (n,96,96,3), clean) of each test photograph and entry, degraded as in training."""
    def degrade(scene, entry, rng):
        return UNSEEN[entry](scene, rng) if entry in UNSEEN else apply(scene, entry, rng, strength)

    tests = test_set(tuple(entries), "test", "crops", draws, degrade)
    for i in range(0, len(tests), draws):
        _, photos, *images = zip(*tests[i:i + draws])
        yield photos[0], *map(np.stack, images)


def with_factors(change):
    """The CPU's ops, with the routing bases and residual directions of every CEA layer changed on their way to the tokens."""
    return SimpleNamespace(**vars(cpu) | {"assembly": lambda x, xhat, A, U: cpu.assembly(x, xhat, *change(A, U))})


def strongest(k):
    """Keep the k strongest components of M = A^T U, its singular value decomposition cut off."""
    def change(A, U):
        q_A, r_A = np.linalg.qr(A.swapaxes(1, 2))
        q_U, r_U = np.linalg.qr(U.swapaxes(1, 2))
        left, s, right = np.linalg.svd(r_A @ r_U.swapaxes(1, 2))
        s[:, k:] = 0
        return ((q_A @ left) * s[:, None]).swapaxes(1, 2), right @ q_U.swapaxes(1, 2)
    return change


def everyone(values):
    """All images get the batch's mean."""
    return np.broadcast_to(values.mean(0, keepdims=True), values.shape)


def controls(suite_name):
    """PSNR of CEA on crops, all entries of a photograph in one batch, with something changed: minus the PSNR as trained."""
    entries = suite(suite_name)
    photos = {}
    for photo, images, cleans in crops(entries, draws=80 // len(entries)):
        photos.setdefault(photo, []).append((images, cleans))
    changes = {"as trained": cpu, "A and U averaged over the crops": with_factors(lambda A, U: (everyone(A), everyone(U))),
               "A of the next crop": with_factors(lambda A, U: (np.roll(A, 1, 0), U)),
               "A and U of the next crop, same degradation": with_factors(lambda A, U: (np.roll(A, 1, 0), np.roll(U, 1, 0)))}
    if len(entries) > 1:
        step = 80 // len(entries)
        changes["A and U of another degradation"] = with_factors(lambda A, U: (np.roll(A, step, 0), np.roll(U, step, 0)))
    changes |= {f"the {k} strongest of 8 components": with_factors(strongest(k)) for k in (1, 2, 4)}
    table, energy = {name: np.zeros((SEEDS, len(photos))) for name in [*changes, "affinities averaged over the image"]}, []
    for seed, (p, config) in enumerate(models(suite_name, "cea")):
        for f, batches in enumerate(photos.values()):
            images, cleans = (np.concatenate(parts) for parts in zip(*batches))
            for name, ops in changes.items():
                table[name][seed, f] = mean_psnr(restored(p, config, images, ops), cleans)
            image_level = replace(config, adapter=replace(config.adapter, level="image"))
            table["affinities averaged over the image"][seed, f] = mean_psnr(restored(p, image_level, images), cleans)
            _, cache = centered(images, p, config)
            for anatomy in anatomies(cache).values():
                s = np.linalg.svd(anatomy["A"].swapaxes(1, 2) @ anatomy["U"], compute_uv=False)[:, :8]**2
                energy.append((s / s.sum(1, keepdims=True)).mean(0))
    print(f"\n{suite_name}: CEA on crops, PSNR in dB, mean of {SEEDS} seeds")
    base = table["as trained"]
    print(f"{'as trained':45s} {base.mean():6.2f}")
    for name, values in table.items():
        if name != "as trained":
            low, high = interval(values - base)
            print(f"{name:45s} {values.mean():6.2f}  {(values - base).mean():+.2f} [{low:+.2f}, {high:+.2f}]")
    share = np.mean(energy, 0)
    print("energy of the singular values of A^T U, largest first: " + " ".join(f"{x:.3f}" for x in share)
          + f"; effective rank {np.mean([np.exp(-np.sum(e * np.log(e + 1e-12))) for e in energy]):.2f} of 8")


def shifts(suite_name, kinds):
    """Degradations not shown in training: PSNR on crops of each adapter, minus CEA's. kinds: title -> (entries, strength)."""
    print(f"\ntrained on {suite_name}: PSNR in dB on crops, mean of {SEEDS} seeds, minus CEA's with a 95 % interval")
    networks = {adapter: models(suite_name, adapter) for adapter in SHORT}
    for title, (entries, strength) in kinds.items():
        tests = list(crops(entries, strength, draws=max(4, 24 // len(entries))))
        photos = [[pair for photo, *pair in tests if photo == name] for name in dict.fromkeys(photo for photo, *_ in tests)]
        values = {a: np.array([[np.mean([mean_psnr(restored(p, config, images), cleans) for images, cleans in pairs])
                                for pairs in photos] for p, config in runs]) for a, runs in networks.items()}
        before = np.mean([mean_psnr(images, cleans) for _, images, cleans in tests])
        print(f"{title:44s} degraded {before:5.2f}  cea {values['cea'].mean():5.2f}  " + "  ".join(
            "{} {:+.2f} [{:+.2f}, {:+.2f}]".format(a, (v - values["cea"]).mean(), *interval(v - values["cea"]))
            for a, v in values.items() if a != "cea"))


def sizes(suite_name, sides=(64, 128, 256, 512, 1024)):
    """The same photograph enlarged or reduced to several sizes, degraded there."""
    print(f"\ntrained on {suite_name} with patches of 48 x 48: astronaut at several sizes, PSNR in dB, mean of {SEEDS} seeds "
          "and all entries")
    astronaut = photographs("test")["astronaut"]
    entries = suite(suite_name)
    networks = {adapter: models(suite_name, adapter) for adapter in SHORT}
    for side in sides:
        clean = np.clip(resize(astronaut, (side, side), anti_aliasing=True), 0, 1).astype(np.float32)
        images = [apply(Scene(clean), entry, np.random.default_rng([TEST_SEED, side, *entry.encode()])) for entry in entries]
        print(f"{side:5d}  " + "  ".join(
            f"{a} {np.mean([[psnr(restored(p, c, image[None])[0], clean) for image in images] for p, c in runs]):.2f}"
            for a, runs in networks.items()))


def regions(split, draws=4):
    """(degraded, mask), both (n,96,96,3), of each photograph: noise, rain and blur in three regions; a pixel's share in each."""
    rng = np.random.default_rng(0)
    for image in photographs(split).values():
        pairs = [patchwork(crop(Scene(image), CROP, rng), rng, ("noise25", "rain", "blur"))[:2] for _ in range(draws)]
        yield tuple(map(np.stack, zip(*pairs)))


def accuracy(features, masks):
    """Share of tokens whose region a linear classifier names rightly; each photograph is left out of the training once.

    features (n,N,F) and masks (n,96,96,3) of each photograph; a token's region: the largest entry of the mask over its pixels.
    """
    side = round(features[0].shape[1]**0.5)
    labels = [m.reshape(-1, side, 96 // side, side, 96 // side, 3).mean((2, 4)).argmax(-1).reshape(len(m), -1) for m in masks]
    right = []
    for held in range(len(features)):
        x, y = (np.concatenate([np.concatenate(a) for f, a in enumerate(parts) if f != held]) for parts in (features, labels))
        mean, sd = x.mean(0), x.std(0) + 1e-12

        def extended(x):
            return np.concatenate(((x - mean) / sd, np.ones((*x.shape[:-1], 1))), -1)
        weights = np.linalg.lstsq(extended(x), np.eye(3)[y], rcond=None)[0]
        right.append(np.mean((extended(features[held]) @ weights).argmax(-1) == labels[held]))
    return np.mean(right)


def specialization():
    """How well one token's features tell which of three degradations its region has."""
    print("\npatchwork: accuracy of a linear classifier of three regions (noise, rain, blur) from the tokens of the last "
          "CEA layer, chance 0.33")
    images, masks = zip(*regions("test"))
    table = {}
    for p, config in models("patchwork", "cea"):
        layers = [list(anatomies(centered(batch, p, config)[1]).values())[-1] for batch in images]
        S, Xhat = ([layer[what] for layer in layers] for what in ("S", "tokens"))
        features = {"affinities S (8)": S, "features X̂ (24)": Xhat,
                    "8 random directions of X̂": [x @ np.random.default_rng(1).normal(size=(24, 8)) for x in Xhat]}
        for what, values in features.items():
            table.setdefault(what, []).append(accuracy(values, masks))
    for what, accuracies in table.items():
        print(f"{what:28s} {np.mean(accuracies):.3f}  seeds {min(accuracies):.3f} to {max(accuracies):.3f}")


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/headline")        # what `models` reads
    print(f"python -m tinycea.lab.questions {FOLDER}; {machine()}")
    for suite_name in ("aio5", "patchwork"):
        controls(suite_name)
    shifts("aio5", {"as trained": (["noise25", "rain", "haze", "blur", "low"], 1.0),
                    "compositions of two": (["low+noise25", "haze+rain", "low+haze", "rain+noise25", "haze+noise25"], 1.0),
                    "half strength": (["noise25", "rain", "haze", "blur", "low"], 0.5),
                    "one and a half": (["noise25", "rain", "haze", "blur", "low"], 1.5),
                    "twice": (["noise25", "rain", "haze", "blur", "low"], 2.0),
                    "snow, never seen": (["snow"], 1.0),
                    "noise of 50, never seen": (["noise50"], 1.0), "JPEG of quality 15, never seen": (["jpeg"], 1.0),
                    "salt and pepper, 3 %, never seen": (["salt and pepper"], 1.0)})
    sizes("aio5")
    specialization()
