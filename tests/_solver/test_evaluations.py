"""How often the vector field is evaluated in a gradient."""

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    StormerVerlet,
    SymplecticComposition,
)

from ..measure import Counter


@pytest.mark.parametrize(
    "solver, stages, pair",
    [
        (Reversible(diffrax.Tsit5()), 12, False),
        (Reversible(diffrax.Heun()), 4, False),
        (diffrax.ReversibleHeun(), 1, False),
        (diffrax.LeapfrogMidpoint(), 1, False),
        (diffrax.SemiImplicitEuler(), 2, True),
        (StormerVerlet(), 3, True),
        (SymplecticComposition(order=4), 13, True),
    ],
)
def test_evaluations(solver, stages, pair):
    """Once forward, once and one vjp in the sweep, for each stage; and the initial
    vector field, for solvers that start with it."""
    counter, steps = Counter(), 10

    def loss(y0, a):
        term = diffrax.ODETerm(counter.field())
        solution = diffrax.diffeqsolve(
            (term, term) if pair else term,
            solver,
            0.0,
            1.0,
            1.0 / steps,
            (y0, y0) if pair else y0,
            a,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 7), steps=True),
            max_steps=16,
            adjoint=ReversibleAdjoint(),
        )
        leaves = jtu.tree_leaves(solution.ys)
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0)) for x in leaves)

    grad = jax.jit(jax.grad(loss, (0, 1)))
    jax.block_until_ready(grad(jnp.array([0.3, 0.9]), jnp.array(1.3)))
    jax.effects_barrier()
    # `init` before the first step, and at the end of the sweep the check of the reversal.
    is_heun = isinstance(solver, diffrax.ReversibleHeun)
    initial = 1 if is_heun else 0
    print(f"{solver}: {counter.evaluations} evaluations, {counter.vjps} vjps")
    assert counter.evaluations == 2 * steps * stages + 2 * initial
    assert counter.vjps == steps * stages + initial
