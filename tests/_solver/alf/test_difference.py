"""The estimate of the difference of `v` from the vector field."""

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    ALFComposition,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    State,
)
from diffrax_reversible._solver.alf.difference import _trees
from diffrax_reversible._solver.updates.solver import make


_solvers = (
    ReversibleALF2(),
    ReversibleALF4(),
    ReversibleALF6(),
    ReversibleALF8(),
    ReversibleYoshida4(),
    ReversibleYoshida6(),
    ALFComposition([0.2, 0.6, 0.2], 2),
)


def _field(t, y, args):
    del args
    return jnp.stack([jnp.cos(y[1] + t), jnp.sin(y[0]) - 0.5 * y[1]])


_term = diffrax.ODETerm(_field)


def _estimate(solver, h, w):
    """Of a difference of `w` at the start of a step."""
    y0, t0 = jnp.array([0.4, -0.9]), 0.3
    state = solver.init(_term, t0, t0 + h, y0, None)
    v = state.copy + w
    step = solver.updates(_term, t0, t0 + h, False)
    state1, sums = make(step.updates, _term, None, State(y0, v))
    return step.restart.difference(state1, sums, state.memory) / h


def test_trees():
    """As many as there are."""
    assert [len(_trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert len(set(_trees(7))) == 48


@pytest.mark.parametrize("solver", _solvers, ids=lambda s: type(s).__name__)
def test_difference(solver):
    """A difference is seen as it is, and no other thing is taken for one: what is left
    goes with the power of the step with which the error estimate goes."""
    w = jnp.array([0.3, -0.2])
    for h in (0.02, 0.01):
        none, some = _estimate(solver, h, 0 * w), _estimate(solver, h, w)
        assert np.allclose(some - none, w, rtol=4 * h)
    steps = np.array([0.8, 0.4, 0.2, 0.1])
    floors = [np.max(np.abs(_estimate(solver, h, 0 * w))) for h in steps]
    order, _ = np.polyfit(np.log(steps), np.log(floors), 1)
    power = solver.composition.error_order or solver.composition.order
    print(f"goes with the power {order:.2f}")
    assert order > power - 1.2
