"""Gradients held against finite differences, for any forward/backward pair; it knows no model.

Both are measured on the scalar L(y) = <w, y> + |y|^2 / 2 with w random: its upstream gradient w + y is random (under ones a
softmax has gradient zero), and even a linear op has a second-order term, so that its Taylor remainder is seen to fall as h^2.
Both criteria, and what each of them misses: notebooks/04_gradient_checking.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

STEP = 1e-4                                   # of the central difference, along a direction of length 1, in float64
TAYLOR_STEPS = STEP * 2.0**np.arange(4, 0, -1)
TINY = 600                                    # up to this many entries (outputs times inputs) the whole Jacobian is compared


@dataclass(frozen=True)
class Row:
    """One argument's verdict; analytic and numeric are the directional derivatives that differ most.

    Where none differ by more than the tolerance they are those of the first direction: rounding does not choose.
    """
    argument: str
    method: str
    analytic: float
    numeric: float
    relative_error: float
    taylor_slope: float
    seed: int
    passed: bool


class Report(list):
    """Rows, one per argument, that print as a table."""

    def __repr__(self):
        lines = [f"{'argument':20s} {'analytic':>13s} {'numeric':>13s} {'rel. error':>10s} {'slope':>6s}"]
        lines += [f"{r.argument:20s} {r.analytic:13.6e} {r.numeric:13.6e} {r.relative_error:10.1e} {r.taylor_slope:6.3f}  "
                  + ("ok" if r.passed else "FAILED") for r in self]
        return "\n".join(lines)


def check_gradients(forward: Callable, backward: Callable, inputs: dict, seed: int = 0, directions: int = 4,
                    tolerance: float = 1e-6, slope: float = 1.95) -> Report:
    """Hold a hand-written backward against central differences, one argument at a time.

    forward(*arrays) -> (y, cache); backward(dy, cache) -> one gradient per argument, in order (a lone array for a lone argument).
    inputs: dict, argument name -> float64 array. Each argument x is moved on its own along random unit directions v. It passes
    when the derivatives <dL/dx, v> along all of them have a relative error |analytic - numeric| / max(|analytic|, |numeric|) of
    at most `tolerance`, and the Taylor remainder |L(x + h v) - L(x) - h <dL/dx, v>| falls at least as h^slope. Where outputs
    times inputs are few, the whole Jacobian is held to the same tolerance. Raises ValueError for a wrong count or shape of
    gradients, or a NaN.
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

    rows = Report()
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
        off = abs(analytic - numeric)
        worst = np.argmax(np.where(off <= tolerance * np.linalg.norm(numeric), 0, off))
        rows.append(Row(name, method, float(analytic[worst]), float(numeric[worst]), float(error), float(slope_found), seed,
                        bool(error <= tolerance and slope_found >= slope)))
    return rows


def assert_gradients(forward: Callable, backward: Callable, inputs: dict, **options) -> None:
    """`check_gradients`, and an AssertionError that names the worst argument if one fails."""
    rows = check_gradients(forward, backward, inputs, **options)
    worst = max(rows, key=lambda row: (not row.passed, row.relative_error))
    if not worst.passed:
        raise AssertionError(f"the gradient of {worst.argument} is wrong: relative error {worst.relative_error:.1e}, "
                             f"Taylor slope {worst.taylor_slope:.2f}\n{rows}")


def module(forward, backward, x, p):
    """A module (x, p) -> y as a pair of plain arrays, for `check_gradients` -> forward, backward, inputs."""
    def backward_all(dy, cache):
        g = {name: np.zeros_like(dy, shape=value.shape) for name, value in p.items()}       # where dy lives, on a GPU perhaps
        return backward(dy, cache, g), *g.values()
    return lambda x, *values: forward(x, dict(zip(p, values))), backward_all, {"x": x} | p


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
