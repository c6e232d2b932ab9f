"""Proves every operation: each equals a loop written here from its definition, and each backward equals central differences.

The loops share nothing with the package: plain indices, one number at a time.
"""
import math
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

from tinycea import ablations, gradcheck
from tinycea import cases as own_cases
from tinycea.ablations import CEAConfig
from tinycea.adapters import FAMILIES
from tinycea.ops import backend, cpu, reference
from tinycea.runtime import InputError

# largest difference over largest value, per tensor
RTOL = {np.float64: 1e-12, np.float32: 3e-6}             # an operation
GRADIENT = {np.float64: 1e-12, np.float32: 3e-5}         # its gradients: a float32 one adds the forward's rounding to its own
MODULE = {np.float64: 1e-10, np.float32: 3e-4}           # through a whole layer or network
SEEDS = (0, 1, 2)

SIZES = {"odd": dict(B=3, H=5, W=7, C=9, O=11, R=13, h=15, d=17),
         "ones": dict(B=1, H=1, W=1, C=1, O=1, R=1, h=1, d=1),
         "a column": dict(B=5, H=3, W=1, C=7, O=1, R=2, h=1, d=3),
         "a row": dict(B=1, H=1, W=9, C=3, O=5, R=7, h=5, d=1)}


def close(a, b, rtol):
    """Same shape, and the largest difference at most rtol of the largest value."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= rtol * np.abs(b).max(), np.abs(a - b).max() / np.abs(b).max()


# ---- the definitions, as loops ---------------------------------------------------------------------------------------

def fill(shape, value):
    """The array whose entry at each index is value(*index)."""
    return np.array([value(*at) for at in np.ndindex(*shape)], float).reshape(shape)


def dot(a, b):
    return math.fsum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def softmax(logits):
    top = max(logits)
    e = [math.exp(value - top) for value in logits]
    return [value / math.fsum(e) for value in e]


def loop_linear(x, weight, bias=None):
    return fill((*x.shape[:-1], weight.shape[1]),
                lambda *at: dot(x[at[:-1]], weight[:, at[-1]]) + (0 if bias is None else bias[at[-1]]))


def loop_conv1x1(x, weight, bias=None):
    return loop_linear(x, weight.reshape(weight.shape[:2]).T, bias)


def loop_layernorm(x, weight, bias):
    def value(*at):
        token, c = [float(t) for t in x[at[:-1]]], at[-1]
        mean = math.fsum(token) / len(token)
        variance = math.fsum((t - mean)**2 for t in token) / len(token)
        return (token[c] - mean) / math.sqrt(variance + 1e-6) * weight[c] + bias[c]
    return fill(x.shape, value)


def loop_groupnorm(x, weight, bias):
    y = np.empty_like(x)
    for b in range(len(x)):
        values = [float(t) for t in x[b].ravel()]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((t - mean)**2 for t in values) / len(values) + 1e-6)
        y[b] = [[(t - mean) / std * w + c for t, w, c in zip(token, weight, bias)] for token in x[b].reshape(-1, x.shape[-1])] \
            if x.ndim == 3 else loop_groupnorm(x[b:b + 1].reshape(1, -1, x.shape[-1]), weight, bias).reshape(x[b].shape)
    return y


def around(x, b, h, w, c):
    """The 3 x 3 neighborhood of a pixel, row by row, zero outside the image."""
    return [x[b, i, j, c] if 0 <= i < x.shape[1] and 0 <= j < x.shape[2] else 0.
            for i in (h - 1, h, h + 1) for j in (w - 1, w, w + 1)]


def loop_conv3x3(x, weight, bias):
    return fill((*x.shape[:3], weight.shape[0]), lambda b, h, w, o: bias[o] + math.fsum(
        dot(around(x, b, h, w, c), weight[o, c].ravel()) for c in range(x.shape[3])))


def loop_depthwise3x3(x, weight, bias):
    return fill(x.shape, lambda b, h, w, c: bias[c] + dot(around(x, b, h, w, c), weight[c, 0].ravel()))


def loop_gated_depthwise3x3(x, weight, bias):
    return loop_simple_gate(loop_depthwise3x3(x, weight, bias))


def loop_down2x2(x, weight, bias):
    B, H, W, C = x.shape
    return fill((B, H // 2, W // 2, len(weight)), lambda b, h, w, o: bias[o] + math.fsum(
        float(x[b, 2 * h + i, 2 * w + j, c]) * float(weight[o, c, i, j]) for c, i, j in np.ndindex(C, 2, 2)))


def loop_pixel_shuffle(x, f=2):
    B, H, W, C = x.shape
    return fill((B, H * f, W * f, C // f**2), lambda b, h, w, c: x[b, h // f, w // f, c * f * f + h % f * f + w % f])


def loop_pixel_unshuffle(x, f=2):
    B, H, W, C = x.shape
    return fill((B, H // f, W // f, C * f**2), lambda b, h, w, k: x[b, f * h + k // f % f, f * w + k % f, k // f**2])


def loop_simple_gate(x):
    C = x.shape[-1] // 2
    return fill((*x.shape[:-1], C), lambda *at: x[at] * x[(*at[:-1], at[-1] + C)])


def loop_global_average_pool(x):
    return fill((x.shape[0], 1, 1, x.shape[3]), lambda b, i, j, c: math.fsum(x[b, :, :, c].ravel()) / (x.shape[1] * x.shape[2]))


def loop_norm_conv1x1(x, norm_weight, norm_bias, weight, bias):
    return loop_conv1x1(loop_layernorm(x, norm_weight, norm_bias), weight, bias)


def loop_scale_channels(x, scale):
    return fill(x.shape, lambda b, h, w, c: x[b, h, w, c] * scale[b, 0, 0, c])


def loop_probe(Q, K, V, heads):
    (R, D), (B, N, _) = Q.shape, K.shape
    d = D // heads
    Z = np.empty((B, R, D))
    for b, r, head in np.ndindex(B, R, heads):
        mine = slice(head * d, (head + 1) * d)
        P = softmax([dot(Q[r, mine], K[b, n, mine]) / math.sqrt(d) for n in range(N)])
        Z[b, r, mine] = [dot(P, V[b, :, head * d + i]) for i in range(d)]
    return Z


def loop_summarize(xhat, W_K, W_V, Q, heads):
    return loop_probe(Q, loop_linear(xhat, W_K), loop_linear(xhat, W_V), heads)


def loop_affinity(xhat, A):
    return fill((*xhat.shape[:2], A.shape[1]), lambda b, n, r: dot(xhat[b, n], A[b, r]) / math.sqrt(A.shape[2]))


def loop_combine(x, S, U):
    return fill(x.shape, lambda b, n, c: x[b, n, c] + dot(S[b, n], U[b, :, c]) / math.sqrt(U.shape[1]))


def loop_assembly(x, xhat, A, U):
    return loop_combine(x, loop_affinity(xhat, A), U)


def loop_topk_softmax(S, k):
    def row(s):
        kept = [value if value >= sorted(s)[-k] else -math.inf for value in s]
        return softmax(kept)
    return np.array([[row(list(s)) for s in image] for image in S])


def loop_token_mean(S):
    return fill(S.shape, lambda b, n, r: math.fsum(S[b, :, r]) / S.shape[1])


def loop_resize(x, H, W):
    def cells(i, n, size):
        """Between which two of `size` cells pixel i of n lies, and how near to each."""
        place = min(max((i + 0.5) * size / n - 0.5, 0), size - 1)
        low = math.floor(place)
        return (low, 1 - (place - low)), (min(low + 1, size - 1), place - low)
    return fill((len(x), H, W, x.shape[3]), lambda b, h, w, c: math.fsum(
        near_i * near_j * float(x[b, i, j, c]) for i, near_i in cells(h, H, x.shape[1]) for j, near_j in cells(w, W, x.shape[2])))


def loop_keep_topk(p, k):
    return fill(p.shape, lambda *at: p[at] if p[at] >= sorted(p[at[:-1]])[-k] else 0)


def loop_gate_experts(S, G):
    r = S.shape[2] // G.shape[2]
    return fill(S.shape, lambda b, n, e: S[b, n, e] * G[b, n if G.shape[1] > 1 else 0, e // r])


def loop_load_balance(p):
    load = [math.fsum(p[..., e].ravel()) for e in range(p.shape[-1])]
    mean = math.fsum(load) / len(load)
    return math.fsum((I - mean)**2 for I in load) / len(load) / mean**2 / 2


def loop_psnr_loss(pred, target, eps=1e-8):
    def mse(p, t):
        return math.fsum((a - b)**2 for a, b in zip(p.ravel(), t.ravel())) / p.size
    return math.fsum(10 * math.log10(mse(p, t) + eps) for p, t in zip(pred, target)) / len(pred)


def own(name):
    """Whether cpu has a version of its own of an op or of its backward; the others are the very functions of reference."""
    return any(getattr(cpu, door) is not getattr(reference, door) for door in (name, name + "_backward"))


# name, settings, inputs by their letters
IMAGE, TOKENS = "B H W C", "B N C"
OPS = [("linear", (), dict(x=TOKENS, weight="C O", bias="O")),
       ("linear", (), dict(x=IMAGE, weight="C O")),
       ("conv1x1", (), dict(x=IMAGE, weight="O C 1 1", bias="O")),
       ("conv1x1", (), dict(x=IMAGE, weight="O C 1 1")),
       ("layernorm", (), dict(x=TOKENS, weight="C", bias="C")),
       ("layernorm", (), dict(x=IMAGE, weight="C", bias="C")),
       ("groupnorm", (), dict(x=TOKENS, weight="C", bias="C")),
       ("groupnorm", (), dict(x=IMAGE, weight="C", bias="C")),
       ("norm_conv1x1", (), dict(x=IMAGE, norm_weight="C", norm_bias="C", weight="O C 1 1", bias="O")),
       ("conv3x3", (), dict(x=IMAGE, weight="O C 3 3", bias="O")),
       ("depthwise3x3", (), dict(x=IMAGE, weight="C 1 3 3", bias="C")),
       ("gated_depthwise3x3", (), dict(x="B H W 2C", weight="2C 1 3 3", bias="2C")),
       ("down2x2", (), dict(x="B 2H 2W C", weight="O C 2 2", bias="O")),
       ("pixel_shuffle", (), dict(x="B H W 4C")),
       ("pixel_shuffle", (3,), dict(x="B H W 9C")),
       ("pixel_unshuffle", (), dict(x="B 2H 2W C")),
       ("pixel_unshuffle", (3,), dict(x="B 3H 3W C")),
       ("simple_gate", (), dict(x="B H W 2C")),
       ("global_average_pool", (), dict(x=IMAGE)),
       ("scale_channels", (), dict(x=IMAGE, scale="B 1 1 C")),
       ("probe", ("h",), dict(Q="R D", K="B N D", V="B N D")),
       ("summarize", ("h",), dict(xhat=TOKENS, W_K="C D", W_V="C D", Q="R D")),
       ("affinity", (), dict(xhat=TOKENS, A="B R C")),
       ("combine", (), dict(x=TOKENS, S="B N R", U="B R C")),
       ("assembly", (), dict(x=TOKENS, xhat=TOKENS, A="B R C", U="B R C")),
       ("fast_weight", (), dict(x=TOKENS, xhat=TOKENS, A="B R C", U="B R C")),
       ("topk_softmax", (1,), dict(S="B N R")),
       ("topk_softmax", ("R",), dict(S="B N R")),
       ("topk_softmax", (3,), dict(S="B N 5R")),
       ("token_mean", (), dict(S="B N R")),
       ("resize", (11, 4), dict(x=IMAGE)),
       ("resize", ("h", 2), dict(x=IMAGE)),
       ("keep_topk", (1,), dict(p="B N R")),
       ("keep_topk", (3,), dict(p="B N 5R")),
       ("gate_experts", (), dict(S="B N 6R", G="B N 2R")),
       ("gate_experts", (), dict(S="B N 6R", G="B 1 2R")),
       ("load_balance", (), dict(p="B N 2")),
       ("psnr_loss", (), dict(pred=IMAGE, target=IMAGE))]
LOOPS = {name[5:]: value for name, value in list(globals().items()) if name.startswith("loop_")} | {"fast_weight": loop_assembly}
OWN = [case for case in OPS if own(case[0])]
EVERY_BACKEND = pytest.mark.parametrize("room", ("reference", "cpu"))


def every(cases):
    """Parametrizes by (name, settings, letters), with the room in front or without."""
    names = "room, name, settings, letters" if len(cases[0]) == 4 else "name, settings, letters"
    return pytest.mark.parametrize(names, cases, ids=["-".join(head) + str(s or "") for *head, s, _ in cases])


EVERY_OP = every([("reference", *case) for case in OPS] + [("cpu", *case) for case in OWN])


@contextmanager
def naming(where):
    """Within, in a test that goes through several sizes, layouts or seeds: an error says at which it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at {where}")
        raise


def draw(letters, settings, sizes, dtype=np.float64):
    """Random inputs of the shapes spelled in letters ("B 2H 2W C") -> list of arrays, settings."""
    s = {"N": sizes["H"] * sizes["W"], "D": sizes["h"] * sizes["d"]} | sizes
    rng = np.random.default_rng(7)

    def size(word):
        return int(word) if word.isdigit() else int(word[:-1] or 1) * s[word[-1]]
    arrays = [rng.normal(size=[size(word) for word in words.split()]).astype(dtype) for words in letters.values()]
    return arrays, [s.get(value, value) for value in settings]


def pair(room, name):
    ops = backend(room)
    return getattr(ops, name), getattr(ops, name + "_backward")


def several(gradients):
    return gradients if isinstance(gradients, tuple) else (gradients,)


def run(room, name, arrays, settings):
    """y and every gradient (None where an op has no bias) under a fixed upstream gradient."""
    forward, backward = pair(room, name)
    y, cache = forward(*arrays, *settings)
    dy = np.random.default_rng(8).normal(size=np.shape(y)).astype(y.dtype) if np.ndim(y) else 1.0
    return y, several(backward(dy, cache))[:len(arrays)]


def test_every_op_has_a_loop_and_a_backward():
    names = {name for name in vars(reference) if name + "_backward" in vars(reference)}
    assert names == set(LOOPS) == {name for name, *_ in OPS}
    assert all(hasattr(backend(room), name + "_backward") for room in ("reference", "cpu") for name in names)


def test_unknown_backend_is_refused():
    with pytest.raises(InputError, match="tpu.*reference"):
        backend("tpu")


@EVERY_OP
def test_forward_is_its_loop(room, name, settings, letters):
    for where, sizes in SIZES.items():
        for dtype, rtol in RTOL.items():
            arrays, values = draw(letters, settings, sizes, dtype)
            with naming(where):
                y, _ = pair(room, name)[0](*arrays, *values)
                assert y.dtype == dtype
                close(y, LOOPS[name](*(a.astype(np.float64) for a in arrays), *values), rtol)


@EVERY_OP
def test_gradients_keep_dtype_and_shape_and_agree_with_reference(room, name, settings, letters):
    for where, sizes in SIZES.items():
        arrays, values = draw(letters, settings, sizes)
        _, expected = run("reference", name, arrays, values)
        for dtype, rtol in GRADIENT.items():
            with naming(where):
                _, gradients = run(room, name, [a.astype(dtype) for a in arrays], values)
                for array, gradient, right in zip(arrays, gradients, expected, strict=True):
                    assert gradient.dtype == dtype and gradient.shape == array.shape
                    scale = max(np.abs(right).max(), 1e-3)     # layernorm over one channel: every dx is zero
                    assert np.abs(gradient - right).max() <= rtol * scale


LAYOUTS = {"transposed": lambda a: np.ascontiguousarray(a.T).T,
           "every second": lambda a: np.repeat(a, 2, -1)[..., ::2],
           "reversed": lambda a: a[::-1].copy()[::-1],
           "a window": lambda a: np.pad(a, 1, constant_values=np.nan)[(slice(1, -1),) * a.ndim]}


@EVERY_OP
def test_memory_layout_changes_nothing(room, name, settings, letters):
    arrays, values = draw(letters, settings, SIZES["odd"])
    forward, backward = pair(room, name)
    y, cache = forward(*arrays, *values)
    dy = np.random.default_rng(8).normal(size=np.shape(y))
    gradients = several(backward(dy, cache))
    for where, layout in LAYOUTS.items():
        with naming(where):
            y2, cache2 = forward(*map(layout, arrays), *values)
            close(y2, y, RTOL[np.float64])
            for a, b in zip(several(backward(layout(dy) if dy.ndim else dy, cache2)), gradients):
                assert (a is None) == (b is None)
                if b is not None:
                    close(a, b, RTOL[np.float64])


# ---- caches, memory, dtype: all pairs, modules too ----------------------------------------------------------------

def arrays_of(thing):
    """Every array in nested tuples and lists."""
    if isinstance(thing, np.ndarray):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from arrays_of(part)


def snapshot(thing):
    return [array.tobytes() for array in arrays_of(thing)]


MODULES = (*FAMILIES, "nafblock", "nafnet")
CASES = [case[0] for case in own_cases.cases(reference)]
OWN_CASES = [i for i, name in enumerate(CASES) if name.startswith(MODULES) or own(name.split()[0])]
ROOM_CASES = [("reference", i) for i in range(len(CASES))] + [("cpu", i) for i in OWN_CASES]
EVERY_CASE = pytest.mark.parametrize("room, number", ROOM_CASES, ids=[f"{room}-{CASES[i]}" for room, i in ROOM_CASES])


@cache
def cases(room, seed):
    """tinycea's own pairs, their inputs not to be written to."""
    found = list(own_cases.cases(backend(room), seed))
    for *_, inputs in found:
        for array in inputs.values():
            array.setflags(write=False)
    return found


def case(room, number, seed=0):
    return cases(room, seed)[number]


@EVERY_CASE
def test_inputs_and_caches_are_never_modified(room, number, monkeypatch):
    for name in ("empty", "empty_like"):                       # memory that nobody has written yet reads as NaN
        monkeypatch.setattr(np, name, lambda *a, _make=getattr(np, name), **k: _poison(_make(*a, **k)))
    _, _, forward, backward, inputs = case(room, number)
    arrays = [a.copy() for a in inputs.values()]
    y, cache = forward(*arrays)
    assert isinstance(cache, tuple) and np.isfinite(y).all()
    dy = np.random.default_rng(3).normal(size=np.shape(y))
    before = snapshot([arrays, dy, cache]), np.asarray(y).tobytes()
    gradients = several(backward(dy, cache))
    assert all(np.isfinite(g).all() for g in gradients if g is not None)
    first = snapshot(list(gradients))
    assert snapshot(list(several(backward(dy, cache)))) == first
    assert (snapshot([arrays, dy, cache]), np.asarray(y).tobytes()) == before
    assert [a.tobytes() for a in arrays] == [a.tobytes() for a in inputs.values()]
    assert np.array_equal(forward(*arrays)[0], y)


def _poison(array):
    if array.dtype.kind == "f":
        array.fill(np.nan)
    return array


@EVERY_CASE
def test_float32_in_float32_out(room, number):
    _, _, forward, backward, inputs = case(room, number)
    y64, cache64 = forward(*inputs.values())
    y, cache = forward(*(a.astype(np.float32) for a in inputs.values()))
    assert y.dtype == np.float32
    close(y, y64, MODULE[np.float32])
    dy = np.random.default_rng(3).normal(size=np.shape(y)) if np.ndim(y) else 1.0
    right = several(backward(dy, cache64))
    gradients = several(backward(dy.astype(np.float32) if np.ndim(y) else dy, cache))
    module = CASES[number].startswith(MODULES)       # these add into g, here of float64
    assert all(a.dtype == np.float32 for a in gradients[:1 if module else None])
    for a, b in zip(gradients, right, strict=True):
        close(a, b, MODULE[np.float32])


def central_differences(numbers):
    """(room, number) of so many cases, the networks slow."""
    return [pytest.param(room, i, id=f"{room}-{CASES[i]}", marks=[pytest.mark.slow] * CASES[i].startswith("nafnet"))
            for room, i in numbers]


@pytest.mark.parametrize("room, number", central_differences(ROOM_CASES))
def test_backward_is_the_central_difference(room, number):
    """Reference's with three seeds; the whole network, and the cpu room, which is held to reference besides, with one."""
    for seed in SEEDS if room == "reference" and not CASES[number].startswith("nafnet") else SEEDS[:1]:
        _, tolerance, forward, backward, inputs = case(room, number, seed)
        rows = gradcheck.check_gradients(forward, backward, inputs, seed, tolerance=tolerance)
        assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("number", OWN_CASES, ids=[CASES[i] for i in OWN_CASES])
def test_cpu_is_reference(number):
    answers = []
    for room in ("reference", "cpu"):
        _, _, forward, backward, inputs = case(room, number)
        y, cache = forward(*inputs.values())
        answers.append((y, *several(backward(np.random.default_rng(3).normal(size=np.shape(y)), cache))))
    for right, mine in zip(*answers, strict=True):
        close(mine, right, (MODULE if CASES[number].startswith(MODULES) else RTOL)[np.float64])


# ---- what the mathematics promises ------------------------------------------------------------------------------------

def parts(B=3, N=11, C=5, R=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, N, C)), rng.normal(size=(B, N, C)), rng.normal(size=(B, R, C)), rng.normal(size=(B, R, C))


@EVERY_BACKEND
@pytest.mark.parametrize("sizes", [(3, 11, 5, 7), (1, 97, 3, 9), (2, 5, 9, 1), (1, 1, 1, 1)])
def test_both_orders_of_the_assembly_agree(room, sizes):
    ops, (x, xhat, A, U) = backend(room), parts(*sizes)
    S, c_S = ops.affinity(xhat, A)
    Y, c_Y = ops.combine(x, S, U)
    Y_fast, c_fast = ops.fast_weight(x, xhat, A, U)
    close(Y_fast, Y, RTOL[np.float64])
    dY = np.random.default_rng(4).normal(size=Y.shape)
    dx, dS, dU = ops.combine_backward(dY, c_Y)
    dxhat, dA = ops.affinity_backward(dS, c_S)
    for fast, slow in zip(ops.fast_weight_backward(dY, c_fast), (dx, dxhat, dA, dU), strict=True):
        close(fast, slow, RTOL[np.float64])


@pytest.mark.parametrize("N, R, C", [
    (7, 2, 5), (40, 5, 3), (4096, 8, 24), (4096, 13, 24), (8, 4, 4), (1, 9, 1), (1, 1, 1), (1, 2, 3)])
def test_assembly_takes_the_cheaper_order(N, R, C, monkeypatch):
    fast = R * C * C + N * C * C < N * R * C + N * R * C       # A^T U then xhat M, against xhat A^T then S U
    taken = []
    for name in ("fast_weight", "affinity", "combine"):
        monkeypatch.setattr(reference, name, lambda *a, _name=name, _op=getattr(reference, name): taken.append(_name) or _op(*a))
    reference.assembly(*parts(1, N, C, R))
    assert taken == (["fast_weight"] if fast else ["affinity", "combine"])


ASSEMBLY = pytest.mark.parametrize("sizes", [(3, 11, 9, 2), (3, 40, 3, 7)], ids=["tokens first", "fast weight"])


@EVERY_BACKEND
@ASSEMBLY
def test_assembly_symmetries(room, sizes):
    """Tokens may be permuted, the residual is odd in A and in U, and A -> G^-T A, U -> G U is no change at all."""
    def residual(*arrays):
        return backend(room).assembly(*arrays)[0] - arrays[0]
    x, xhat, A, U = parts(*sizes)
    R, order, rtol = sizes[3], np.random.default_rng(5).permutation(sizes[1]), RTOL[np.float64]
    right = residual(x, xhat, A, U)
    close(residual(x[:, order], xhat[:, order], A, U), right[:, order], rtol)
    close(residual(x, xhat, -A, U), -right, rtol)
    close(residual(x, xhat, A, -U), -right, rtol)
    close(residual(x, -xhat, A, U), -right, rtol)
    G = np.eye(R) + np.random.default_rng(6).normal(size=(R, R)) / (4 * R)
    close(residual(x, xhat, np.linalg.inv(G).T @ A, G @ U), right, rtol)
    assert not np.allclose(residual(x, xhat, G @ A, G @ U), right)      # the test can fail


@EVERY_BACKEND
def test_probe_sees_a_set_of_tokens(room):
    """Shuffling the tokens leaves Z as it is and shuffles P; shifting every key leaves both."""
    ops, rng = backend(room), np.random.default_rng(0)
    Q, K, V = rng.normal(size=(5, 6)), rng.normal(size=(3, 11, 6)), rng.normal(size=(3, 11, 6))
    order = rng.permutation(11)
    Z, cache = ops.probe(Q, K, V, 3)
    Z2, cache2 = ops.probe(Q, K[:, order], V[:, order], 3)
    assert cache[-1].shape == (3, 3, 5, 11)
    close(cache[-1].sum(-1), np.ones((3, 3, 5)), RTOL[np.float64])
    close(Z2, Z, RTOL[np.float64])
    close(cache2[-1], cache[-1][..., order], RTOL[np.float64])
    close(ops.probe(Q, K + rng.normal(size=6), V, 3)[0], Z, GRADIENT[np.float64])
    assert not np.allclose(ops.probe(Q, K[:, order], V, 3)[0], Z)
    (dQ, dK, dV), (dQ2, dK2, dV2) = ops.probe_backward(Z, cache), ops.probe_backward(Z2, cache2)
    close(dQ2, dQ, GRADIENT[np.float64])
    close(dK2, dK[:, order], GRADIENT[np.float64])
    close(dV2, dV[:, order], GRADIENT[np.float64])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", RTOL)
def test_softmaxes_survive_large_logits(room, dtype):
    ops = backend(room)
    Q, K, V = (np.full(shape, 1e3, dtype) for shape in ((2, 4), (1, 3, 4), (1, 3, 4)))
    close(ops.probe(Q, K, V, 2)[0], np.full((1, 2, 4), 1e3), RTOL[dtype])
    S = np.array([[[1e4, 1e4, -1e4]]], dtype)
    close(ops.topk_softmax(S, 3)[0], [[[0.5, 0.5, 0]]], RTOL[dtype])


@EVERY_BACKEND
def test_topk_keeps_equal_affinities_together(room):
    ops = backend(room)
    S = np.array([[[3., 3., 1., 0.], [0., 2., 2., 5.], [1., 1., 1., 1.]]])
    close(ops.topk_softmax(S, 1)[0][0, 0], [0.5, 0.5, 0, 0], RTOL[np.float64])
    close(ops.topk_softmax(S, 2)[0], loop_topk_softmax(S, 2), RTOL[np.float64])
    assert (ops.topk_softmax(np.random.default_rng(0).normal(size=(2, 7, 5)), 2)[0] > 0).sum(-1).tolist() == [[2] * 7] * 2


@EVERY_BACKEND
def test_shuffles_are_inverse(room):
    ops = backend(room)
    x = np.random.default_rng(0).normal(size=(3, 10, 14, 5))
    assert np.array_equal(ops.pixel_shuffle(ops.pixel_unshuffle(x)[0])[0], x)


@EVERY_BACKEND
def test_the_loss_at_a_perfect_restoration(room):
    forward, backward = pair(room, "psnr_loss")
    x = np.random.default_rng(0).random((2, 3, 5, 1))
    y, cache = forward(x, x)
    assert y == pytest.approx(-80, rel=RTOL[np.float64])
    assert not np.any(backward(1.0, cache))


# ---- the whole layer, from DESIGN's equations alone ----------------------------------------------------------------------

@pytest.mark.parametrize("affinity", ["signed", "softmax", "topk"])
@pytest.mark.parametrize("level", ["token", "image"])
@pytest.mark.parametrize("static, tokens", [("", "Xhat"), ("A", "Xhat"), ("U", "Xhat"), ("AU", "Xhat"), ("", "X"), ("A", "X")])
@pytest.mark.parametrize("norm", ["image", "token"])
def test_cea_against_loops(affinity, level, static, tokens, norm):
    B, H, W, C, R, D, h, k = 3, 5, 7, 9, 4, 6, 2, 2
    config = CEAConfig(rank=R, heads=h, probe_channels=D, affinity=affinity, topk=k, level=level, static=static,
                       norm=norm, tokens=tokens)
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=shape) for name, shape in ablations.shapes(C, config).items()}
    x = rng.normal(size=(B, H, W, C))
    y, cache = ablations.forward(x, p, config)
    seen = ablations.anatomy(cache)
    for b in range(B):
        X = [x[b, i, j] for i in range(H) for j in range(W)]
        every = np.ravel(X)
        moments = [(t.mean(), t.var()) if norm == "token" else (every.mean(), every.var()) for t in X]
        Xhat = [(t - mean) / (var + 1e-6) ** 0.5 * p["norm.weight"] + p["norm.bias"] for t, (mean, var) in zip(X, moments)]
        A, U = np.array(p.get("A", np.zeros((R, C)))), np.array(p.get("U", np.zeros((R, C))))
        for r in range(R if static != "AU" else 0):
            Z = np.zeros(D)
            for part in range(h):
                c = slice(part * D // h, (part + 1) * D // h)
                e = np.array([np.exp((t @ p["W_K"])[c] @ p["Q"][r, c] / (D / h) ** 0.5) for t in Xhat])
                close(seen["P"][b, part, r], e / e.sum(), 1e-10)
                Z[c] = sum(w * (t @ p["W_V"])[c] for w, t in zip(e / e.sum(), Xhat))
            A[r] = A[r] if "A" in static else Z @ p["W_A"]
            U[r] = U[r] if "U" in static else Z @ p["W_U"]
        S = np.array([[t @ A[r] / C**0.5 for r in range(R)] for t in (X if tokens == "X" else Xhat)])
        for n in range(len(S) if affinity != "signed" else 0):
            kept = np.argsort(S[n])[-(k if affinity == "topk" else R):]
            e = np.array([np.exp(S[n, r]) if r in kept else 0 for r in range(R)])
            S[n] = e / e.sum()
        S = S if level == "token" else np.array([S.mean(0)] * len(S))
        close(y[b].reshape(-1, C), [t + sum(S[n, r] * U[r] for r in range(R)) / R**0.5 for n, t in enumerate(X)], 1e-10)
        for name, value in (("S", S), ("A", A), ("U", U)):
            close(seen[name][b], value, 1e-10)


def test_layers_take_strided_features():
    config = CEAConfig(rank=3, heads=3)
    rng = np.random.default_rng(1)
    p = {name: rng.normal(size=shape) for name, shape in ablations.shapes(9, config).items()}
    x = rng.normal(size=(9, 7, 5, 2)).T                       # (2,5,7,9), channels slowest
    y, cache = ablations.forward(x, p, config)
    z, other = ablations.forward(np.ascontiguousarray(x), p, config)
    close(y, z, 1e-12)
    dy = rng.normal(size=(9, 7, 5, 2)).T
    g, h = ({name: np.zeros_like(value) for name, value in p.items()} for _ in range(2))
    close(ablations.backward(dy, cache, g), ablations.backward(np.ascontiguousarray(dy), other, h), 1e-11)
    for name in p:
        close(g[name], h[name], 1e-11)


def test_the_loss_refuses_what_would_broadcast():
    with pytest.raises(InputError, match="expected the same"):
        reference.psnr_loss(np.ones((2, 2, 2, 3)), np.ones((2, 1, 1, 3)))


@pytest.mark.parametrize("shape", [(4, 9), (1, 0, 3, 9), (1, 2, 3, 8)])
def test_cea_refuses_other_shapes(shape):
    config = CEAConfig(rank=3, heads=3)
    with pytest.raises(InputError, match="expected"):
        ablations.forward(np.zeros(shape), {name: np.zeros(s) for name, s in ablations.shapes(9, config).items()}, config)
