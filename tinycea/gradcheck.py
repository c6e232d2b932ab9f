"""Gradients held against finite differences: `check` for any forward/backward pair, `cases` for all of tinycea's own.

Both are measured on the scalar L(y) = <w, y> + |y|^2 / 2 with w random: its upstream gradient w + y is random (under ones a
softmax has gradient zero), and even a linear op has a second-order term, so that its Taylor remainder is seen to fall as h^2.
Both criteria, and what each of them misses: notebooks/04_gradient_checking.
"""
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np

from . import adapters, cea, nafnet
from .adapters import FAMILIES, DescriptorConfig, ExpertsConfig, MLPConfig, PromptConfig
from .cea import CEAConfig
from .nafnet import NAFNetConfig
from .ops import backend

STEP = 1e-4                                   # of the central difference, along a direction of length 1, in float64
TAYLOR_STEPS = STEP * 2.0**np.arange(4, 0, -1)
TINY = 600                                    # up to this many entries (outputs times inputs) the whole Jacobian is compared


@dataclass(frozen=True)
class Row:
    """One argument's verdict; analytic and numeric are the directional derivatives that differ most."""
    argument: str
    method: str
    analytic: float
    numeric: float
    relative_error: float
    taylor_slope: float
    seed: int
    passed: bool


def check(forward, backward, inputs, seed=0, directions=4, tolerance=1e-6, slope=1.95):
    """Hold a hand-written backward against central differences, one argument at a time -> list of Row.

    forward(*arrays) -> (y, cache); backward(dy, cache) -> one gradient per argument, in order (a lone array for a lone argument).
    inputs: dict, argument name -> float64 array. Each argument x is moved on its own along random unit directions v. It passes when
    the derivatives <dL/dx, v> along all of them have a relative error |analytic - numeric| / max(|analytic|, |numeric|) of at most
    `tolerance`, and the Taylor remainder |L(x + h v) - L(x) - h <dL/dx, v>| falls at least as h^slope. Where outputs times inputs
    are few, the whole Jacobian is held to the same tolerance. Raises ValueError for a wrong count or shape of gradients, or a NaN.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.array(value, np.float64) for value in inputs.values()]
    y, cache = forward(*arrays)
    w = rng.normal(size=np.shape(y))
    gradients = _gradients(backward, w + y, cache, inputs)

    def at(i, v):
        """y with argument i moved by v."""
        return forward(*arrays[:i], arrays[i] + v, *arrays[i + 1:])[0]

    def difference(a, b):
        """L(a) - L(b) = <w + (a + b)/2, a - b>: it loses fewer digits than the difference of two sums."""
        return np.sum((w + (a + b) / 2) * (a - b))

    rows = []
    for i, name in enumerate(inputs):
        v = rng.normal(size=(directions, *arrays[i].shape))
        v /= np.linalg.norm(v.reshape(directions, -1), axis=1).reshape(-1, *[1] * arrays[i].ndim)
        analytic = np.array([np.sum(gradients[i] * v_k) for v_k in v])
        numeric = np.array([difference(at(i, STEP * v_k), at(i, -STEP * v_k)) for v_k in v]) / (2 * STEP)
        remainders = [np.linalg.norm([difference(at(i, h * v_k), y) - h * a_k for v_k, a_k in zip(v, analytic)])
                      for h in TAYLOR_STEPS]
        slope_found = _slope(remainders, floor=64 * np.finfo(float).eps * np.linalg.norm(w + y) * np.linalg.norm(y))
        error, method = _relative(analytic, numeric), "directions"
        if np.size(y) * arrays[i].size <= TINY:
            J, J_numeric = _jacobians(at, i, arrays[i], backward, cache, y, inputs)
            error, method = max(error, _relative(J, J_numeric)), "jacobian"
        worst = np.argmax(abs(analytic - numeric))
        rows.append(Row(name, method, float(analytic[worst]), float(numeric[worst]), float(error), float(slope_found), seed,
                        bool(error <= tolerance and slope_found >= slope)))
    return rows


def _gradients(backward, dy, cache, inputs):
    """backward's answer as a list, one array per argument, refused if it cannot be a gradient."""
    gradients = backward(dy, cache)
    gradients = list(gradients) if isinstance(gradients, (tuple, list)) else [gradients]
    if len(gradients) != len(inputs):
        raise ValueError(f"backward returned {len(gradients)} gradients for {len(inputs)} arguments")
    for (name, value), gradient in zip(inputs.items(), gradients):
        if np.shape(gradient) != np.shape(value):
            raise ValueError(f"gradient of {name} has shape {np.shape(gradient)}, expected {np.shape(value)}")
        if not np.isfinite(gradient).all():
            raise ValueError(f"gradient of {name} is not finite")
    return gradients


def _jacobians(at, i, x, backward, cache, y, inputs):
    """dy/dx (outputs, inputs) by backward, one row per output, and by central differences, one column per input."""
    rows = [_gradients(backward, e.reshape(np.shape(y)), cache, inputs)[i].ravel() for e in np.eye(np.size(y))]
    columns = [np.ravel(at(i, e.reshape(x.shape)) - at(i, -e.reshape(x.shape))) / (2 * STEP) for e in STEP * np.eye(x.size)]
    return np.array(rows), np.stack(columns, 1)


def _relative(a, b):
    """|a - b| over the larger of the two norms; 0 when both vanish."""
    scale = max(np.linalg.norm(a), np.linalg.norm(b))
    return np.linalg.norm(a - b) / scale if scale > 1e-12 else 0.0


def _slope(remainders, floor):
    """d log |remainder| / d log h by least squares over the steps whose remainder stands above rounding; infinity if none does.

    A remainder is that of all directions taken as one vector: one of them may be nearly orthogonal to the gradient.
    """
    if not np.isfinite(remainders).all():
        return np.nan
    seen = np.array(remainders) > floor
    return np.polyfit(np.log(TAYLOR_STEPS[seen]), np.log(np.array(remainders)[seen]), 1)[0] if seen.sum() > 1 else np.inf


# ---- tinycea's own pairs ---------------------------------------------------------------------------------------------

def module(forward, backward, x, p):
    """A module (x, p) -> y as a pair of plain arrays, for `check` -> forward, backward, inputs."""
    def backward_all(dy, cache):
        g = {name: np.zeros_like(dy, shape=value.shape) for name, value in p.items()}       # where dy lives, on a GPU perhaps
        return backward(dy, cache, g), *g.values()
    return lambda x, *values: forward(x, dict(zip(p, values))), backward_all, {"x": x} | p


def hosted(forward, backward, ops):
    """A pair on NumPy arrays, as `check` wants them, that computes where the backend `ops` does."""
    def on_host(arrays):
        return tuple(map(ops.to_host, arrays)) if isinstance(arrays, tuple) else ops.to_host(arrays)

    def forward_hosted(*arrays):
        y, cache = forward(*map(ops.to_device, arrays))
        return ops.to_host(y), cache
    return forward_hosted, lambda dy, cache: on_host(backward(ops.to_device(dy), cache))


def cases(ops, seed=0):
    """Yield (name, tolerance, forward, backward, inputs): every op of a backend, CEA with every switch, its rivals, the network."""
    rng = np.random.default_rng(seed)

    def n(*shape):
        return rng.normal(size=shape)

    def op(name, inputs, *settings, label=""):
        pair = getattr(ops, name), getattr(ops, name + "_backward")
        return name + label, 1e-6, lambda *arrays: pair[0](*arrays, *settings), pair[1], inputs

    yield op("linear", {"x": n(2, 5, 3), "weight": n(3, 4), "bias": n(4)})
    yield op("conv1x1", {"x": n(2, 3, 5, 4), "weight": n(7, 4, 1, 1), "bias": n(7)})
    yield op("layernorm", {"x": n(2, 3, 5), "weight": n(5), "bias": n(5)})
    yield op("norm_conv1x1", {"x": n(2, 3, 5, 4), "norm_weight": n(4), "norm_bias": n(4), "weight": n(7, 4, 1, 1), "bias": n(7)})
    yield op("scaled_conv1x1", {"x": n(2, 3, 5, 4), "weight": n(7, 4, 1, 1), "bias": n(7), "scale": n(1, 7, 1, 1)})
    yield op("conv3x3", {"x": n(2, 5, 3, 4), "weight": n(7, 4, 3, 3), "bias": n(7)})
    depthwise = {"x": n(2, 5, 3, 4), "weight": n(4, 1, 3, 3), "bias": n(4)}
    yield op("depthwise3x3", depthwise)
    yield op("gated_depthwise3x3", depthwise)
    yield op("down2x2", {"x": n(2, 4, 6, 3), "weight": n(5, 3, 2, 2), "bias": n(5)})
    yield op("pixel_shuffle", {"x": n(2, 3, 5, 12)})
    yield op("pixel_unshuffle", {"x": n(2, 6, 9, 2)}, 3)
    yield op("simple_gate", {"x": n(2, 3, 5, 4)})
    yield op("global_average_pool", {"x": n(2, 3, 5, 4)})
    yield op("scale_channels", {"x": n(2, 3, 5, 4), "scale": n(2, 1, 1, 4)})
    yield op("attended_conv1x1", {"x": n(2, 3, 5, 4), "attention": n(2, 1, 1, 4), "weight": n(7, 4, 1, 1), "bias": n(7), "scale": n(1, 7, 1, 1)})
    yield op("probe", {"Q": n(3, 20), "K": n(2, 7, 20), "V": n(2, 7, 20)}, 4)
    yield op("summarize", {"xhat": n(2, 7, 6), "W_K": n(6, 20), "W_V": n(6, 20), "Q": n(3, 20)}, 4)
    yield op("affinity", {"xhat": n(2, 7, 5), "A": n(2, 3, 5)})
    yield op("combine", {"x": n(2, 7, 5), "S": n(2, 7, 3), "U": n(2, 3, 5)})
    yield op("assembly", {"x": n(2, 7, 5), "xhat": n(2, 7, 5), "A": n(2, 2, 5), "U": n(2, 2, 5)}, label=" (tokens first)")
    yield op("assembly", {"x": n(2, 40, 3), "xhat": n(2, 40, 3), "A": n(2, 5, 3), "U": n(2, 5, 3)}, label=" (fast weight)")
    yield op("topk_softmax", {"S": n(2, 7, 5)}, 5, label=" (softmax)")
    yield op("topk_softmax", {"S": rng.permuted(np.tile(np.arange(5.0), (2, 7, 1)), axis=-1) + n(2, 7, 5) / 10}, 2, label=" (top-2)")
    yield op("token_mean", {"S": n(2, 7, 5)})
    yield op("resize", {"x": n(2, 3, 5, 2)}, 7, 4)
    yield op("keep_topk", {"p": rng.permuted(np.tile(np.arange(5.0), (2, 7, 1)), axis=-1) + n(2, 7, 5) / 10}, 2)
    yield op("gate_experts", {"S": n(2, 5, 6), "G": n(2, 5, 3)}, label=" (token)")
    yield op("gate_experts", {"S": n(2, 5, 6), "G": n(2, 1, 3)}, label=" (image)")
    yield op("load_balance", {"p": np.exp(n(2, 7, 5))})
    pred, error = n(2, 3, 5, 4), n(2, 3, 5, 4)
    yield op("l1_loss", {"pred": pred, "target": pred + error + np.sign(error) / 10})        # away from the kink at 0
    yield op("charbonnier_loss", {"pred": n(2, 3, 5, 4), "target": n(2, 3, 5, 4)}, 0.1)
    yield op("psnr_loss", {"pred": n(2, 3, 5, 4), "target": n(2, 3, 5, 4)})

    def parameters(shapes):
        return {name: n(*shape) / 2 for name, shape in shapes.items()}          # never the zeros of an initialization

    def apart(shapes, scores, k):
        """Features and parameters for which no score is so near to the k-th largest that a step of the check could exchange them."""
        while True:
            x, p = n(3, 2, 7, 6), parameters(shapes)
            S = np.sort(scores(x, p))
            if k == S.shape[-1] or (S[..., -k] - S[..., -k - 1]).min() > 0.01:
                return x, p

    switches = [CEAConfig(rank=4, heads=5, probe_channels=10, topk=2, affinity=affinity, level=level, static=static)
                for affinity in ("signed", "softmax", "topk") for level in ("token", "image") for static in ("", "A", "U", "AU")]
    switches += [replace(config, tokens="X") for config in switches if not config.static]
    for config in switches + [CEAConfig(rank=9, heads=2)]:
        label = "fast weight" if config.rank == 9 else f"{config.affinity}, {config.level}, static {config.static or 'none'}{', of X' * (config.tokens == 'X')}"
        signed, kept = replace(config, affinity="signed", level="token"), config.topk if config.affinity == "topk" else config.rank
        x, p = apart(cea.shapes(6, config), lambda x, p: cea.anatomy(cea.cea(x, p, signed)[1])["S"], kept)
        yield f"cea ({label})", 1e-6, *module(lambda x, p, c=config: cea.cea(x, p, c, ops), cea.cea_backward, x, p)

    rivals = {"mlp": MLPConfig(hidden=4), "descriptor": DescriptorConfig(hidden=4), "prompt": PromptConfig(3, 4, 2, hidden=5)}
    for name, config in rivals.items():
        _, shapes, _, forward, backward = FAMILIES[name]
        yield name, 1e-6, *module(lambda x, p, c=config, f=forward: f(x, p, c, ops), backward, n(3, 2, 7, 6), parameters(shapes(6, config)))
    for level, k in product(("image", "token"), (1, 2, 3)):
        config = ExpertsConfig(3, k, 2, level, balance=0)              # a balance is in the gradient alone: see tests/test_adapters.py
        x, p = apart(adapters.experts_shapes(6, config), lambda x, p: adapters.experts(x, p, config)[1][3], k)
        yield (f"experts ({level}, top-{k})", 1e-6,
               *module(lambda x, p, c=config: adapters.experts(x, p, c, ops), adapters.experts_backward, x, p))

    yield "nafblock", 1e-6, *module(lambda x, p: nafnet.nafblock(x, p, ops), nafnet.nafblock_backward,
                                    n(2, 3, 7, 5), parameters(nafnet.block_shapes(5)))

    small = NAFNetConfig(width=4, middle=1, adapter=CEAConfig(rank=3, heads=2))
    for label, config, forward, backward in (
            ("nafnet (none)", replace(small, adapter=None, unshuffle=1), nafnet.nafnet, nafnet.nafnet_backward),
            ("nafnet (cea, centered)", small, nafnet.centered, nafnet.centered_backward)):
        yield label, 1e-5, *module(lambda x, p, c=config, f=forward: f(x, p, c, ops), backward,
                                   n(2, 5, 9, 3), parameters(nafnet.shapes(config)))


def broken(ops, seed=0):
    """Yield four pairs as `cases` does, each with a wrong gradient that `check` must fail."""
    rng = np.random.default_rng(seed)
    inputs = {"x": rng.normal(size=(2, 5, 4)), "weight": rng.normal(size=(4, 4)), "bias": rng.normal(size=4)}
    for wrong, change in (("0.1 % too large", lambda dx, dw, db, dy: (dx, dw * 1.001, db)),
                          ("sign flipped", lambda dx, dw, db, dy: (-dx, dw, db)),
                          ("transposed", lambda dx, dw, db, dy: (dx, dw.T, db)),
                          ("term dropped", lambda dx, dw, db, dy: (dx, dw, db - dy[0].sum(0)))):
        yield (f"broken on purpose: {wrong}", 1e-6, ops.linear,
               lambda dy, cache, change=change: change(*ops.linear_backward(dy, cache), dy), inputs)


def report(backend_name="cpu", seed=0):
    """Check all cases, and that the broken ones are caught -> list of dicts, one per case.

    Each is its worst argument's Row, with the case's name, number of arguments, tolerance, smallest slope and verdict.
    """
    ops = backend(backend_name)
    results = []
    for verdict, pairs in (("ok", cases(ops, seed)), ("caught", broken(ops, seed))):
        for name, tolerance, forward, backward, inputs in pairs:
            rows = check(*hosted(forward, backward, ops), inputs, seed, tolerance=tolerance)
            worst = max(rows, key=lambda row: (not row.passed, row.relative_error))
            passed = all(row.passed for row in rows) == (verdict == "ok")
            results.append({"name": name, "arguments": len(rows)} | asdict(worst)
                           | {"taylor_slope": min(row.taylor_slope for row in rows), "tolerance": tolerance,
                              "passed": passed, "verdict": verdict if passed else "FAILED"})
    return results
