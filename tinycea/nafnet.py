"""The backbone: NAFNet (Chen et al. 2022), name for name, with adapter slots after its stages and a pixel-unshuffled input.

With `adapter=None, unshuffle=1` this IS NAFNet. Two choices are ours: `unshuffle=2` feeds 2 x 2 pixels as channels and shuffles
the result back (FFDNet, Zhang et al. 2018: a quarter of the tokens), and an adapter may follow any stage.
"""
import math
from dataclasses import dataclass

import numpy as np

from . import ablations, cea
from .ablations import CEAConfig
from .adapters import FAMILIES, family
from .ops import cpu
from .params import Params, accumulate, under
from .runtime import InputError

LIMITS = {"width": (1, 1024), "encoders": (0, 100), "middle": (0, 100), "decoders": (0, 100), "unshuffle": (1, 8),
          "local": (0, 2**20), "told": (0, 64), "spare": (0, 200)}
PARAMETERS = 2**28                            # of a network, at most


@dataclass(frozen=True)
class NAFNetConfig:
    """The network's shape; InputError where it makes no sense. The default is the toy model: 74 thousand parameters.

    width: channels of the first stage, doubled by each down step. encoders, decoders: blocks per stage. middle: blocks between.
    unshuffle: 1 (NAFNet) or the factor of the pixel unshuffle. adapter: a configuration of one of `adapters.FAMILIES`, or None.
    slots: stages followed by an adapter ("encoders.0", "middle_blks", ...); None means all.
    sca: whether NAFBlocks keep their channel attention, which is itself an image-wide descriptor.
    centered: whether `centered` feeds colors in [-1,1], as tinycea trains, or in [0,1], as NAFNet.
    local: SCA averages over windows of 1.5 times so many pixels instead of the whole image (test-time local converter, TLC, of
    Chu et al. 2021; forward only): those of the training patches. 0: the whole image.
    told: channels of a label behind an image's colors, from which every stage gets a scale and a shift per channel and pixel: a
    network that is told what others must recognize, see `told` in lab/comparison.
    spare: `restoration.restore` returns an image as it came if it would change it so little that result and image are at least so
    many dB (PSNR) apart: such changes are hardly seen, and too often wrong. 0: never.
    """
    width: int = 24
    encoders: tuple = (1,)
    middle: int = 2
    decoders: tuple = (1,)
    unshuffle: int = 2
    adapter: object = CEAConfig()
    slots: tuple | None = None
    sca: bool = True
    centered: bool = True
    local: int = 0
    told: int = 0
    spare: int = 0

    def __post_init__(self):
        if self.adapter is not None and family(self.adapter) is None:
            raise InputError(f"adapter is {self.adapter!r}: expected None or a configuration of {', '.join(FAMILIES)}")
        for name, kind in {"sca": bool, "centered": bool, "encoders": tuple, "decoders": tuple}.items():
            if not isinstance(value := getattr(self, name), kind):
                expected = "true or false" if kind is bool else "blocks per stage, as in 1+1"
                raise InputError(f"{name} is {value!r}: expected {expected}")
        for name, (low, high) in LIMITS.items():
            for n in values if isinstance(values := getattr(self, name), tuple) else [values]:
                if type(n) is not int or not low <= n <= high:
                    raise InputError(f"{name} is {values!r}: expected integers from {low} to {high}")
        if len(self.encoders) != len(self.decoders):
            raise InputError(f"encoders has {len(self.encoders)} stages and decoders {len(self.decoders)}: expected as many")
        for slot in self.slots or ():
            if slot not in self.stages():
                raise InputError(f"slot {slot!r} is no stage: choose among {', '.join(self.stages())}")

    def stages(self):
        """Stage name -> (channels, blocks), in the order of the forward pass."""
        down = {f"encoders.{i}": (self.width * 2**i, n) for i, n in enumerate(self.encoders)}
        middle = {"middle_blks": (self.width * 2**len(self.encoders), self.middle)}
        up = {f"decoders.{i}": (self.width * 2**(len(self.encoders) - 1 - i), n) for i, n in enumerate(self.decoders)}
        return down | middle | up

    def adapted(self):
        """Names of the stages that an adapter follows, in the order of the forward pass."""
        return () if self.adapter is None else tuple(s for s in self.stages() if self.slots is None or s in self.slots)

    def window(self, stage):
        """Places a side that SCA averages over in a stage, 0 for all: 1.5 times the training patch's, at the stage's scale."""
        side = self.local * self.width // (self.unshuffle * self.stages()[stage][0])
        return side * (3 * self.local // 2) // self.local if self.local else 0

    def multiple(self):
        """Height and width are padded to a multiple of this many pixels."""
        return self.unshuffle * 2**len(self.encoders)


# ---- parameters ------------------------------------------------------------------------------------------------------

def _conv(name, I, O, k=1, bias=True):
    return {f"{name}.weight": (O, I, k, k)} | ({f"{name}.bias": (O,)} if bias else {})


def block_shapes(C, sca=True):
    """Names and shapes of one NAFBlock on C channels, in PyTorch's layout, with or without channel attention."""
    norms = {f"norm{i}.{name}": (C,) for i in (1, 2) for name in ("weight", "bias")}
    return ({"beta": (1, C, 1, 1), "gamma": (1, C, 1, 1)} | norms
            | _conv("conv1", C, 2 * C) | _conv("conv2", 1, 2 * C, 3) | _conv("conv3", C, C)
            | (_conv("sca.1", C, C) if sca else {})
            | _conv("conv4", C, 2 * C) | _conv("conv5", C, C))


def shapes(config):
    """Names and shapes of the whole network: NAFNet's own names, the adapters below "adapters." and their stage's name.

    InputError for more than PARAMETERS of them.
    """
    c, image = config.width, 3 * config.unshuffle**2
    result = _conv("intro", image, c, 3) | _conv("ending", c, image, 3)
    for i in range(len(config.encoders)):
        deep = config.width * 2**(i + 1)
        result |= _conv(f"downs.{i}", deep // 2, deep, 2)
        result |= _conv(f"ups.{len(config.encoders) - 1 - i}.0", deep, 2 * deep, bias=False)
    for name, (C, blocks) in config.stages().items():
        result |= {f"{name}.{j}.{key}": shape for j in range(blocks) for key, shape in block_shapes(C, config.sca).items()}
        if config.told:
            result[f"told.{name}.weight"] = (config.told, 2 * C)
        if name in config.adapted():
            result |= {f"adapters.{name}.{key}": shape for key, shape in family(config.adapter).shapes(C, config.adapter).items()}
    if (count := sum(map(math.prod, result.values()))) > PARAMETERS:
        raise InputError(f"the network would have {count} parameters: expected at most {PARAMETERS}")
    return result


def init(config, rng, dtype=np.float32):
    """Fresh parameters: convolutions uniform in +-1/sqrt(fan-in) (PyTorch's default), norms 1 and 0, beta and gamma 0."""
    p = Params(shapes(config), dtype)
    for name, value in p.items():
        if "norm" in name:
            value[...] = name.endswith("weight")
        elif name.endswith("weight") and not name.startswith("told"):
            bound = value[0].size**-0.5
            value[...] = rng.uniform(-bound, bound, value.shape)
            if name[:-6] + "bias" in p:
                p[name[:-6] + "bias"][...] = rng.uniform(-bound, bound, len(value))
    for stage in config.adapted():
        cea.init(under(p, f"adapters.{stage}"), rng)
    return p


# ---- one block -------------------------------------------------------------------------------------------------------

def nafblock(x, p, ops=cpu, keep=True, local=0):
    """y = x + beta conv3(SCA(SG(conv2(conv1(LN x))))), then y + gamma conv5(SG(conv4(LN y))). x (B,H,W,C) -> (B,H,W,C), cache.

    SG is the simple gate, SCA the channel attention: a factor per channel, conv1x1 of the means; none where p has no sca.1.
    local: the means are of windows of so many places a side, and the block has no backward; 0: of the image.
    """
    caches, layer = _layers(keep)
    u = layer("conv1", ops.norm_conv1x1(x, p["norm1.weight"], p["norm1.bias"], p["conv1.weight"], p["conv1.bias"]))
    u = layer("conv2", ops.gated_depthwise3x3(u, p["conv2.weight"], p["conv2.bias"]))
    if "sca.1.weight" in p:
        s = local_average(u, local) if 0 < local < max(u.shape[1:3]) else layer("pool", ops.global_average_pool(u))
        s = layer("sca.1", ops.conv1x1(s, p["sca.1.weight"], p["sca.1.bias"]))
        u = layer("sca", ops.scale_channels(u, s)) if s.shape[1:3] == (1, 1) else u * s
    y = x + layer("conv3", scaled_conv1x1(u, p["conv3.weight"], p["conv3.bias"], p["beta"], ops))
    u = layer("conv4", ops.norm_conv1x1(y, p["norm2.weight"], p["norm2.bias"], p["conv4.weight"], p["conv4.bias"]))
    u = layer("sg", ops.simple_gate(u))
    z = y + layer("conv5", scaled_conv1x1(u, p["conv5.weight"], p["conv5.bias"], p["gamma"], ops))
    return z, (caches, ops)


def nafblock_backward(dz, cache, g):
    """dx, and every parameter's gradient added into g: the forward read from the bottom up."""
    c, ops = cache
    du = accumulate(g, scaled_conv1x1_backward(dz, c["conv5"], ops), "conv5.weight", "conv5.bias", "gamma")
    du = ops.simple_gate_backward(du, c["sg"])
    dy = dz + accumulate(g, ops.norm_conv1x1_backward(du, c["conv4"]), "norm2.weight", "norm2.bias", "conv4.weight", "conv4.bias")
    du = accumulate(g, scaled_conv1x1_backward(dy, c["conv3"], ops), "conv3.weight", "conv3.bias", "beta")
    if "sca" in c:
        du, ds = ops.scale_channels_backward(du, c["sca"])
        ds = accumulate(g, ops.conv1x1_backward(ds, c["sca.1"]), "sca.1.weight", "sca.1.bias")
        du = du + ops.global_average_pool_backward(ds, c["pool"])
    du = accumulate(g, ops.gated_depthwise3x3_backward(du, c["conv2"]), "conv2.weight", "conv2.bias")
    dx = accumulate(g, ops.norm_conv1x1_backward(du, c["conv1"]), "norm1.weight", "norm1.bias", "conv1.weight", "conv1.bias")
    return dy + dx


def local_average(x, size):
    """Means of x (B,H,W,C) over windows of size x size places, moved over the image and kept inside it: differences of sums."""
    for axis in (1, 2):
        n, k = x.shape[axis], min(size, x.shape[axis])
        sums = np.insert(np.cumsum(x, axis, dtype=np.float64), 0, 0, axis)
        start = np.clip(np.arange(n) - (k - 1) // 2, 0, n - k)
        x = ((sums.take(start + k, axis) - sums.take(start, axis)) / k).astype(x.dtype)
    return x


def scaled_conv1x1(x, weight, bias, scale, ops):
    """y = s (W x + b) = (s W) x + s b, a factor per channel (NAFNet's beta and gamma): folded into the small matrix, which is
    5 % of a training step faster than to scale the features."""
    s = scale.reshape(-1, 1, 1, 1)
    y, cache = ops.conv1x1(x, s * weight, s.ravel() * bias)
    return y, (cache, weight, bias, s)


def scaled_conv1x1_backward(dy, cache, ops):
    """dx, dW = s d(sW), db = s d(sb), and ds = their products with W and b, summed per channel."""
    cache, weight, bias, s = cache
    dx, dsW, dsb = ops.conv1x1_backward(dy, cache)
    return dx, s * dsW, s.ravel() * dsb, (dsW * weight).sum((1, 2, 3)) + dsb * bias


def _layers(keep):
    """A dict of caches, and a function that hands on a layer's output and puts its cache away under its name (if keep)."""
    caches = {}

    def layer(name, result):
        y, cache = result
        if keep:
            caches[name] = cache
        return y
    return caches, layer


# ---- the network -----------------------------------------------------------------------------------------------------

def nafnet(image, p, config, ops=cpu, keep=True):
    """Restore a batch of images (B,H,W,3), any size from 1 x 1 up -> same shape, cache. keep=False drops the caches as it goes.

    A network that is told takes (B,H,W,3+told). InputError for anything but floats of that shape.
    """
    _check(image, 3 + config.told)
    H, W = image.shape[1:3]
    caches, layer = _layers(keep)
    image, label = (padded := _pad(image, config))[..., :3], padded[..., 3:]
    x = layer("unshuffle", ops.pixel_unshuffle(image, config.unshuffle))
    y = layer("intro", ops.conv3x3(x, p["intro.weight"], p["intro.bias"]))
    skips = []
    for i in range(len(config.encoders)):
        y = layer(f"encoders.{i}", _stage(y, label, p, f"encoders.{i}", config, ops, keep))
        skips.append(y)
        y = layer(f"downs.{i}", ops.down2x2(y, p[f"downs.{i}.weight"], p[f"downs.{i}.bias"]))
    y = layer("middle_blks", _stage(y, label, p, "middle_blks", config, ops, keep))
    for i in range(len(config.decoders)):
        y = layer(f"ups.{i}.0", ops.conv1x1(y, p[f"ups.{i}.0.weight"]))
        y = layer(f"ups.{i}.1", ops.pixel_shuffle(y)) + skips.pop()
        y = layer(f"decoders.{i}", _stage(y, label, p, f"decoders.{i}", config, ops, keep))
    y = layer("ending", ops.conv3x3(y, p["ending.weight"], p["ending.bias"])) + x
    y = layer("shuffle", ops.pixel_shuffle(y, config.unshuffle))
    return y[:, :H, :W], (caches, config, ops)


def nafnet_backward(dy, cache, g):
    """dL/dimage, and every parameter's gradient added into g: the forward read from the bottom up."""
    caches, config, ops = cache
    H, W = dy.shape[1:3]
    dx = ops.pixel_shuffle_backward(_pad(dy, config), caches["shuffle"])
    dy = accumulate(g, ops.conv3x3_backward(dx, caches["ending"]), "ending.weight", "ending.bias")
    dskips = []
    for i in reversed(range(len(config.decoders))):
        dy = _stage_backward(dy, caches[f"decoders.{i}"], g, f"decoders.{i}")
        dskips.append(dy)
        dy = ops.pixel_shuffle_backward(dy, caches[f"ups.{i}.1"])
        dy = accumulate(g, ops.conv1x1_backward(dy, caches[f"ups.{i}.0"]), f"ups.{i}.0.weight")
    dy = _stage_backward(dy, caches["middle_blks"], g, "middle_blks")
    for i in reversed(range(len(config.encoders))):
        dy = dskips.pop() + accumulate(g, ops.down2x2_backward(dy, caches[f"downs.{i}"]), f"downs.{i}.weight", f"downs.{i}.bias")
        dy = _stage_backward(dy, caches[f"encoders.{i}"], g, f"encoders.{i}")
    dx = dx + accumulate(g, ops.conv3x3_backward(dy, caches["intro"]), "intro.weight", "intro.bias")
    return ops.pixel_unshuffle_backward(dx, caches["unshuffle"])[:, :H, :W]


def centered(image, p, config, ops=cpu, keep=True):
    """`nafnet` on colors in [-1,1]: images (B,H,W,3) in [0,1] in and out, 2x - 1 to the network, (y + 1)/2 from it.

    Our choice for training and restoring: the network learns faster from inputs around zero, and zero padding is a middle gray.
    """
    if not config.centered:
        return nafnet(image, p, config, ops, keep)
    y, cache = nafnet(2 * image - 1, p, config, ops, keep)
    return (y + 1) / 2, cache


def centered_backward(dy, cache, g):
    """The factors 1/2 and 2 cancel for the image; the parameters see half of dy."""
    if not cache[1].centered:
        return nafnet_backward(dy, cache, g)
    return 2 * nafnet_backward(dy / 2, cache, g)


def anatomies(cache):
    """What each CEA layer of a forward pass (with keep=True) wrote: stage -> its `ablations.anatomy`."""
    caches, config, _ = cache
    return {stage: ablations.anatomy(caches[stage][-2]) for stage in config.adapted()}


def _pad(image, config):
    """Zeros at the bottom and the right, up to a multiple that the down steps can halve (as NAFNet)."""
    m = config.multiple()
    return np.pad(image, ((0, 0), (0, -image.shape[1] % m), (0, -image.shape[2] % m), (0, 0)))


def _stage(x, label, p, name, config, ops, keep):
    """The blocks of one stage; x + x γ + β with (γ, β) = label W, if it is told; then its adapter if it has one."""
    caches, told, adapter = [], None, None
    for j in range(config.stages()[name][1]):
        x, cache = nafblock(x, under(p, f"{name}.{j}"), ops, keep, config.window(name))
        caches.append(cache)
    if config.told:
        B, h, w, C = x.shape
        means = label.reshape(B, h, label.shape[1] // h, w, label.shape[2] // w, -1).mean((2, 4))
        film, cache = ops.linear(means, p[f"told.{name}.weight"])
        told = cache, film, x, ops
        x = x + x * film[..., :C] + film[..., C:]
    if name in config.adapted():
        x, adapter = family(config.adapter).forward(x, under(p, f"adapters.{name}"), config.adapter, ops)
    return x, (caches, told, adapter, config)


def _stage_backward(dx, cache, g, name):
    caches, told, adapter, config = cache
    if adapter is not None:
        dx = family(config.adapter).backward(dx, adapter, under(g, f"adapters.{name}"))
    if told:
        cache, film, x, ops = told
        accumulate(g, ops.linear_backward(np.concatenate((dx * x, dx), -1), cache), f"told.{name}.weight")
        dx = dx + dx * film[..., :x.shape[-1]]
    for j in reversed(range(len(caches))):
        dx = nafblock_backward(dx, caches[j], under(g, f"{name}.{j}"))
    return dx


def _check(image, channels):
    if getattr(image, "ndim", None) != 4 or image.shape[-1] != channels or 0 in image.shape or image.dtype.kind != "f":
        kind, shape = getattr(image, "dtype", type(image)), getattr(image, "shape", "")
        raise InputError(f"image is {kind} {shape}: expected floats (B,H,W,{channels})")
