"""Proves CEA's rivals: each equals loops written here from its definition, starts as the identity, every parameter learns.

The loops share nothing with the package: plain indices, one number at a time.
"""
import math
from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from test_ops import EVERY_BACKEND, LAYOUTS, close, dot, loop_layernorm, loop_linear, naming, snapshot, softmax

from tinycea import ablations, adapters, cases, cea, gradcheck, nafnet
from tinycea.ablations import CEAConfig
from tinycea.adapters import FAMILIES, DescriptorConfig, ExpertsConfig, MLPConfig, PromptConfig, family
from tinycea.ops import backend, reference
from tinycea.runtime import InputError

RTOL = {"the same sum in another order": 1e-12, "a layer": 1e-10, "a layer in float32": 3e-5, "a gradient": 1e-6}
CONFIGS = {"mlp": MLPConfig(hidden=5), "descriptor": DescriptorConfig(hidden=5), "prompt": PromptConfig(4, 3, 2, hidden=5),
           "prompt of one cell": PromptConfig(1, 1, 1, hidden=1)}
CONFIGS |= {f"experts, {level}, top-{k}": ExpertsConfig(3, k, 2, level) for level in ("image", "token") for k in (1, 2, 3)}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SIZES = {"odd": (3, 5, 7, 6), "a pixel": (2, 1, 1, 3), "a row": (1, 1, 9, 5), "one channel": (2, 3, 5, 1)}


def layer(config, shape=(3, 5, 7, 6), seed=0, dtype=np.float64):
    """Features, and parameters off their start -> x, p, forward(room) -> (y, cache)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(dtype)
    p = {name: rng.normal(size=s).astype(dtype) for name, s in family(config).shapes(shape[-1], config).items()}
    return x, p, lambda room="reference": family(config).forward(x, p, config, backend(room))


def gradients(config, dy, cache, p):
    """Name -> gradient, the features' as "x"."""
    g = {name: np.zeros_like(value) for name, value in p.items()}
    return g | {"x": family(config).backward(dy, cache, g)}


# ---- the definitions, as loops ---------------------------------------------------------------------------------------

def pixels(x):
    return np.ndindex(*x.shape[:3])


def mean_token(Xhat, b):
    return [math.fsum(Xhat[b, ..., c].ravel()) / Xhat[b, ..., c].size for c in range(Xhat.shape[-1])]


def through_gate(token, W, bias, added=None):
    u = loop_linear(np.array(token), W, bias) + (0 if added is None else added)
    M = len(u) // 2
    return [u[m] * u[m + M] for m in range(M)]


def loop_mlp(x, Xhat, p, config):
    y = x.copy()
    for at in pixels(x):
        y[at] += loop_linear(np.array(through_gate(Xhat[at], p["W_1"], p["b_1"])), p["W_2"])
    return y


def loop_descriptor(x, Xhat, p, config):
    y, C = x.copy(), x.shape[-1]
    for b, h, w in pixels(x):
        e = through_gate(mean_token(Xhat, b), p["W_1"], p["b_1"])
        gamma, beta = ([dot(e, p["W_2"][:, c + start]) + p["b_2"][c + start] for c in range(C)] for start in (0, C))
        seen = [Xhat[b, h, w, c] * (1 + gamma[c]) + beta[c] for c in range(C)]
        y[b, h, w] += [dot(seen, p["W"][:, c]) for c in range(C)]
    return y


def between(i, n, size):
    """Where pixel i of n looks among `size` cells: [(cell, weight), (cell, weight)]."""
    place = min(max((i + 0.5) * size / n - 0.5, 0), size - 1)
    low = math.floor(place)
    return [(low, 1 - (place - low)), (min(low + 1, size - 1), place - low)]


def loop_prompt(x, Xhat, p, config):
    y, (_, H, W, _) = x.copy(), x.shape
    for b, h, w in pixels(x):
        weights = softmax([dot(mean_token(Xhat, b), p["W_p"][:, t]) for t in range(config.prompts)])
        here = [math.fsum(weight * vertical * horizontal * p["P"][t, i, j, d] for t, weight in enumerate(weights)
                          for i, vertical in between(h, H, config.size) for j, horizontal in between(w, W, config.size))
                for d in range(config.channels)]
        v = through_gate(Xhat[b, h, w], p["W_1"], p["b_1"], loop_linear(np.array(here), p["W_P"]))
        y[b, h, w] += loop_linear(np.array(v), p["W_2"])
    return y


def loop_experts(x, Xhat, p, config):
    y, C = x.copy(), x.shape[-1]
    E, r = config.experts, config.rank
    for b, h, w in pixels(x):
        token = mean_token(Xhat, b) if config.level == "image" else Xhat[b, h, w]
        gates = softmax([dot(token, p["W_g"][:, e]) for e in range(E)])
        for e in sorted(range(E), key=lambda e: gates[e])[-config.topk:]:
            for column in range(e * r, e * r + r):
                S = dot(Xhat[b, h, w], p["A"][column]) / math.sqrt(C)
                y[b, h, w] += gates[e] * S * p["U"][column] / math.sqrt(E * r)
    return y


LOOPS = {MLPConfig: loop_mlp, DescriptorConfig: loop_descriptor, PromptConfig: loop_prompt, ExpertsConfig: loop_experts}


@EVERY_CONFIG
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_forward_is_its_loop(config, shape):
    x, p, forward = layer(config, shape)
    Xhat = loop_layernorm(x, p["norm.weight"], p["norm.bias"])
    right = LOOPS[type(config)](x, Xhat, p, config)
    for room in ("reference", "cpu"):
        with naming(room):
            close(forward(room)[0], right, RTOL["a layer"])


# ---- gradients ---------------------------------------------------------------------------------------------------------

OPS = {"resize", "keep_topk", "gate_experts", "load_balance"}             # theirs alone; after a softmax some mistakes vanish
CASES = [case[0] for case in cases.cases(reference) if case[0].split()[0] in OPS | set(FAMILIES) - {"cea"}]


def test_gradients_of_every_family_are_checked():
    """By test_ops, against central differences, as all of gradcheck's cases."""
    assert {name.split()[0] for name in CASES} == OPS | set(FAMILIES) - {"cea"}
    assert sum(name.startswith("experts") for name in CASES) == 6


@EVERY_CONFIG
def test_cpu_is_reference(config):
    for where, shape in SIZES.items():
        x, p, forward = layer(config, shape)
        (y, cache), (right, cache_right) = forward("cpu"), forward()
        with naming(where):
            close(y, right, RTOL["a layer"])
            dy = np.random.default_rng(1).normal(size=x.shape)
            mine, theirs = gradients(config, dy, cache, p), gradients(config, dy, cache_right, p)
            for name, value in theirs.items():                 # a layer norm over one channel passes rounding alone
                assert np.abs(mine[name] - value).max() <= RTOL["a layer"] * max(np.abs(value).max(), 1), name


@pytest.mark.slow
@EVERY_CONFIG
def test_the_cuda_room_is_reference(config, emulated_cupy):
    x, p, forward = layer(config, dtype=np.float32)
    (y, cache), (right, cache_right) = forward("cuda"), forward()
    close(y, right, RTOL["a layer in float32"])
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    mine, theirs = gradients(config, dy, cache, p), gradients(config, dy, cache_right, p)
    for name, value in theirs.items():
        close(mine[name], value, RTOL["a layer in float32"])


@EVERY_BACKEND
@EVERY_CONFIG
def test_gradients_are_added_and_nothing_is_modified(room, config):
    x, p, forward = layer(config)
    y, cache = forward(room)
    dy = np.random.default_rng(1).normal(size=x.shape)
    before = snapshot([x, *p.values(), dy, y])
    once, more = ({name: np.full_like(value, start) for name, value in p.items()} for start in (0, 1))
    dx = family(config).backward(dy, cache, once)
    assert np.array_equal(family(config).backward(dy, cache, more), dx)                           # the cache serves twice
    for name in p:
        difference, scale = np.abs(more[name] - once[name] - 1).max(), max(1, np.abs(more[name]).max())
        assert difference < RTOL["the same sum in another order"] * scale
    assert snapshot([x, *p.values(), dy, y]) == before


@EVERY_BACKEND
@EVERY_CONFIG
def test_float32_in_float32_out(room, config):
    x, p, forward = layer(config, dtype=np.float32)
    y, cache = forward(room)
    assert y.dtype == np.float32
    assert all(value.dtype == np.float32 for value in gradients(config, y, cache, p).values())


@EVERY_BACKEND
@EVERY_CONFIG
def test_memory_layout_changes_nothing(room, config):
    x, p, forward = layer(config)
    y, cache = forward(room)
    dy = np.random.default_rng(1).normal(size=x.shape)
    right = gradients(config, dy, cache, p)
    for where, layout in LAYOUTS.items():
        laid = {name: layout(value) for name, value in p.items()}
        with naming(where):
            y2, cache2 = family(config).forward(layout(x), laid, config, backend(room))
            close(y2, y, RTOL["a layer"])
            for name, value in gradients(config, layout(dy), cache2, p).items():
                close(value, right[name], RTOL["a layer"])


@EVERY_CONFIG
def test_every_parameter_gets_a_gradient(config):
    """PromptIR's prompts were read through `.data` and never trained (PromptIR#6): here each cell of each of them must move."""
    x, p, forward = layer(config)
    y, cache = forward()
    g = gradients(config, y, cache, p)
    silent = [name for name, value in g.items() if not value.any()]
    assert silent == (["W_p"] if config == CONFIGS["prompt of one cell"] else [])     # nothing to choose from: a softmax over one
    if isinstance(config, PromptConfig):
        assert g["P"].all()


@pytest.mark.parametrize("level", ("image", "token"))
def test_the_router_learns_from_a_single_expert(level):
    """A softmax over the one kept logit would be 1 whatever the router says: the kept gate is its share among all."""
    config = ExpertsConfig(4, 1, 2, level, balance=0)
    x, p, forward = layer(config)
    y, cache = forward()
    assert gradients(config, y, cache, p)["W_g"].any(0).sum() > 1


# ---- the start ---------------------------------------------------------------------------------------------------------

ZERO = {MLPConfig: "W_2", DescriptorConfig: "W", PromptConfig: "W_2", ExpertsConfig: "U"}


@pytest.mark.parametrize("config", [*CONFIGS.values(), ExpertsConfig(balance=0)], ids=[*CONFIGS, "experts, no balance"])
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_fresh_layer_is_the_identity_and_can_leave_it(config, dtype):
    x, p, _ = layer(config, dtype=dtype)
    for value in p.values():
        value[...] = np.nan
    cea.init(p, np.random.default_rng(0))
    y, cache = family(config).forward(x, p, config)
    assert np.array_equal(y, x)
    zero = {name for name, value in p.items() if not value.any()}
    assert zero == {ZERO[type(config)]} | {name for name in p if name in ("norm.bias", "b_1", "b_2")}
    assert (p["norm.weight"] == 1).all()
    dy = np.random.default_rng(1).normal(size=x.shape).astype(dtype)
    g = gradients(config, dy, cache, p)
    assert g[ZERO[type(config)]].any()
    if not getattr(config, "balance", 0):                      # it moves what comes before, whatever the layer adds
        assert np.array_equal(g["x"], dy)


@EVERY_CONFIG
def test_start_is_repeatable_and_of_the_scale_it_says(config):
    big = replace(config, **{name: 40 for name in ("hidden", "rank", "size") if hasattr(config, name)})
    p, again, other = ({name: np.empty(s) for name, s in family(big).shapes(50, big).items()} for _ in range(3))
    for values, seed in ((p, 0), (again, 0), (other, 1)):
        cea.init(values, np.random.default_rng(seed))
    assert snapshot(list(p.values())) == snapshot(list(again.values())) != snapshot(list(other.values()))
    for name in set(p) - {"norm.weight", "norm.bias", "b_1", "b_2", ZERO[type(config)]}:
        expected = 1 if name in ("A", "P") else len(p[name])**-0.5
        assert p[name].std() == pytest.approx(expected, rel=6 * (2 * p[name].size)**-0.5), name


# ---- resizing ----------------------------------------------------------------------------------------------------------

RESIZED = [((2, 3, 5, 2), (7, 4)), ((1, 8, 8, 3), (24, 24)), ((1, 8, 8, 1), (5, 3)), ((3, 1, 4, 2), (6, 1)),
           ((1, 2, 2, 1), (1, 1)), ((1, 1, 1, 1), (3, 5))]


@pytest.mark.parametrize("shape, size", RESIZED)
def test_resize_is_scipy_s_linear_interpolation(shape, size):
    x = np.random.default_rng(0).normal(size=shape)
    places = np.meshgrid(*((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(size, shape[1:3])), indexing="ij")
    y, _ = reference.resize(x, *size)
    assert y.shape == (shape[0], *size, shape[3])
    for b, c in np.ndindex(shape[0], shape[3]):
        close(y[b, ..., c], map_coordinates(x[b, ..., c], places, order=1, mode="nearest"), RTOL["the same sum in another order"])


@pytest.mark.parametrize("shape, size", RESIZED)
def test_resize_is_torch_s(shape, size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=shape)
    theirs = torch.nn.functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    close(reference.resize(x, *size)[0], theirs.permute(0, 2, 3, 1).numpy(), RTOL["the same sum in another order"])


def test_resize_to_the_same_size_copies_and_a_constant_stays():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 2))
    close(reference.resize(x, 3, 5)[0], x, RTOL["the same sum in another order"])
    close(reference.resize(np.ones((1, 3, 5, 1)), 11, 2)[0], np.ones((1, 11, 2, 1)), RTOL["the same sum in another order"])


# ---- experts -----------------------------------------------------------------------------------------------------------

def test_one_expert_is_the_static_low_rank_layer():
    experts, static = ExpertsConfig(1, 1, 5), CEAConfig(rank=5, heads=1, static="AU", norm="token", tokens="Xhat")
    x, p, forward = layer(experts)
    own = {name: p[name] for name in ablations.shapes(6, static)}
    close(forward()[0], ablations.forward(x, own, static, reference)[0], RTOL["a layer"])


@pytest.mark.parametrize("level", ("image", "token"))
def test_an_expert_that_is_not_chosen_is_not_used(level):
    """Top-1 by hand: each image or token reads one expert alone, times its share of the softmax over all."""
    config = ExpertsConfig(3, 1, 2, level)
    x, p, forward = layer(config, (1, 1, 1, 6))
    y, cache = forward()
    pi = cache[3]
    chosen = int(np.argmax(pi))
    assert 1 / 3 < pi.max() < 1
    others = np.repeat(np.arange(3) != chosen, 2)
    for name in ("A", "U"):
        p[name][others] = np.random.default_rng(2).normal(size=(4, 6))
    assert np.array_equal(forward()[0], y)
    p["U"][~others] = 0
    assert np.array_equal(forward()[0], x)


@EVERY_BACKEND
@EVERY_CONFIG
def test_the_same_answer_twice_and_in_any_company(room, config):
    """No noise, at test nor in training, and no image reads another one's features."""
    x, p, forward = layer(config)
    y, _ = forward(room)
    assert np.array_equal(forward(room)[0], y)
    for b in range(len(x)):
        close(family(config).forward(x[b:b + 1], p, config, backend(room))[0], y[b:b + 1], RTOL["a layer"])


def aux(config, x, p):
    """balance / 2 times the squared coefficient of variation of the experts' importance, before the top-k, by loops."""
    Xhat = loop_layernorm(x, p["norm.weight"], p["norm.bias"])
    tokens = [mean_token(Xhat, b) for b in range(len(x))] if config.level == "image" else [Xhat[at] for at in pixels(x)]
    shares = [softmax([dot(token, p["W_g"][:, e]) for e in range(config.experts)]) for token in tokens]
    load = [math.fsum(column) for column in zip(*shares)]
    mean = math.fsum(load) / len(load)
    return config.balance * math.fsum((I - mean)**2 for I in load) / len(load) / mean**2 / 2


@EVERY_BACKEND
@pytest.mark.parametrize("level", ("image", "token"))
@pytest.mark.parametrize("k", (1, 2))
def test_balance_is_in_the_gradient_and_only_there(room, level, k):
    """With it, minus without it, is the gradient of balance times the auxiliary loss, held against the loop's differences."""
    with_it, without = (ExpertsConfig(3, k, 2, level, balance) for balance in (0.7, 0))
    x, p, _ = layer(with_it, (2, 2, 3, 5))
    dy = np.random.default_rng(1).normal(size=x.shape)

    def backward(dL, cache):
        a, b = (gradients(c, dy, cache, p) for c, cache in zip((with_it, without), cache))
        return tuple(dL * (a[name] - b[name]) for name in ("x", *p))

    def forward(x, *values):
        q = dict(zip(p, values))
        (y, cache), (y_without, cache_without) = (adapters.experts(x, q, c, backend(room)) for c in (with_it, without))
        assert np.array_equal(y, y_without)
        return aux(with_it, x, q), (cache, cache_without)
    rows = gradcheck.check_gradients(forward, backward, {"x": x} | p, tolerance=RTOL["a gradient"])
    assert all(row.passed for row in rows)
    assert {row.argument for row in rows if row.analytic} == {"x", "W_g", "norm.weight", "norm.bias"}


def test_load_balance_by_hand():
    assert reference.load_balance(np.full((2, 3, 5), 0.2))[0] == pytest.approx(0, abs=1e-30)
    alone = np.zeros((2, 3, 5))
    alone[..., 2] = 1
    assert reference.load_balance(alone)[0] == pytest.approx(2)                 # mean 6/5, variance 4 (6/5)^2: half of 4
    assert reference.load_balance(np.array([[1., 2, 3]]))[0] == pytest.approx(2 / 3 / 4 / 2)


def test_balance_spreads_the_load():
    """Steps down the auxiliary gradient alone (dy = 0) use the experts more alike."""
    config = ExpertsConfig(4, 1, 2, "image", balance=1)
    x, p, forward = layer(config)
    before = aux(config, x, p)
    for _ in range(20):
        y, cache = forward()
        p["W_g"] -= 0.3 * gradients(config, np.zeros_like(x), cache, p)["W_g"]
    assert aux(config, x, p) < before / 2


# ---- the contract ------------------------------------------------------------------------------------------------------

def test_families_keep_one_contract():
    assert list(FAMILIES) == ["cea", "mlp", "descriptor", "prompt", "experts"]
    for name, own in FAMILIES.items():
        assert family(own.config()) is own
        arguments = [["C", "config"], ["x", "p", "config", "ops"], ["dy", "cache", "g"]]
        assert [list(signature(f).parameters) for f in own[1:]] == arguments, name
        assert hash(own.config()) == hash(own.config())
        with pytest.raises(FrozenInstanceError):
            setattr(own.config(), fields(own.config)[0].name, 1)
    assert family(None) is family("mlp") is family(MLPConfig) is family(nafnet.NAFNetConfig()) is None


COUNTS = {"mlp": lambda C, c: 2 * C + 3 * C * c.hidden + 2 * c.hidden,
          "descriptor": lambda C, c: C * C + 4 * C + 4 * C * c.hidden + 2 * c.hidden,
          "prompt": lambda C, c: (2 * C + 3 * C * c.hidden + 2 * c.hidden
                                  + c.prompts * (C + c.size**2 * c.channels) + 2 * c.channels * c.hidden),
          "experts": lambda C, c: 2 * C + C * c.experts + 2 * c.experts * c.rank * C}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_their_docstring_lists(name):
    for C in (24, 48, 5):
        own, config = FAMILIES[name], FAMILIES[name].config()
        assert sum(math.prod(shape) for shape in own.shapes(C, config).values()) == COUNTS[name](C, config)


@pytest.mark.parametrize("config, options, words", [
    (MLPConfig, {"hidden": 0}, "hidden is 0: expected a positive integer"),
    (MLPConfig, {"hidden": 2.5}, "hidden is 2.5"),
    (DescriptorConfig, {"hidden": -1}, "hidden is -1"),
    (DescriptorConfig, {"hidden": "many"}, "hidden is 'many'"),
    (PromptConfig, {"prompts": 0}, "prompts is 0"),
    (PromptConfig, {"size": 0}, "size is 0"),
    (PromptConfig, {"channels": None}, "channels is None"),
    (PromptConfig, {"hidden": 0}, "hidden is 0"),
    (ExpertsConfig, {"experts": 0}, "experts is 0"),
    (ExpertsConfig, {"rank": 0}, "rank is 0"),
    (ExpertsConfig, {"topk": 0}, "topk is 0"),
    (ExpertsConfig, {"topk": 5}, "topk is 5: expected at most the number of experts, 4"),
    (ExpertsConfig, {"level": "patch"}, "level is 'patch': choose one of 'image', 'token'"),
    (ExpertsConfig, {"balance": -0.1}, "balance is -0.1: expected a finite number"),
    (ExpertsConfig, {"balance": math.nan}, "balance is nan"),
    (ExpertsConfig, {"balance": math.inf}, "balance is inf"),
    (ExpertsConfig, {"balance": "some"}, "balance is 'some'")])
def test_senseless_sizes_are_refused(config, options, words):
    with pytest.raises(InputError, match=words):
        config(**options)


@pytest.mark.parametrize("config", [own.config() for own in FAMILIES.values()], ids=FAMILIES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 5, 1), (3, 5, 8), (2, 15, 8), (2, 0, 5, 8), (0, 3, 5, 8), (8,)])
def test_other_shapes_of_features_are_refused(config, shape):
    p = {name: np.ones(s) for name, s in family(config).shapes(8, config).items()}
    with pytest.raises(InputError, match=r"x has shape .* expected \(B,H,W,8\)"):
        family(config).forward(np.ones(shape), p, config)
    for other in (1, [1], None):
        with pytest.raises(InputError, match="x has shape None"):
            family(config).forward(other, p, config)
