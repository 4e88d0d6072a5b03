"""Stormer-Verlet and the symplectic compositions."""

import diffrax
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_reversible import (
    StormerVerlet,
    SymplecticComposition4,
    SymplecticComposition6,
    SymplecticComposition8,
)
from diffrax_reversible._solver.symplectic.semi_implicit_euler import (
    SemiImplicitEulerUpdates,
)


def _f(t, p, args):
    return p * (1 + 0.3 * jnp.sin(t))


def _g(t, q, args):
    return -jnp.sin(q) + 0.4 * jnp.cos(2 * t) * q[::-1]


_terms = (diffrax.ODETerm(_f), diffrax.ODETerm(_g))
_y0 = (jnp.array([1.0, 0.2]), jnp.array([0.5, -0.3]))


def _difference(x, y):
    leaves = zip(jtu.tree_leaves(x), jtu.tree_leaves(y))
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in leaves)


@pytest.mark.parametrize(
    "solver, steps",
    [
        (StormerVerlet(), 48),
        (SymplecticComposition4(), 12),
        (SymplecticComposition6(), 8),
        (SymplecticComposition8(), 8),
    ],
    ids=lambda x: type(x).__name__,
)
def test_order(solver, steps):
    """Also where the terms depend on time."""

    def solve(terms, solver, steps):
        saveat = diffrax.SaveAt(t1=True)
        solution = diffrax.diffeqsolve(
            terms, solver, 0.0, 2.0, 2.0 / steps, _y0, saveat=saveat, max_steps=None
        )
        return solution.ys

    whole = diffrax.ODETerm(lambda t, y, args: (_f(t, y[1], args), _g(t, y[0], args)))
    true = solve(whole, diffrax.Dopri8(), 2000)
    steps = [steps, int(1.5 * steps), 2 * steps]
    fn = jax.jit(lambda n: solve(_terms, solver, n))
    errors = [_difference(fn(n), true) for n in steps]
    found = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"order {solver.order(None)}: fitted {found:.2f}, errors {errors}")
    assert abs(found - solver.order(None)) < 0.15


@pytest.mark.parametrize(
    "solver, step, bound",
    [
        (StormerVerlet(), 0.01, 1e-4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (SymplecticComposition4(), 0.04, 1e-6),
                (SymplecticComposition8(), 0.1, 5e-9),
            )
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_energy(solver, step, bound):
    """Bounded over 10^5 steps of a Kepler orbit of eccentricity 0.6."""
    force = lambda t, q, args: -q / jnp.sum(q**2) ** 1.5
    terms = (diffrax.ODETerm(lambda t, p, args: p), diffrax.ODETerm(force))
    y0 = (jnp.array([0.4, 0.0]), jnp.array([0.0, 2.0]))

    def energy(y):
        q, p = y
        return jnp.sum(p**2) / 2 - 1 / jnp.sqrt(jnp.sum(q**2))

    solution = diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        1e5 * step,
        step,
        y0,
        saveat=diffrax.SaveAt(ts=step * jnp.arange(50.0, 1e5, 100)),
        max_steps=None,
    )
    assert solution.stats["num_steps"] in (100_000, 100_001)
    # Interpolated energies are off; those at the nodes are not.
    errors = jnp.abs(jax.vmap(energy)(solution.ys) - energy(y0))
    first, last = jnp.max(errors[:200]), jnp.max(errors[-200:])
    print(f"energy error: first fifth {first:.1e}, last fifth {last:.1e}")
    assert last < bound
    assert last < 1.3 * first


def test_semi_implicit_euler():
    ours, theirs = SemiImplicitEulerUpdates(), diffrax.SemiImplicitEuler()
    assert ours.order(None) == theirs.order(None)
    found, true = [
        s.step(_terms, 0.3, 0.5, _y0, None, None, False)[0] for s in (ours, theirs)
    ]
    assert _difference(found, true) < 1e-16


@pytest.mark.parametrize("solver", [StormerVerlet(), SymplecticComposition6()])
def test_symplectic(solver):
    """The Jacobian of a step preserves the symplectic form."""
    flat, unravel = jfu.ravel_pytree(_y0)

    def step(y):
        y1, *_ = solver.step(_terms, 0.3, 0.5, unravel(y), None, None, False)
        return jnp.concatenate(y1)

    form = jnp.block(
        [
            [jnp.zeros((2, 2)), jnp.eye(2)],
            [-jnp.eye(2), jnp.zeros((2, 2))],
        ]
    )
    jacobian = jax.jacobian(step)(flat)
    assert jnp.max(jnp.abs(jacobian.T @ form @ jacobian - form)) < 1e-14
