"""The order of a composition of asynchronous-leapfrog steps, found from its fractions.

The composition steps along a vector field of which the Taylor series is known, in power
series of the step, and what it gets is compared power by power: no step has to be chosen
small, and no slope to be fitted.
"""

import functools as ft

import numpy as np


# The vector field is `exp(_A @ z)`, taken componentwise, and `z` starts at zero. All its
# derivatives are there, and nothing in it is symmetric, so no order condition is missed.
_A = np.array(
    [
        [0.71, -0.53, 0.37, 0.29],
        [-0.41, 0.67, 0.59, -0.31],
        [0.47, 0.23, -0.61, 0.43],
        [0.19, -0.73, 0.13, 0.79],
    ]
)


def _field(z: np.ndarray) -> np.ndarray:
    """The vector field at the series `z`; the row `k` of a series belongs to `h^k`."""
    slopes = np.arange(len(z))[:, None] * (z @ _A.T)
    f = np.ones_like(z)
    for k in range(1, len(z)):
        f[k] = np.sum(slopes[1 : k + 1] * f[:k][::-1], axis=0) / k
    return f


def _solution(degree: int) -> np.ndarray:
    """The true solution at `h`."""
    z = np.zeros((degree + 1, len(_A)))
    for k in range(degree):
        z[k + 1] = _field(z[: k + 1])[k] / (k + 1)
    return z


@ft.cache
def _steps(g: tuple[float, ...], degree: int) -> tuple[np.ndarray, np.ndarray]:
    """`z` after two steps, and the values of the vector field in the first.

    Two, since with an odd number of fractions the error of `v` changes its sign with
    each step, so that the second undoes what the first does to `z` by it.
    """
    z = np.zeros((degree + 1, len(_A)))
    v = np.eye(degree + 1, 1) * _field(z)
    stages = []
    with np.errstate(all="ignore"):
        for fraction in 2 * g:
            z[1:] += fraction / 2 * v[:-1]
            stages.append(_field(z))
            v = 2 * stages[-1] - v
            z[1:] += fraction / 2 * v[:-1]
    return z, np.array(stages[: len(g)])


def _first_power(error: np.ndarray, scale: np.ndarray) -> int:
    """The first power of `h` in a series that is not just rounding errors.

    Those are below 1e-14, and the errors of the methods in use above 1e-7."""
    size, scale = np.max(np.abs(error), axis=1), np.max(np.abs(scale), axis=1)
    return int(np.argmin(np.append(size <= 1e-10 * scale, False)))


def order_of(g: tuple[float, ...], order: int) -> int:
    """The order of `z`, or `order`, if it is at least that."""
    z, _ = _steps(g, order)
    true = _solution(order) * 2.0 ** np.arange(order + 1)[:, None]
    # Of a palindromic composition, which has an even order.
    return (_first_power(z - true, true) - 1) // 2 * 2


def error_order_of(g: tuple[float, ...], e: tuple[float, ...], error_order: int) -> int:
    """The power of `h` that the estimate `h sum e_i f_i` goes with, or `error_order`, if
    it is at least that."""
    _, stages = _steps(g, error_order - 1)
    weighted = np.array(e)[:, None, None] * stages
    return _first_power(weighted.sum(0), np.abs(weighted).sum(0)) + 1
