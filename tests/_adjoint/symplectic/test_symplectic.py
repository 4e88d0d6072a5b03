"""`SymplecticAdjoint`: where no reversal can succeed, with controls, and what it refuses.
Its gradients are tested with those of `ReversibleAdjoint`, in `discrete`."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible import EES25, Reversible, ReversibleALF4, SymplecticAdjoint

from ...helpers import check, jit, UNROLLED, weigh
from ...reference import Problem, unrolled


def _solve(y0, rate, adjoint, **options):
    options = dict(solver=diffrax.Tsit5(), max_steps=1024) | options
    t0, t1, dt0 = jnp.array([0.0, 20.0, 0.05], y0.dtype)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, a: -5 * a * (y - jnp.sin(a * t)) - y**3),
        t0=t0,
        t1=t1,
        dt0=dt0,
        y0=y0,
        args=rate,
        adjoint=adjoint,
        **options,
    ).ys


@pytest.mark.parametrize("checkpoints", (None, 7))
def test_contraction(checkpoints):
    """By more than `exp(100)`: the derivative of what the solution is driven to."""
    adjoint = SymplecticAdjoint(checkpoints=checkpoints)
    f = lambda y, a: jnp.sum(_solve(y, a, adjoint) ** 2)
    grad = jit(jax.grad(f, 1))

    def found(dtype):
        return grad(jnp.array([0.3, 2.0], dtype), jnp.array(1.2, dtype))

    value = jit(f)
    y0, eps = jnp.array([0.3, 2.0]), 1e-4
    difference = lambda k: value(y0, 1.2 + k * eps) - value(y0, 1.2 - k * eps)
    true = (8 * difference(1) - difference(2)) / (12 * eps)
    assert abs(found(jnp.float64) - true) < 1e-8 * abs(true)
    single = found(jnp.float32).astype(float)
    assert abs(single - true) < 1e-5 * abs(true)


#
# Controls
#


def _both(p, terms, solver, ours):
    def f(p, adjoint):
        rest = (0.0, 1.0, 0.11, p["y0"], p["args"])
        saveat = diffrax.SaveAt(ts=jnp.array([0.33, 1.0]))
        options = dict(saveat=saveat, max_steps=16)
        if adjoint is UNROLLED:
            return weigh(unrolled(Problem(terms, solver), p, *rest, **options).ys)
        options |= dict(adjoint=adjoint)
        return weigh(diffrax.diffeqsolve(terms(p), solver, *rest, **options).ys)

    found = jit(jax.value_and_grad(lambda p: f(p, ours)))(p)
    check(found, jax.value_and_grad(f)(p, UNROLLED), tolerance=1e-12, matters="all")


@pytest.mark.slow
@pytest.mark.parametrize("solver", (diffrax.Euler(), diffrax.Heun()))
def test_sde(solver):
    """Itô or Stratonovich; parameters of drift and of diffusion."""
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jr.PRNGKey(3))

    def terms(p):
        del p
        diffusion = lambda t, y, a: jnp.diag(jnp.cos(a[1] * y))
        drift = diffrax.ODETerm(lambda t, y, a: -a[0] * y)
        return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))

    p = dict(y0=jnp.array([0.5, 1.0]), args=jnp.array([0.7, 1.3]))
    _both(p, terms, solver, SymplecticAdjoint(checkpoints=3))


@pytest.mark.parametrize("keep", ("states", "stages", "residuals"))
def test_cde(keep):
    """A solver that hands on its last stage, with a control that is differentiated."""

    def terms(p):
        control = diffrax.LinearInterpolation(jnp.linspace(0.0, 1.0, 5), p["values"])
        field = lambda t, y, w: (
            jnp.tanh(w @ y)[:, None] * jnp.stack([jnp.ones_like(t), t])[None]
        )
        return diffrax.ControlTerm(field, control)

    keys = jr.split(jr.PRNGKey(0), 2)
    p = dict(
        values=jr.normal(keys[0], (5, 2)),
        y0=jnp.array([0.5, 1.0]),
        args=jr.normal(keys[1], (2, 2)),
    )
    _both(p, terms, diffrax.Bosh3(), SymplecticAdjoint(keep=keep))


#
# Refused
#


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.Kvaerno3(),
        diffrax.HalfSolver(diffrax.Tsit5()),
        diffrax.ReversibleHeun(),
        ReversibleALF4(),
        Reversible(diffrax.Tsit5()),
        EES25(),
    ),
)
def test_solvers(solver):
    with pytest.raises(ValueError, match="RecursiveCheckpointAdjoint"):
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        options = dict(solver=solver, stepsize_controller=controller)
        _solve(jnp.ones(2), 1.0, SymplecticAdjoint(), **options)


def test_unsafe_brownian_path():
    path = diffrax.UnsafeBrownianPath((2,), jr.PRNGKey(0))
    term = diffrax.ControlTerm(lambda t, y, a: jnp.eye(2), path)
    with pytest.raises(ValueError, match="VirtualBrownianTree"):
        diffrax.diffeqsolve(
            term,
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            jnp.ones(2),
            adjoint=SymplecticAdjoint(),
        )
