"""Differential equations on which the solvers are measured."""

import functools as ft
import math
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
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


def _non_autonomous_a(xp, t, y):
    return [
        y[1] + 0.3 * xp.sin(t) * y[0] ** 2,
        -y[0] - 0.2 * y[1] * y[0] ** 2 + 0.4 * xp.cos(2 * t) * y[1],
    ]


def _non_autonomous_b(xp, t, y):
    return [
        xp.sin(y[1]) + 0.2 * t * y[2] / (1 + y[0] ** 2),
        -y[0] * y[2] + 0.5 * xp.cos(t),
        y[0] * y[1] - 0.3 * y[2] + 0.2 * xp.sin(t * y[0]),
    ]


PENDULUM = Problem("pendulum", _pendulum, (1.0, 0.5), 20.0)
# Three periods, of eccentricity 0.6.
KEPLER = Problem("Kepler", _kepler, (0.4, 0.0, 0.0, 2.0), 6 * math.pi)
LOTKA_VOLTERRA = Problem("Lotka-Volterra", _lotka_volterra, (2.0, 2.0), 20.0)
VAN_DER_POL = Problem("forced van der Pol", _van_der_pol, (1.0, 0.0), 8.0)
NON_AUTONOMOUS_A = Problem("non-autonomous A", _non_autonomous_a, (1.0, 0.5), 4.0)
NON_AUTONOMOUS_B = Problem("non-autonomous B", _non_autonomous_b, (0.6, -0.4, 0.9), 5.0)


@eqx.filter_jit
def solve(solver, problem, ts, controller, dt0):
    solution = diffrax.diffeqsolve(
        problem.term,
        solver,
        0.0,
        problem.t1,
        dt0,
        problem.start,
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(ts=ts),
        adjoint=diffrax.ForwardMode(),
        max_steps=2**22,
    )
    return solution.ys, solution.stats


@ft.cache
def exact_at_five_times(problem):
    ts = np.linspace(0, problem.t1, 6)[1:]
    return ts, problem.exact(ts)


class ConstantSteps:
    """The number of constant steps that a solver needs for an error."""

    def __init__(self, solver, problem):
        self.solver = solver
        self.problem = problem
        self.numbers = [15]
        self.errors = [np.inf]

    def __call__(self, error):
        ts, exact = exact_at_five_times(self.problem)
        while self.errors[-1] > error:
            number = 5 * round(self.numbers[-1] * 1.3 / 5 + 1)
            dt0 = np.array(self.problem.t1 / number)
            controller = diffrax.ConstantStepSize()
            ys, _ = solve(self.solver, self.problem, ts, controller, dt0)
            self.numbers.append(number)
            found = np.max(np.abs(ys - exact))
            self.errors.append(min(self.errors[-1], found))
        (last,) = np.nonzero(np.array(self.errors) > error)
        i = last[-1]
        if np.isinf(self.errors[i]):
            return self.numbers[i + 1]
        logs = np.log(self.errors[i : i + 2])
        share = (logs[0] - np.log(error)) / (logs[0] - logs[1])
        return self.numbers[i] * (self.numbers[i + 1] / self.numbers[i]) ** share
