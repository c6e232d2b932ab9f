"""Proves the prover: `check` passes right gradients and fails wrong ones, in single operations and inside CEA's backward.

Also what only whole modules can show: gradients are added, every parameter gets one, and a fresh CEA layer is the identity.
"""
import json
import runpy
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
from test_ops import naming, several

from tinycea import ablations, cases, cea, feed, gradcheck, nafnet, training
from tinycea.ablations import CEAConfig
from tinycea.adapters import FAMILIES
from tinycea.gradcheck import check_gradients
from tinycea.lab import comparison
from tinycea.nafnet import NAFNetConfig
from tinycea.ops import reference
from tinycea.params import copy_into
from tinycea.zoo import ADAPTERS, network

RTOL = {"right": 1e-6, "same sum in another order": 1e-12}
OPS = [case[0] for case in cases.cases(reference) if not case[0].startswith((*FAMILIES, "nafblock", "nafnet"))]


def case(name):
    return next(case for case in cases.cases(reference) if case[0] == name)


def verdict(forward, backward, inputs, **settings):
    """Argument -> passed."""
    return {row.argument: row.passed for row in check_gradients(forward, backward, inputs, **settings)}


# ---- wrong gradients fail ----------------------------------------------------------------------------------------------

def first_removed(g):
    wrong = np.array(g)
    wrong[0] = 0
    return wrong


WRONG = {"0.1 % too large": lambda g: 1.001 * g,
         "0.1 % too small": lambda g: 0.999 * g,
         "sign": lambda g: -g,
         "zero": lambda g: 0 * g,
         "transposed": lambda g: g.ravel(order="F").reshape(g.shape),       # column by column: any shape has that
         "reversed": lambda g: g[..., ::-1],
         "first dropped": first_removed}


@pytest.mark.parametrize("name", OPS)
def test_wrong_gradient_fails_and_is_named(name):
    _, _, forward, backward, inputs = case(name)
    y, cache = forward(*inputs.values())
    for (i, argument), (wrong, change) in product(enumerate(inputs), WRONG.items()):
        def broken(dy, cache):
            gradients = list(several(backward(dy, cache)))
            gradients[i] = change(gradients[i])
            return tuple(gradients)
        right = several(backward(np.full(np.shape(y), 0.5) + y, cache))[i]
        if not np.array_equal(change(right), right):           # a vector is its own transpose
            with naming(f"{argument}, {wrong}"):
                assert verdict(forward, broken, inputs) == {other: other != argument for other in inputs}


def patched(**changes):
    """The reference operations with some of them replaced, for each other too."""
    names = vars(reference).copy()
    names.update({name: FunctionType(f.__code__, names, name, f.__defaults__)
                  for name, f in names.items() if isinstance(f, FunctionType)})
    names.update(changes)
    return SimpleNamespace(**names)


def linear_without_dx(weight):
    """linear_backward that forgets dx where the weight is the one called `weight` (by its place among CEA's products)."""
    place = {"W_U": 0, "W_A": 1, "W_V": 2, "W_K": 3}[weight]
    calls = []

    def backward(dy, cache):
        dx, *rest = reference.linear_backward(dy, cache)
        calls.append(0)
        return (0 * dx if (len(calls) - 1) % 4 == place else dx), *rest
    return {"linear_backward": backward}


def after(name, change):
    """An operation's backward whose answer is changed."""
    right = getattr(reference, name + "_backward")

    def backward(dy, cache):
        answer = right(dy, cache)
        return change(*answer) if isinstance(answer, tuple) else change(answer)
    return {name + "_backward": backward}


def probe_without_rowsum(dZ, cache):
    q, k, v, z, P = cache
    return reference.probe_backward(dZ, (q, k, v, 0 * z, P))   # the rowsum of dP P is the rowsum of dZ Z


def norm_without_means(name):
    def backward(dy, cache):
        xhat, rstd, weight = cache
        return dy * weight * rstd, *getattr(reference, name)(dy, cache)[1:]
    return {name: backward}


R, D, H = 3, 8, 2
SIGNED, SOFTMAX, IMAGE = (CEAConfig(rank=R, heads=H, probe_channels=D, affinity=affinity, level=level)
                          for affinity, level in (("signed", "token"), ("softmax", "token"), ("signed", "image")))
SABOTAGE = {
    "no dXhat through K": (SIGNED, linear_without_dx("W_K")),
    "no dXhat through V": (SIGNED, linear_without_dx("W_V")),
    "no dZ through A": (SIGNED, linear_without_dx("W_A")),
    "no dZ through U": (SIGNED, linear_without_dx("W_U")),
    "no dXhat through S": (SIGNED, after("assembly", lambda dX, dXhat, dA, dU: (dX, 0 * dXhat, dA, dU))),
    "no skip": (SIGNED, after("assembly", lambda dX, *rest: (0 * dX, *rest))),
    "A and U exchanged": (SIGNED, after("assembly", lambda dX, dXhat, dA, dU: (dX, dXhat, dU, dA))),
    "1/sqrt(R) forgotten": (SIGNED, after("assembly", lambda dX, *rest: (dX, *(R**0.5 * g for g in rest)))),
    "1/sqrt(C) forgotten": (SIGNED, after("assembly", lambda dX, dXhat, dA, dU: (dX, 6**0.5 * dXhat, 6**0.5 * dA, dU))),
    "dA 0.1 % off": (SIGNED, after("assembly", lambda dX, dXhat, dA, dU: (dX, dXhat, 1.001 * dA, dU))),
    "softmax without its rowsum": (SIGNED, {"probe_backward": probe_without_rowsum}),
    "K and V exchanged": (SIGNED, after("probe", lambda dQ, dK, dV: (dQ, dV, dK))),
    "1/sqrt(D/h) forgotten": (SIGNED, after("probe", lambda dQ, dK, dV: ((D / H)**0.5 * dQ, (D / H)**0.5 * dK, dV))),
    "heads exchanged in dQ": (SIGNED, after("probe", lambda dQ, dK, dV: (np.roll(dQ, D // H, 1), dK, dV))),
    "dQ of one image": (SIGNED, after("probe", lambda dQ, dK, dV: (dQ / 2, dK, dV))),
    "groupnorm without its means": (SIGNED, norm_without_means("groupnorm_backward")),
    "layernorm without its means": (replace(SIGNED, norm="token"), norm_without_means("layernorm_backward")),
    "affinities' softmax passed through": (SOFTMAX, {"topk_softmax_backward": lambda dT, cache: cache[0] * dT}),
    "image mean passed through": (IMAGE, {"token_mean_backward": lambda dS, cache: dS}),
    "1/sqrt(R) forgotten after the switches": (IMAGE, after("combine", lambda dX, dS, dU: (dX, R**0.5 * dS, R**0.5 * dU)))}


def layer(config, ops=reference, C=6, seed=0):
    """A CEA layer at a random point, as a pair of plain arrays."""
    rng = np.random.default_rng(seed)
    p = {name: rng.normal(size=shape) for name, shape in ablations.shapes(C, config).items()}
    x = rng.normal(size=(2, 3, 5, C))
    return gradcheck.module(lambda x, p: ablations.forward(x, p, config, ops), ablations.backward, x, p)


@pytest.mark.parametrize("name", SABOTAGE)
def test_wrong_term_inside_cea_fails(name):
    config, changes = SABOTAGE[name]
    assert all(verdict(*layer(config)).values())
    assert not all(verdict(*layer(config, patched(**changes))).values())


def test_the_package_breaks_its_own_on_purpose():
    wrong = list(cases.broken(reference))
    assert len(wrong) == 4
    assert all(not all(verdict(*case).values()) for _, _, *case in wrong)


def test_kink_fails_by_its_slope():
    """|x| at 0 under the claim 0: both central differences agree with it, only the Taylor remainder does not vanish as h^2."""
    (row,) = check_gradients(lambda x: (np.abs(x), ()), lambda dy, cache: 0 * dy, {"x": np.zeros((3, 5, 70))})
    assert row.relative_error < RTOL["right"] and row.taylor_slope < 1.1 and not row.passed


def test_stale_answer_fails_by_its_jacobian():
    """Right for the first upstream gradient and then repeated: no direction sees that, the Jacobian asks for every output."""
    answers = []

    def backward(dy, cache):
        answers.append(dy * np.cos(cache[0]))
        return answers[0]
    assert verdict(lambda x: (np.sin(x), (x,)), backward, {"x": np.linspace(-1, 2, 7)}) == {"x": False}


def test_right_gradient_passes_through_any_settings():
    def backward(dy, cache):
        return dy * np.cos(cache[0])
    for settings in (dict(), dict(seed=5), dict(directions=1), dict(tolerance=1e-8)):
        x = np.linspace(-1, 2, 35).reshape(5, 7)
        assert verdict(lambda x: (np.sin(x), (x,)), backward, {"x": x}, **settings) == {"x": True}


@pytest.mark.parametrize("x", [np.ones((3, 1)), np.ones((50, 41, 1))], ids=["jacobian", "directions"])
def test_right_gradient_that_vanishes_passes(x):
    """A layer norm over one channel forgets its input: zero is the right answer, and no remainder has a slope."""
    verdicts = verdict(lambda x: reference.layernorm(x, np.ones(1), np.ones(1)),
                       lambda dy, cache: reference.layernorm_backward(dy, cache)[0], {"x": x})
    assert verdicts == {"x": True}


# ---- impossible answers are refused, reports can be read ----------------------------------------------------------

@pytest.mark.parametrize("answer, message", [
    (lambda dx, dw, db: (dx, dw.T, db), r"gradient of weight has shape \(4, 3\), expected \(3, 4\)"),
    (lambda dx, dw, db: (dx, dw, db[:, None]), r"gradient of bias has shape \(4, 1\), expected \(4,\)"),
    (lambda dx, dw, db: (dx.sum(), dw, db), r"gradient of x has shape \(\), expected \(2, 5, 3\)"),
    (lambda dx, dw, db: (dx, dw), "2 gradients for 3 arguments"),
    (lambda dx, dw, db: (dx, dw, db, db), "4 gradients for 3 arguments"),
    (lambda dx, dw, db: dx, "1 gradients for 3 arguments"),
    (lambda dx, dw, db: (dx, dw, db * np.nan), "gradient of bias is not finite"),
    (lambda dx, dw, db: (dx + np.inf, dw, db), "gradient of x is not finite")])
def test_impossible_gradients_are_refused(answer, message):
    _, _, forward, backward, inputs = case("linear")
    with pytest.raises(ValueError, match=message):
        check_gradients(forward, lambda dy, cache: answer(*backward(dy, cache)), inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sick", range(1, 15))
def test_forward_that_turns_nan_never_passes(sick):
    """NaN in a single one of the evaluations, whichever it is."""
    calls = []

    def forward(x):
        calls.append(0)
        return (np.full_like(x, np.nan) if len(calls) == 1 + sick else np.sin(x)), (x,)
    try:
        passed = verdict(forward, lambda dy, cache: dy * np.cos(cache[0]), {"x": np.linspace(-1, 2, 35)})
    except (ValueError, np.linalg.LinAlgError):
        return
    assert passed == {"x": False}


def test_rows_hold_what_a_table_needs():
    _, _, forward, backward, inputs = case("probe")
    rows = check_gradients(forward, backward, inputs, seed=3)
    assert [row.argument for row in rows] == ["Q", "K", "V"]
    for row in rows:
        assert row.seed == 3 and row.passed is True
        assert row.method in ("jacobian", "directions")
        assert row.analytic == pytest.approx(row.numeric, rel=RTOL["right"])
        assert 0 <= row.relative_error < RTOL["right"] and row.taylor_slope == pytest.approx(2, abs=0.05)
    assert check_gradients(forward, backward, inputs, seed=3) == rows != check_gradients(forward, backward, inputs, seed=4)


def test_relative_error_is_the_size_of_the_mistake():
    _, _, forward, backward, inputs = case("linear")
    for size in (1e-1, 1e-3, 1e-5, 3e-6):                      # the last too small for the slope: the tolerance alone catches it
        rows = check_gradients(forward, lambda dy, cache: (backward(dy, cache)[0] * (1 + size), *backward(dy, cache)[1:]), inputs)
        assert rows[0].relative_error == pytest.approx(size, rel=0.2)
        assert [row.passed for row in rows] == [False, True, True]


def test_rounding_does_not_choose_the_row_that_is_shown():
    _, _, forward, backward, inputs = case("linear")
    shown = [row.numeric for row in check_gradients(forward, backward, inputs)]
    for rng in map(np.random.default_rng, range(5)):
        def rounded(dy, cache):
            return [g * (1 + 1e-9 * rng.normal(size=g.shape)) for g in backward(dy, cache)]
        np.testing.assert_allclose([row.numeric for row in check_gradients(forward, rounded, inputs)], shown)

        def wrong(dy, cache):
            return [g * (1 + 0.1 * rng.normal(size=g.shape)) for g in backward(dy, cache)]
        for row in check_gradients(forward, wrong, inputs):       # the direction that is wrong most
            assert abs(row.analytic - row.numeric) > 1e-3 * abs(row.numeric)


def test_large_arguments_use_directions_and_small_ones_the_jacobian():
    def method(x):
        return check_gradients(lambda x: (x * x, (x,)), lambda dy, cache: 2 * dy * cache[0], {"x": x})[0].method
    assert method(np.ones((3, 5))) == "jacobian"
    assert method(np.ones((31, 37))) == "directions"


def test_report_is_repeatable_and_shows_the_broken_ones(monkeypatch):
    small = [case for case in cases.cases(reference) if case[0] in OPS or case[0] in ("cea (fast weight)", "nafblock")]
    monkeypatch.setattr(cases, "cases", lambda ops, seed=0: iter(small))
    report = cases.report("cpu", 0)
    assert report == cases.report("cpu", 0)
    assert json.loads(json.dumps(report)) == report
    assert [row["name"] for row in report[:len(small)]] == [case[0] for case in small]
    assert len(report) == len(small) + 4 and all(row["passed"] for row in report)
    assert all(row["relative_error"] > 1e-4 for row in report[len(small):])
    assert report[0].keys() >= {"name", "arguments", "argument", "analytic", "numeric", "relative_error", "taylor_slope", "seed",
                                "tolerance"}


def test_report_shows_a_wrong_operation(monkeypatch):
    name, tolerance, forward, backward, inputs = case("affinity")
    wrong = (name, tolerance, forward, lambda dy, cache: (backward(dy, cache)[0], backward(dy, cache)[1] * 1.001), inputs)
    monkeypatch.setattr(cases, "cases", lambda ops, seed=0: iter([wrong]))
    row = cases.report("reference")[0]
    assert (row["name"], row["argument"], row["passed"]) == ("affinity", "A", False)


# ---- modules -----------------------------------------------------------------------------------------------------------

CONFIGS = [CEAConfig(rank=3, heads=2, affinity=affinity, level=level, static=static, norm=norm, tokens=tokens)
           for affinity in ("signed", "softmax", "topk") for level in ("token", "image") for static in ("", "A", "U", "AU")
           for norm in ("image", "token") for tokens in ("X", "Xhat") if static + tokens != "AUX"]


@pytest.mark.parametrize("config", CONFIGS + [CEAConfig(rank=40, heads=3)],
                         ids=lambda c: "-".join(map(str, (c.affinity, c.level, c.static or "none", c.norm, c.tokens, c.rank))))
def test_fresh_cea_layer_is_the_identity(config):
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        p = {name: np.full(shape, np.nan, dtype) for name, shape in ablations.shapes(6, config).items()}
        cea.init(p, rng)
        x = rng.normal(size=(2, 3, 5, 6)).astype(dtype)
        assert np.array_equal(ablations.forward(x, p, config)[0], x)
        assert all(np.isfinite(value).all() for value in p.values())


def test_fresh_adapters_change_no_image():
    bare = NAFNetConfig(width=8, adapter=None)
    image = np.random.default_rng(0).random((2, 9, 6, 3), np.float32)
    p = nafnet.init(bare, np.random.default_rng(1))
    expected, _ = nafnet.nafnet(image, p, bare)
    config = replace(bare, adapter=CEAConfig())
    q = nafnet.init(config, np.random.default_rng(2))
    copy_into({name: q[name] for name in p}, p, "the network without adapters")
    assert np.array_equal(nafnet.nafnet(image, q, config)[0], expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_parameter_gets_a_gradient(adapter):
    """At a perturbed point: at the start W_U and beta are zero and hide what is behind them."""
    rng, config = np.random.default_rng(0), network(adapter)
    p = nafnet.init(config, rng, np.float64)
    p.flat += rng.normal(0, 0.1, p.flat.shape)
    g = p.zeros_like()
    restored, cache = nafnet.nafnet(rng.random((2, 15, 18, 3 + config.told)), p, config, reference)
    _, c_loss = reference.psnr_loss(restored, rng.random(restored.shape))
    nafnet.nafnet_backward(reference.psnr_loss_backward(1.0, c_loss)[0], cache, g)
    assert not [name for name, value in g.items() if not value.any()]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_are_added_never_written_over(adapter):
    rng, config = np.random.default_rng(0), replace(network(adapter), width=8)
    p = nafnet.init(config, rng, np.float64)
    p.flat += rng.normal(0, 0.1, p.flat.shape)
    image = rng.random((2, 7, 10, 3 + config.told))
    y, cache = nafnet.nafnet(image, p, config, reference)
    once, more = p.zeros_like(), p.zeros_like()
    start = rng.normal(size=more.flat.shape)
    more.flat[...] = start
    dx = nafnet.nafnet_backward(y, cache, once)
    assert np.array_equal(nafnet.nafnet_backward(y, cache, more), dx)              # the cache serves twice
    nothing = [name for name, value in once.items() if not value.any()]
    off = np.abs(more.flat - start - once.flat).max()
    assert not nothing and off < RTOL["same sum in another order"] * np.abs(more.flat).max()


def program_of(name):
    """The names of a program in data/."""
    return runpy.run_path(str(Path(__file__).parents[1] / "data" / name))


def test_the_recognizer_s_gradient_is_right():
    program = program_of("recognizer.py")
    rng, p = np.random.default_rng(0), program["fresh"](("noise", "rain", "haze"), 0, np.float64)
    p.flat += rng.normal(0, 0.1, p.flat.shape)

    def backward(dy, cache):
        g = p.zeros_like()
        program["backward"](dy, cache, g)
        return (g.flat,)
    images = rng.random((2, 8, 12, 3))
    gradcheck.assert_gradients(lambda w: program["forward"](images, p.over(w)), backward, {"w": p.flat})


def test_the_losses_on_summaries_have_right_gradients():
    program, rng = program_of("priors.py"), np.random.default_rng(0)
    z = rng.normal(size=(8, 6)) + 1
    gradcheck.assert_gradients(program["agreement"], lambda dy, cache: (program["agreement_backward"](dy, cache),), {"z": z})
    target = np.eye(5)[[0, 0, 3, 3, 2, 2, 4, 4]]
    target[0] = 0.5, 0, 0.5, 0, 0                             # a composition of two
    gradcheck.assert_gradients(lambda z, W, b: program["naming"](z, W, b, target), program["naming_backward"],
                               {"z": z, "W": rng.normal(size=(6, 5)), "b": rng.normal(size=5)})
    alike = np.repeat(rng.normal(size=(4, 6)), 2, 0)          # partners agree, others do not: as small as it gets
    loss, mixed = (program["agreement"](z)[0] for z in (alike, rng.permutation(alike)))
    assert loss < mixed and loss < 0.3


@pytest.mark.parametrize("adapter", ("cea", "descriptor:sca=false", "none"))
@pytest.mark.parametrize("nominal", (True, False))
def test_a_loss_on_summaries_without_weight_leaves_the_comparison_s_network(adapter, nominal):
    program = program_of("priors.py")
    recipe = training.recipe_for(adapter, batch=8, patch=16, chunks=1, scenes=2, nominal=nominal, warmup=1, lr=0.02)
    progress = training.Progress([training.start(recipe)], [[]])
    batches = [program["named"](recipe, step) for step in range(3)]
    assert all(map(np.array_equal, batches[2][::2], feed.batch(recipe, 2)))
    assert {target.shape[1] for _, target, _ in batches} == {15 if nominal else 16}
    list(training.train_together([recipe], [(degraded, clean) for degraded, _, clean in batches], progress))
    for weight in (0.3, 0):                                   # and with weight it does not
        alone = program["Learner"](recipe, "labels", weight)
        for i, made in enumerate(batches, 1):
            alone.step(i, *made)
        assert (alone.state.p.flat == progress.states[0].p.flat).all() == (weight == 0)
        assert len(alone.heads) == 3 * (4 if adapter == "none" else 3)
        if not nominal:
            continue
        page = " ".join((Path(__file__).parents[1] / "data/README.md").read_text("utf-8").split())
        whose = {"cea": "more parameters for CEA", "none": "for SCA"}.get(adapter, "for the descriptor")
        assert f"{alone.heads.flat.size:,} {whose}" in page


def test_what_a_summary_is_told_and_its_extra_gradient_reach_the_network():
    program, rng = program_of("priors.py"), np.random.default_rng(0)
    config = NAFNetConfig(width=8, adapter=CEAConfig(rank=2))
    p = nafnet.init(config, rng, np.float64)
    p.flat += rng.normal(0, 0.1, p.flat.shape)
    images, extra, said = rng.random((2, 8, 8, 3)), rng.normal(size=(2, 2, 16)), rng.normal(size=(2, 2, 16))

    def forward(w, said):
        ops = program["Watched"](tell=lambda k, Z: said if Z.shape == said.shape else 0 * Z)
        y, cache = nafnet.nafnet(images, p.over(w), config, ops)
        k = next(k for k, Z in enumerate(ops.seen) if Z.shape == extra.shape)
        return (y**2).sum() / 2 + (ops.seen[k] * extra).sum(), (y, cache, ops, k)

    def backward(dloss, cache):
        y, cache, ops, k = cache
        ops.wanted[k], g = dloss * extra, p.zeros_like()
        nafnet.nafnet_backward(dloss * y, cache, g)
        return g.flat, sum(ops.came[k] for k, Z in enumerate(ops.seen) if Z.shape == said.shape)
    gradcheck.assert_gradients(forward, backward, {"w": p.flat, "said": said})


def test_names_are_what_was_done():
    program, (recipe,) = program_of("priors.py"), comparison.grid(["cdd11"], ["cea"], 1, [100])
    labeled, clean = feed.batch(recipe, 0, comparison.told)
    degraded, target, right = program["named"](recipe, 0)
    assert np.array_equal(degraded, labeled[..., :3]) and np.array_equal(clean, right) and (target.sum(1) == 1).all()
    found = [program["names"](recipe)[i] for i in target.argmax(1)]
    said = (labeled[..., 3:] > 0.5).any((1, 2))               # of every part of a composition
    assert [sorted(np.array(comparison.LABELS)[row]) for row in said] == [sorted(entry.split("+")) for entry in found]
    assert any("+" in entry for entry in found)


@pytest.mark.parametrize("loss", ("labels", "truth", "truth-mean", "prior"))
def test_a_taught_network_s_whole_gradient(loss):
    program, recipe = program_of("priors.py"), training.recipe_for("cea", nominal=True)
    rng, learner = np.random.default_rng(0), program["Learner"](recipe, loss, 0.3)
    values = [p.over(rng.normal(0, 0.3, p.flat.size)) for p in (learner.state.p, learner.heads)]
    images, clean = rng.random((2, 4, 16, 16, 3))
    target = np.eye(15)[[0, 3, 3, 7]]

    def forward(network, maps):
        learner.heads = values[1].over(maps)
        learner.state = learner.state._replace(p=values[0].over(network), g=values[0].zeros_like())
        return learner.gradient(images, target, clean)
    gradcheck.assert_gradients(forward, lambda dloss, dheads: (dloss * learner.state.g.flat, dloss * dheads.flat),
                               {"network": values[0].flat, "maps": values[1].flat})


@pytest.mark.parametrize("loss", ("truth", "truth-mean"))
def test_the_truth_is_told_in_training_and_the_own_naming_in_use(loss):
    program, (recipe,) = program_of("priors.py"), comparison.grid(["aio5"], ["cea"], 1, [100])
    learner, (images, target, clean) = program["Learner"](recipe, loss, 0.3), program["named"](recipe, 0)
    rain = np.eye(15, dtype=np.float32)[[comparison.LABELS.index("rain")] * 8]
    before = learner.forward(images)[0]
    np.testing.assert_array_equal(learner.forward(images, rain)[0], before)           # it starts as CEA
    for i in range(1, 4):
        learner.step(i, images, target, clean)
    assert all(learner.heads[f"{k}.E"].any() for k in range(3))
    assert not np.array_equal(learner.forward(images, rain)[0], learner.forward(images)[0])
    learner.heads["0.b"], learner.heads["1.b"], learner.heads["2.b"] = (99 * rain[0],) * 3
    np.testing.assert_allclose(learner.forward(images, rain)[0], learner.forward(images)[0], rtol=1e-6)


def test_image_without_caches_is_the_same_image():
    rng, config = np.random.default_rng(0), NAFNetConfig(width=8)
    p = nafnet.init(config, rng)
    p.flat += rng.normal(0, 0.1, p.flat.shape).astype(np.float32)
    image = rng.random((1, 7, 10, 3), np.float32)
    kept, dropped = (nafnet.nafnet(image, p, config, keep=keep) for keep in (True, False))
    assert np.array_equal(kept[0], dropped[0]) and not dropped[1][0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.affinity}-{c.level}-{c.static or 'none'}-{c.tokens}")
def test_anatomy_is_what_the_layer_added(config):
    forward, _, inputs = layer(replace(config, probe_channels=D))
    y, cache = forward(*inputs.values())
    parts = ablations.anatomy(cache)
    added = np.einsum("bnr,brc->bnc", parts["S"], parts["U"]) / config.rank**0.5
    assert np.abs((y - inputs["x"]).reshape(added.shape) - added).max() < RTOL["same sum in another order"] * np.abs(added).max()
    assert (parts["P"] is None) == (config.static == "AU")


@pytest.mark.parametrize("signed", (False, True))
def test_self_attention_has_right_gradients(signed):
    program, rng = program_of("attention.py"), np.random.default_rng(0)
    config = program["AttentionConfig"](signed, 3)
    p = {name: rng.normal(size=shape) for name, shape in program["shapes"](6, config).items()}
    forward, backward, inputs = gradcheck.module(lambda x, p: program["attention"](x, p, config), program["attention_backward"],
                                                 rng.normal(size=(2, 3, 4, 6)), p)
    gradcheck.assert_gradients(forward, backward, inputs)
