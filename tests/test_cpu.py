"""Proves that the cpu room is the reference room: every answer and gradient, however work is cut, laid out, repeated or shared.

`test_ops` holds both rooms to the definitions; here reference is the truth, and only what makes cpu fast is doubted.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Barrier, BrokenBarrierError
from types import FunctionType

import numpy as np
import pytest
from test_ops import LAYOUTS, OPS, OWN, SIZES, _poison, draw, every, naming, pair, several, snapshot

from tinycea.ops import backend, cpu

RTOL = {np.float64: 1e-12, np.float32: 1e-5}              # largest difference over largest value, per tensor

PRIMES = dict(B=5, H=7, W=3, C=11, O=13, R=17, h=2, d=19)
JOINED = dict(B=2, H=12, W=16, C=5, O=7, R=3, h=9, d=4)   # 192 = 3 * 64 pixels: what takes many rows at once finds them
LARGE = dict(B=2, H=97, W=89, C=47, O=5, R=17, h=3, d=7)  # an image is several tiles of the true size
EVERY_SIZE = pytest.mark.parametrize("sizes", [*SIZES.values(), PRIMES, JOINED], ids=[*SIZES, "primes", "joined"])
TILES = (10, 64, 100, 200, 400, 800, 1500, 2**18)         # numbers: from less than one row of an image to all images


def reads_tile(function):
    """Whether the function's code, or that of a function that it names, reads TILE."""
    if isinstance(function, partial):
        return any(map(reads_tile, function.keywords.values()))
    names = function.__code__.co_names
    called = [f for f in map(function.__globals__.get, names) if isinstance(f, FunctionType)]
    return "TILE" in names or any(map(reads_tile, called))


CUT = [case for case in OWN if reads_tile(getattr(cpu, case[0])) or reads_tile(getattr(cpu, case[0] + "_backward"))]
WHOLE = [case for case in OWN if case not in CUT]


@contextmanager
def tiles_of(numbers):
    """Within: cpu's tiles are of that size."""
    with pytest.MonkeyPatch.context() as patch, naming(f"TILE = {numbers}"):
        patch.setattr(cpu, "TILE", numbers)
        yield


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that nobody has written yet reads as NaN."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, lambda *a, _make=getattr(np, name), **k: _poison(_make(*a, **k)))


def answers(room, name, arrays, settings, layout=lambda a: a):
    """y and every gradient (None where an op has no bias), with inputs and upstream gradient of that memory layout."""
    forward, backward = pair(room, name)
    y, cache = forward(*map(layout, arrays), *settings)
    dy = np.random.default_rng(8).normal(size=np.shape(y)).astype(y.dtype)
    return [np.asarray(y), *several(backward(layout(dy) if dy.ndim else dy, cache))]


def agree(mine, right):
    """Tensor by tensor: same dtype and shape, and RTOL; to RTOL itself where all is zero, as layernorm's dx over one channel."""
    for a, b in zip(mine, right, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert np.abs(a - b).max() <= RTOL[b.dtype.type] * (np.abs(b).max() or 1)


def same(name, arrays, settings, layouts={"as drawn": lambda a: a}):
    """cpu's answers, whatever the layout, are reference's."""
    right = answers("reference", name, arrays, settings)
    for layout, laid in layouts.items():
        with naming(layout):
            agree(answers("cpu", name, arrays, settings, laid), right)


# ---- cuts ------------------------------------------------------------------------------------------------------------

def test_the_ops_that_read_tile_are_found():
    assert {"conv3x3", "norm_conv1x1"} <= {name for name, *_ in CUT} and {"linear", "simple_gate"} <= {name for name, *_ in WHOLE}


@every(CUT)
@EVERY_SIZE
def test_every_cut(name, settings, letters, sizes):
    for dtype in RTOL:
        drawn = draw(letters, settings, sizes, dtype)
        right = answers("reference", name, *drawn)
        for tile in TILES:
            with tiles_of(tile):
                agree(answers("cpu", name, *drawn), right)


@every(WHOLE)
@EVERY_SIZE
def test_what_is_not_cut(name, settings, letters, sizes):
    for dtype in RTOL:
        same(name, *draw(letters, settings, sizes, dtype))


@every(CUT)
def test_these_cuts_are_of_every_kind(name, settings, letters, monkeypatch):
    """One to a tile, several, and fewer in the last: of all rows together, or of images and of one image's rows."""
    B, H, W = (PRIMES[letter] for letter in "BHW")
    parts = {B: "images", H: "rows", H * W: "rows", B * H * W: "all rows"}
    seen, cut = {part: set() for part in parts.values()}, cpu._cut

    def noted(n, size):
        slices = cut(n, size)
        lengths = [s.stop - s.start for s in slices]
        if len(lengths) > 1:
            seen[parts[n]] |= {"one" if lengths[0] == 1 else "several", "fewer in the last" if lengths[-1] < lengths[0] else ""}
        return slices
    monkeypatch.setattr(cpu, "_cut", noted)
    for tile in TILES:
        with tiles_of(tile):
            answers("cpu", name, *draw(letters, settings, PRIMES))
    kinds = {"one", "several", "fewer in the last"}
    assert seen["all rows"] >= kinds or seen["images"] >= kinds <= seen["rows"], seen


@pytest.mark.parametrize("B, N, width", [(1, 1, 1), (5, 7, 99), (5, 21, 34), (31, 3, 7), (2, 8633, 47), (3, 97, 12549)])
def test_tiles_are_all_rows_once_and_neither_large_nor_many(B, N, width):
    for tile in (1, *TILES, cpu.TILE):
        with tiles_of(tile):
            times, numbers = np.zeros((B, N), int), []
            for b, n in cpu._tiles(B, N, width):
                times[b, n] += 1
                numbers.append(times[b, n].size * width)
            assert (times == 1).all()
            assert max(numbers) <= 1.5 * max(tile, width)
            assert len(numbers) <= max(1, 3 * times.size * width / tile)


@every(OWN)
def test_tiles_of_the_true_size(name, settings, letters):
    assert len(cpu._tiles(LARGE["B"], LARGE["H"], LARGE["W"] * LARGE["C"])) > LARGE["B"]
    for dtype in RTOL:
        same(name, *draw(letters, settings, LARGE, dtype))


# ---- layouts and settings --------------------------------------------------------------------------------------------

@every(OWN)
@pytest.mark.parametrize("sizes, tile", [(PRIMES, 200), (JOINED, 2**18)], ids=["primes", "joined"])
def test_every_layout(name, settings, letters, sizes, tile):
    for dtype in RTOL:
        with tiles_of(tile):
            same(name, *draw(letters, settings, sizes, dtype), LAYOUTS)


def test_layernorm_takes_another_eps():
    same("layernorm", *draw(dict(x="B N C", weight="C", bias="C"), (0.3,), PRIMES))


# ---- summarize -------------------------------------------------------------------------------------------------------

SUMMARIZE = dict(xhat="B N C", W_K="C D", W_V="C D", Q="R D")


def looks(room, arrays, heads):
    """Z, P and the gradients, P asked for after the backward; not dQ, which is as ill-conditioned as the keys' mean is large."""
    forward, backward = pair(room, "summarize")
    Z, cache = forward(*arrays, heads)
    *gradients, dQ = backward(np.random.default_rng(8).normal(size=Z.shape).astype(Z.dtype), cache)
    assert np.isfinite(dQ).all()
    return Z, backend(room).attention(cache), *gradients


@EVERY_SIZE
def test_attention(sizes):
    for dtype in RTOL:
        arrays, (heads,) = draw(SUMMARIZE, ("h",), sizes, dtype)
        right = looks("reference", arrays, heads)
        for tile in TILES:
            with tiles_of(tile):
                agree(looks("cpu", arrays, heads), right)


@pytest.mark.parametrize("sizes", [PRIMES | {"d": 4}, JOINED], ids=["primes", "joined"])
@pytest.mark.parametrize("offset, spread", [(32, 1), (-32, 1), (1024, 1), (-1024, 1), (0, 256)])
def test_large_logits(sizes, offset, spread):
    """Integers and D/h = 4: both rooms' logits, here up to thousands, are exact, so that the softmax alone is compared."""
    for dtype in RTOL:
        (xhat, W_K, W_V, Q), (heads,) = draw(SUMMARIZE, ("h",), sizes, dtype)
        xhat, W_K, Q = np.rint(xhat), np.rint(W_K), (np.abs(np.rint(Q)) + 1) * spread
        xhat[..., 0], W_K[0] = np.arange(len(xhat))[:, None], W_K[0] + offset      # image b's logits move by 2 b offset or more,
        Q[0] = 0                                                                   # its first query's not at all
        right = looks("reference", (xhat, W_K, W_V, Q), heads)
        for tile in TILES:
            with tiles_of(tile):
                agree(looks("cpu", (xhat, W_K, W_V, Q), heads), right)


# ---- repeated and shared ---------------------------------------------------------------------------------------------

MAPPED = dict(B=2, H=31, W=37, C=11, O=13, R=17, h=3, d=5)   # images over 128 KiB, which malloc places elsewhere than small ones
REPEATS = 5
TURNS = (np.copy, lambda a: np.flip(a).copy())               # other values of the same shapes and strides


def bytes_of(turn, case, dtype=np.float64):
    """The bytes of cpu's answers to one case of OPS."""
    name, settings, letters = case
    return snapshot(answers("cpu", name, *draw(letters, settings, MAPPED, dtype), turn))


@pytest.mark.parametrize("dtype", RTOL)
def test_same_inputs_same_bytes(dtype):
    def all_ops():
        return [bytes_of(np.copy, case, dtype) for case in OPS]
    first = all_ops()
    assert all_ops() == first
    for name, settings, letters in OPS:                      # nothing of the first is left in these, nor of these in the last
        drawn = draw(letters, settings, MAPPED, dtype)
        agree(*(answers(room, name, *drawn, TURNS[1]) for room in ("cpu", "reference")))
    assert all_ops() == first
    cpu.keep_memory()
    assert all_ops() == first


@pytest.fixture
def hasty():
    """Threads take turns as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_two_threads_at_once(hasty):
    with ThreadPoolExecutor(2) as pool:
        for case in OPS:
            right = [bytes_of(turn, case) for turn in TURNS]
            mine = pool.map(lambda turn: [bytes_of(turn, case) for _ in range(REPEATS)], TURNS)
            assert list(mine) == [[answer] * REPEATS for answer in right]


def test_two_threads_in_step():
    """Each goes on to cpu's next instruction only with the other: whatever they shared, one would read as the other left it."""
    def trace(frame, event, argument):
        if frame.f_globals is vars(cpu):
            frame.f_trace_opcodes = True
            with suppress(BrokenBarrierError):               # the other has returned
                step.wait()
            return trace

    def traced(turn):
        sys.settrace(trace)
        try:
            return bytes_of(turn, case)
        finally:
            sys.settrace(None)
            step.abort()

    with ThreadPoolExecutor(2) as pool:
        for case in OPS:
            step = Barrier(2)
            assert list(pool.map(traced, TURNS)) == [bytes_of(turn, case) for turn in TURNS]
