"""Solvers that are not from here: diffrax's own, and those of others."""

import re
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import EES25, EES27, ReversibleAdjoint

from ..helpers import jit, tree_difference, UNROLLED
from ..reference import Problem, unrolled


@pytest.mark.slow
def test_example_of_a_solver():
    """In the README: its gradient is that of diffrax's own adjoint method."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
        if "class CoupledEuler" in block
    ]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    grad = jax.grad(names["loss"])
    found = grad(1.3, ReversibleAdjoint())
    true = grad(1.3, diffrax.RecursiveCheckpointAdjoint())
    assert abs(found - true) < 1e-14


@pytest.mark.parametrize(
    "solver, order", [(EES25(), 5), pytest.param(EES27(), 7, marks=pytest.mark.slow)]
)
def test_near_reversible(solver, order):
    """The gradient is off by the error of the reversal, and that falls at its order."""
    matrix = jnp.array([[0.3, -1.0], [0.9, 0.2]])
    ours = ReversibleAdjoint(reversal_rtol=1e-2)

    def terms(p):
        del p
        return diffrax.ODETerm(lambda t, y, a: jnp.tanh(matrix @ y + a) * jnp.cos(t))

    def f(p, dt0, adjoint):
        rest = (0.0, 2.0, dt0, p["y0"], p["args"])
        options = dict(max_steps=64, saveat=diffrax.SaveAt(ts=jnp.array([0.7, 2.0])))
        if adjoint is UNROLLED:
            solution = unrolled(Problem(terms, solver), {}, *rest, **options)
        else:
            options |= dict(adjoint=adjoint)
            solution = diffrax.diffeqsolve(terms(p), solver, *rest, **options)
        return jnp.sum(jnp.sin(solution.ys))

    grad = jit(lambda p, dt0: jax.grad(f)(p, dt0, ours))
    p = dict(y0=jnp.array([0.9, -0.4]), args=jnp.array([0.3, -0.2]))
    steps = jnp.array([6.0, 8.0, 12.0])
    errors = [
        tree_difference(grad(p, 2.0 / n), jax.grad(f)(p, 2.0 / n, UNROLLED))
        for n in steps
    ]
    print(f"{type(solver).__name__}: gradient differences {errors}")
    found = -jnp.polyfit(jnp.log(steps), jnp.log(jnp.array(errors)), 1)[0]
    assert errors[0] < 1e-3
    assert found > order - 0.5


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


def test_solver_that_cannot_step_back_refused():
    with pytest.raises(ValueError, match=r"`solver=diffrax.Tsit5\(\)` is not"):
        _solve(diffrax.Tsit5())


class _NotNominal(diffrax.Euler):
    """Has a `backward_step`, but does not say what it is."""

    def backward_step(self, *args):
        raise AssertionError


def test_solver_that_only_looks_reversible_refused():
    with pytest.raises(ValueError, match=r"`solver=_NotNominal\(\)` is not"):
        _solve(_NotNominal())


def test_solver_state_of_leapfrog_refused():
    with pytest.raises(NotImplementedError, match="solver_state="):
        state = (jnp.array(-0.1), jnp.ones(2))
        _solve(diffrax.LeapfrogMidpoint(), solver_state=state)
