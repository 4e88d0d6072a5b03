"""Evaluations of the vector field for an error of 1e-7, with constant steps."""

import functools as ft

import diffrax
import pytest

from diffrax_reversible import (
    ReversibleALF4,
    ReversibleALF6,
    ReversibleYoshida4,
    ReversibleYoshida6,
)

from ..problems import ConstantSteps, KEPLER, LOTKA_VOLTERRA, PENDULUM, VAN_DER_POL


pytestmark = pytest.mark.benchmark


@ft.cache
def _evaluations(solver, per_step, problem):
    return per_step * ConstantSteps(solver, problem)(1e-7)


@pytest.mark.parametrize(
    "solver, per_step, pendulum, lotka_volterra",
    (
        (ReversibleALF4(), 5, 1649, 2430),
        (ReversibleALF6(), 20, 616, 1461),
        (ReversibleYoshida4(), 6, 6010, 8739),
        (ReversibleYoshida6(), 14, 2326, 3497),
    ),
    ids=("ALF4", "ALF6", "Yoshida4", "Yoshida6"),
)
def test_as_known(solver, per_step, pendulum, lotka_volterra):
    for problem, known in ((PENDULUM, pendulum), (LOTKA_VOLTERRA, lotka_volterra)):
        found = _evaluations(solver, per_step, problem)
        print(f"{type(solver).__name__}, {problem.name}: {found:.0f}, known {known}")
        assert found == pytest.approx(known, rel=0.1)


@pytest.mark.parametrize(
    "problem, most",
    ((PENDULUM, 1.0), (KEPLER, 1.4), (LOTKA_VOLTERRA, 1.4), (VAN_DER_POL, 1.4)),
    ids=lambda x: getattr(x, "name", ""),
)
def test_against_tsit5(problem, most):
    ours = _evaluations(ReversibleALF6(), 20, problem)
    tsit5 = _evaluations(diffrax.Tsit5(), 6, problem)
    print(f"{problem.name}: {ours:.0f} to {tsit5:.0f}, {ours / tsit5:.2f}")
    assert ours < most * tsit5
