"""Dense output: its error at save times, next to that of the nodes."""

import diffrax
import equinox as eqx
import numpy as np
import pytest

from diffrax_reversible import (
    ALFComposition,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
)
from diffrax_reversible._solver.alf.coefficients import BLANES_MOAN4

from ...problems import (
    KEPLER,
    LOTKA_VOLTERRA,
    NON_AUTONOMOUS_A,
    NON_AUTONOMOUS_B,
    VAN_DER_POL,
)


@eqx.filter_jit
def _solve(solver, problem, nodes, ts):
    subs = [diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(steps=True)]
    solution = diffrax.diffeqsolve(
        problem.term,
        solver,
        0.0,
        problem.t1,
        None,
        problem.start,
        stepsize_controller=diffrax.StepTo(nodes),
        saveat=diffrax.SaveAt(subs=subs),
        max_steps=len(nodes),
    )
    assert solution.ys is not None
    at_ts, at_nodes = solution.ys
    return at_ts, at_nodes[: len(nodes) - 1]


def errors(solver, problem, number):
    """The largest error at 100 save times and at the nodes."""
    ts = np.linspace(0, problem.t1, 101)[1:]
    nodes = np.linspace(0, problem.t1, number + 1)
    times = np.union1d(ts, nodes)
    exact = problem.exact(times)
    found = _solve(solver, problem, nodes, ts)
    return [
        np.max(np.abs(y - exact[np.searchsorted(times, t)]))
        for y, t in zip(found, (ts, nodes[1:]))
    ]


_slow = pytest.mark.slow
_blanes_moan4 = ALFComposition(
    BLANES_MOAN4.fractions, 4, interpolant=BLANES_MOAN4.interpolant
)


@pytest.mark.parametrize(
    "solver, problem, numbers, most",
    (
        (ReversibleALF4(), LOTKA_VOLTERRA, (211, 409), 1.3),
        pytest.param(ReversibleALF4(), KEPLER, (613, 1609), 1.3, marks=_slow),
        pytest.param(ReversibleALF4(), NON_AUTONOMOUS_B, (53, 211), 1.3, marks=_slow),
        # The errors of the nodes nearly cancel here.
        pytest.param(ReversibleALF4(), NON_AUTONOMOUS_A, (53, 211), 4, marks=_slow),
        (ReversibleALF4(), VAN_DER_POL, (97, 211, 409), 30),
        (_blanes_moan4, NON_AUTONOMOUS_B, (53, 97), 4),
        pytest.param(ReversibleALF6(), LOTKA_VOLTERRA, (53, 97), 16, marks=_slow),
        (ReversibleALF6(), VAN_DER_POL, (53, 97), 30),
        pytest.param(ReversibleALF8(), LOTKA_VOLTERRA, (37, 61), 8, marks=_slow),
        (ReversibleALF8(), VAN_DER_POL, (37, 61), 30),
    ),
)
def test_error_at_save_times(solver, problem, numbers, most):
    for number in numbers:
        at_ts, at_nodes = errors(solver, problem, number)
        ratio = at_ts / at_nodes
        print(f"{type(solver).__name__} {problem.name} {number}: {ratio:.2f}")
        assert ratio < most
