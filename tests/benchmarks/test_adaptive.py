"""Adaptive steps hold the tolerance, and at what cost."""

import functools as ft

import diffrax
import numpy as np
import pytest

from diffrax_reversible import (
    ALF,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
)

from ..problems import (
    ConstantSteps,
    exact_at_five_times,
    KEPLER,
    LOTKA_VOLTERRA,
    PENDULUM,
    solve,
    VAN_DER_POL,
)


pytestmark = pytest.mark.benchmark
_ALF4 = pytest.param(ReversibleALF4(), 5, id="ALF4")
_others = (
    pytest.param(ALF(), 1, id="ALF"),
    pytest.param(ReversibleALF2(), 2, id="ALF2"),
    pytest.param(ReversibleYoshida4(), 6, id="Yoshida4"),
    pytest.param(ReversibleALF6(), 20, id="ALF6"),
    pytest.param(ReversibleYoshida6(), 14, id="Yoshida6"),
    pytest.param(ReversibleALF8(), 42, id="ALF8"),
)
_problems = (PENDULUM, KEPLER, LOTKA_VOLTERRA, VAN_DER_POL)
_integral = (0.0, 1.0)
_proportional_integral = (0.8, 0.3)


def _adaptive(solver, problem, tolerance, coefficients):
    """The error at five times, the steps tried, the share of those rejected."""
    ts, exact = exact_at_five_times(problem)
    pcoeff, icoeff = coefficients
    tolerance = np.array(tolerance)
    controller = diffrax.PIDController(
        rtol=tolerance,
        atol=tolerance,
        pcoeff=np.array(pcoeff),
        icoeff=np.array(icoeff),
    )
    # Lands on the times, so that interpolation plays no part.
    controller = diffrax.ClipStepSizeController(controller, step_ts=ts)
    ys, stats = solve(solver, problem, ts, controller, None)
    steps = int(stats["num_steps"])
    return np.max(np.abs(ys - exact)), steps, int(stats["num_rejected_steps"]) / steps


@ft.cache
def _tsit5(problem, tolerance):
    return _adaptive(diffrax.Tsit5(), problem, tolerance, _integral)[0]


def _check(solver, problem, exponents):
    constant = ConstantSteps(solver, problem)
    for exponent in exponents:
        tolerance = 10.0**exponent
        for coefficients in (_integral, _proportional_integral):
            error, steps, rejected = _adaptive(solver, problem, tolerance, coefficients)
            case = (problem.name, exponent, coefficients)
            assert error < 3 * _tsit5(problem, tolerance), case
            if coefficients == _proportional_integral:
                assert rejected < 0.2, case
            if solver.order(problem.term) == 2 and exponent < -7:
                # A million constant steps take too long.
                continue
            ratio = steps / constant(error)
            if problem is KEPLER:
                assert ratio < 1, case
            elif problem in (PENDULUM, LOTKA_VOLTERRA):
                assert ratio < 2.5, case
            print(
                f"{type(solver).__name__:18} {problem.name:18} {exponent:5} "
                f"{'I' if coefficients == _integral else 'PI':2} error/Tsit5's "
                f"{error / _tsit5(problem, tolerance):.2g}, rejected {rejected:.0%}, "
                f"steps/constant {ratio:.2f}"
            )


@pytest.mark.parametrize("problem", _problems, ids=lambda problem: problem.name)
@pytest.mark.parametrize("solver, evaluations", (_ALF4, *_others))
def test_tolerances(solver, evaluations, problem):
    del evaluations
    _check(solver, problem, np.arange(-3, -9.1, -0.5))
