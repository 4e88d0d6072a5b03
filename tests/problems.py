"""Differential equations on which the solvers are measured."""

import math
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp


class Problem(NamedTuple):
    """`vector_field` takes and returns a list of numbers."""

    name: str
    vector_field: Callable
    y0: tuple[float, ...]
    t1: float

    @property
    def term(self):
        def vector_field(t, y, args):
            del args
            return jnp.stack(self.vector_field(jnp, t, y))

        return diffrax.ODETerm(vector_field)

    @property
    def start(self):
        return jnp.array(self.y0)

    def exact(self, ts) -> np.ndarray:
        """The solution, to within a few units of rounding."""
        solution = solve_ivp(
            lambda t, y: self.vector_field(np, t, y),
            (0.0, float(ts[-1])),
            self.y0,
            method="DOP853",
            rtol=2.3e-14,
            atol=1e-15,
            t_eval=ts,
        )
        return solution.y.T


def _pendulum(xp, t, y):
    del t
    return [y[1], -xp.sin(y[0])]


def _kepler(xp, t, y):
    del xp, t
    cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return [y[2], y[3], -y[0] / cube, -y[1] / cube]


def _lotka_volterra(xp, t, y):
    del xp, t
    return [y[0] * (y[1] - 2), y[1] * (1 - y[0])]


def _van_der_pol(xp, t, y):
    return [y[1], (1 - y[0] ** 2) * y[1] - y[0] + 0.5 * xp.cos(1.1 * t)]


def _non_autonomous(xp, t, y):
    return [
        y[1] + 0.3 * xp.sin(t) * y[0] ** 2,
        -y[0] - 0.2 * y[1] * y[0] ** 2 + 0.4 * xp.cos(2 * t) * y[1],
    ]


PENDULUM = Problem("pendulum", _pendulum, (1.0, 0.5), 20.0)
# Three periods, of eccentricity 0.6.
KEPLER = Problem("Kepler", _kepler, (0.4, 0.0, 0.0, 2.0), 6 * math.pi)
LOTKA_VOLTERRA = Problem("Lotka-Volterra", _lotka_volterra, (2.0, 2.0), 20.0)
VAN_DER_POL = Problem("forced van der Pol", _van_der_pol, (1.0, 0.0), 8.0)
NON_AUTONOMOUS = Problem("non-autonomous", _non_autonomous, (1.0, 0.5), 10.0)
