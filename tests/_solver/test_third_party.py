"""Solvers that are not from here: diffrax's own, and those of others."""

import re
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import Reversible, ReversibleAdjoint

from ..helpers import jit, leaf_differences, loss, parameters, save_everything, step_to


class _OnlyBackwardStep(diffrax.AbstractSolver):
    """Knows how to step back, and nothing of updates."""

    inside: Reversible

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        # A number of steps, which is not differentiated.
        return self.inside.init(terms, t0, t1, y0, args), 0

    def func(self, terms, t0, y0, args):
        return self.inside.func(terms, t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        state, count = solver_state
        *out, state, result = self.inside.step(
            terms, t0, t1, y0, args, state, made_jump
        )
        return *out, (state, count + 1), result

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        state, count = solver_state
        y0, dense_info, state, result = self.inside.backward_step(
            terms, t0, t1, y1, args, ts_state, state, made_jump
        )
        return y0, dense_info, (state, count - 1), result


def test_backward_step_is_enough():
    solver = _OnlyBackwardStep(Reversible(diffrax.Heun()))

    @jit
    def grads(p):
        return [
            jax.grad(loss)(p, solver, step_to, save_everything, (0.3, 1.9), adjoint)
            for adjoint in (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
        ]

    found, true = grads(parameters())
    assert leaf_differences(found, true) < 1e-10


def test_example_of_a_solver():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
        if "class Move" in block
    ]
    start, end = block.index("class Move"), block.index("def loss")
    lines = [line for line in block[start:end].splitlines() if line.strip()]
    print(f"{len(lines)} lines")
    assert len(lines) < 30
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    grad = jax.grad(names["loss"])
    found = grad(1.3, ReversibleAdjoint())
    true = grad(1.3, diffrax.RecursiveCheckpointAdjoint())
    assert abs(found - true) < 1e-14


def _solve(solver, **options):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        solver,
        0.0,
        1.0,
        0.1,
        jnp.ones(2),
        adjoint=ReversibleAdjoint(),
        **options,
    )


class _Changed(diffrax.ReversibleHeun):
    """Might step differently."""


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), _Changed()])
def test_refused(solver):
    with pytest.raises(ValueError, match=f"`{type(solver).__name__}` is not one"):
        _solve(solver)


def test_solver_state_of_leapfrog_refused():
    with pytest.raises(NotImplementedError, match="solver_state="):
        state = (jnp.array(-0.1), jnp.ones(2))
        _solve(diffrax.LeapfrogMidpoint(), solver_state=state)
