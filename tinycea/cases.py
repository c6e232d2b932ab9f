"""The gradient pairs of `tinycea gradcheck` and the tests: every op, CEA with every switch, its rivals, the network."""
from dataclasses import asdict, replace
from itertools import product

import numpy as np

from . import ablations, adapters, nafnet
from .ablations import CEAConfig
from .adapters import FAMILIES, DescriptorConfig, ExpertsConfig, MLPConfig, PromptConfig
from .gradcheck import check_gradients, module
from .nafnet import NAFNetConfig
from .ops import backend


def hosted(forward, backward, ops):
    """A pair on NumPy arrays, as `check_gradients` wants them, that computes where the backend `ops` does."""
    def on_host(arrays):
        return tuple(map(ops.to_host, arrays)) if isinstance(arrays, tuple) else ops.to_host(arrays)

    def forward_hosted(*arrays):
        y, cache = forward(*map(ops.to_device, arrays))
        return ops.to_host(y), cache
    return forward_hosted, lambda dy, cache: on_host(backward(ops.to_device(dy), cache))


def cases(ops, seed=0):
    """Yield (name, tolerance, forward, backward, inputs): each op of a backend, CEA with each switch, its rivals, the network."""
    rng = np.random.default_rng(seed)

    def n(*shape):
        return rng.normal(size=shape)

    def op(name, inputs, *settings, label=""):
        forward, backward = getattr(ops, name), getattr(ops, name + "_backward")
        return name + label, 1e-6, lambda *arrays: forward(*arrays, *settings), backward, inputs

    yield op("linear", {"x": n(2, 5, 3), "weight": n(3, 4), "bias": n(4)})
    yield op("conv1x1", {"x": n(2, 3, 5, 4), "weight": n(7, 4, 1, 1), "bias": n(7)})
    yield op("layernorm", {"x": n(2, 3, 5), "weight": n(5), "bias": n(5)})
    yield op("groupnorm", {"x": n(2, 3, 5), "weight": n(5), "bias": n(5)})
    yield op("norm_conv1x1", {"x": n(2, 3, 5, 4), "norm_weight": n(4), "norm_bias": n(4), "weight": n(7, 4, 1, 1), "bias": n(7)})
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
    yield op("probe", {"Q": n(3, 20), "K": n(2, 7, 20), "V": n(2, 7, 20)}, 4)
    yield op("summarize", {"xhat": n(2, 7, 6), "W_K": n(6, 20), "W_V": n(6, 20), "Q": n(3, 20)}, 4)
    yield op("affinity", {"xhat": n(2, 7, 5), "A": n(2, 3, 5)})
    yield op("combine", {"x": n(2, 7, 5), "S": n(2, 7, 3), "U": n(2, 3, 5)})
    yield op("assembly", {"x": n(2, 7, 5), "xhat": n(2, 7, 5), "A": n(2, 2, 5), "U": n(2, 2, 5)}, label=" (tokens first)")
    yield op("assembly", {"x": n(2, 40, 3), "xhat": n(2, 40, 3), "A": n(2, 5, 3), "U": n(2, 5, 3)}, label=" (fast weight)")
    yield op("topk_softmax", {"S": n(2, 7, 5)}, 5, label=" (softmax)")
    yield op("topk_softmax", {"S": rng.permuted(np.tile(range(5), (2, 7, 1)), axis=-1) + n(2, 7, 5) / 10}, 2, label=" (top-2)")
    yield op("token_mean", {"S": n(2, 7, 5)})
    yield op("resize", {"x": n(2, 3, 5, 2)}, 7, 4)
    yield op("keep_topk", {"p": rng.permuted(np.tile(range(5), (2, 7, 1)), axis=-1) + n(2, 7, 5) / 10}, 2)
    yield op("gate_experts", {"S": n(2, 5, 6), "G": n(2, 5, 3)}, label=" (token)")
    yield op("gate_experts", {"S": n(2, 5, 6), "G": n(2, 1, 3)}, label=" (image)")
    yield op("load_balance", {"p": np.exp(n(2, 7, 5))})
    yield op("psnr_loss", {"pred": n(2, 3, 5, 4), "target": n(2, 3, 5, 4)})

    def parameters(shapes):
        return {name: n(*shape) / 2 for name, shape in shapes.items()}          # never the zeros of an initialization

    def apart(shapes, scores, k):
        """Features and parameters where no score is so near to the k-th largest that a step of the check could exchange them."""
        while True:
            x, p = n(3, 2, 7, 6), parameters(shapes)
            S = np.sort(scores(x, p))
            if k == S.shape[-1] or (S[..., -k] - S[..., -k - 1]).min() > 0.01:
                return x, p

    switches = [CEAConfig(rank=4, heads=5, probe_channels=10, topk=2, affinity=affinity, level=level, static=static,
                          tokens="Xhat" if "U" in static else "X")     # else nothing depends on norm.bias under a softmax
                for affinity in ("signed", "softmax", "topk") for level in ("token", "image") for static in ("", "A", "U", "AU")]
    switches += [replace(switches[0], static="U")] + [replace(switches[0], norm=norm, tokens=tokens)
                                                      for norm, tokens in (("token", "Xhat"), ("image", "Xhat"), ("token", "X"))]
    for config in switches + [CEAConfig(rank=9, heads=2)]:
        label = f"{config.affinity}, {config.level}, static {config.static or 'none'}"
        label += "" if (config.norm, config.tokens) == ("image", "X") else f", {config.norm} norm, of {config.tokens}"
        label = "fast weight" if config.rank == 9 else label
        signed, k = replace(config, affinity="signed", level="token"), config.topk if config.affinity == "topk" else config.rank
        x, p = apart(ablations.shapes(6, config), lambda x, p: ablations.anatomy(ablations.forward(x, p, signed)[1])["S"], k)
        yield f"cea ({label})", 1e-6, *module(lambda x, p, c=config: ablations.forward(x, p, c, ops), ablations.backward, x, p)

    rivals = {"mlp": MLPConfig(hidden=4), "descriptor": DescriptorConfig(hidden=4), "prompt": PromptConfig(3, 4, 2, hidden=5)}
    for name, config in [*rivals.items(), ("mlp", MLPConfig(hidden=4, norm="image"))]:
        _, shapes, forward, backward = FAMILIES[name]
        label = name + ", image norm" * (config.norm == "image")
        yield label, 1e-6, *module(lambda x, p, c=config, f=forward: f(x, p, c, ops), backward,
                                   n(3, 2, 7, 6), parameters(shapes(6, config)))
    for level, k in product(("image", "token"), (1, 2, 3)):
        config = ExpertsConfig(3, k, 2, level, balance=0)              # balance is in the gradient alone: tests/test_adapters.py
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
    told, label = replace(small, adapter=None, told=2), ops.to_device(n(2, 5, 9, 2))
    yield "nafnet (told)", 1e-5, *module(lambda x, p: nafnet.nafnet(np.concatenate((x, label.astype(x.dtype)), -1), p, told, ops),
                                         nafnet.nafnet_backward, n(2, 5, 9, 3), parameters(nafnet.shapes(told)))


def broken(ops, seed=0):
    """Yield four pairs as `cases` does, each with a wrong gradient that `check_gradients` must fail."""
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
            rows = check_gradients(*hosted(forward, backward, ops), inputs, seed, tolerance=tolerance)
            worst = max(rows, key=lambda row: (not row.passed, row.relative_error))
            passed = all(row.passed for row in rows) == (verdict == "ok")
            results.append({"name": name, "arguments": len(rows)} | asdict(worst) | {
                "taylor_slope": min(row.taylor_slope for row in rows), "tolerance": tolerance, "passed": passed,
                "verdict": verdict if passed else "FAILED"})
    return results
