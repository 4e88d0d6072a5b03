"""`SymplecticAdjoint`: where no reversal can succeed, with controls, and what it refuses.
Its gradients are tested with those of `ReversibleAdjoint`, in `discrete`."""

import re

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible import (
    EES25,
    InterpolatedAdjoint,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF4,
    SymplecticAdjoint,
)

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
    # 400 steps, each of which rounds.
    assert abs(single - true) < 400 * float(jnp.finfo(jnp.float32).eps) * abs(true)


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


class _Overrides(diffrax.Tsit5):
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        return super().step(terms, t0, t1, y0, args, solver_state, made_jump)


class _Own(diffrax.AbstractSolver):
    """A user's, of a kind of its own."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        k = terms.vf_prod(t0, y0, args, terms.contr(t0, t1))
        y1 = jax.tree.map(jnp.add, y0, k)
        dense_info, okay = dict(y0=y0, y1=y1), diffrax.RESULTS.successful
        return y1, None, dense_info, None, okay


class _OwnIto(_Own, diffrax.AbstractItoSolver):
    pass


def _ode():
    return diffrax.ODETerm(lambda t, y, a: -a * y), jnp.ones(2)


def _pair():
    one = lambda sign: diffrax.ODETerm(lambda t, y, a: sign * a * y)
    return (one(1), one(-1)), (jnp.ones(2), jnp.ones(2))


def _with_noise(area=None, additive=False):
    def terms():
        shape, key = (), jr.PRNGKey(0)
        kwargs = {} if area is None else dict(levy_area=area)
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, shape, key, **kwargs)
        diffusion = lambda t, y, a: a * (jnp.ones_like(y) if additive else jnp.sin(y))
        drift = diffrax.ODETerm(lambda t, y, a: -a * y)
        y0 = jnp.ones(2)
        return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path)), y0

    return terms


def _langevin():
    area = diffrax.SpaceTimeTimeLevyArea
    path = diffrax.VirtualBrownianTree(
        0.0, 1.0, 1e-2, (2,), jr.PRNGKey(0), levy_area=area
    )
    gamma, u = jnp.ones(2), jnp.ones(2)
    drift = diffrax.UnderdampedLangevinDriftTerm(gamma, u, lambda x, a: a * x)
    diffusion = diffrax.UnderdampedLangevinDiffusionTerm(gamma, u, path)
    return diffrax.MultiTerm(drift, diffusion), (jnp.ones(2), jnp.ones(2))


_AREA = diffrax.SpaceTimeLevyArea


@pytest.mark.parametrize(
    "solver, problem, way",
    (
        (diffrax.HalfSolver(diffrax.Tsit5()), _ode, None),
        (_Overrides(), _ode, InterpolatedAdjoint(8)),
        (_Own(), _ode, InterpolatedAdjoint(8)),
        (_OwnIto(), _with_noise(), None),
        (diffrax.ReversibleHeun(), _ode, ReversibleAdjoint()),
        (diffrax.ReversibleHeun(), _with_noise(), ReversibleAdjoint()),
        (diffrax.LeapfrogMidpoint(), _ode, ReversibleAdjoint()),
        (diffrax.SemiImplicitEuler(), _pair, ReversibleAdjoint()),
        (ReversibleALF4(), _ode, ReversibleAdjoint()),
        (Reversible(diffrax.Tsit5()), _ode, ReversibleAdjoint()),
        (EES25(), _ode, ReversibleAdjoint()),
        (diffrax.ItoMilstein(), _with_noise(), None),
        (diffrax.StratonovichMilstein(), _with_noise(), None),
        (diffrax.EulerHeun(), _with_noise(), None),
        (diffrax.SEA(), _with_noise(_AREA, additive=True), None),
        (diffrax.SRA1(), _with_noise(_AREA, additive=True), None),
        (diffrax.ShARK(), _with_noise(_AREA, additive=True), None),
        (diffrax.GeneralShARK(), _with_noise(_AREA), None),
        (diffrax.SlowRK(), _with_noise(_AREA), None),
        (diffrax.SPaRK(), _with_noise(_AREA), None),
        (diffrax.ALIGN(), _langevin, None),
        (diffrax.ShOULD(), _langevin, None),
        (diffrax.QUICSORT(), _langevin, None),
    ),
    ids=lambda x: type(x).__name__ if isinstance(x, diffrax.AbstractSolver) else "",
)
def test_solvers(solver, problem, way):
    """What is left outside, and that the ways out which are named do not refuse it, too:
    always `RecursiveCheckpointAdjoint`."""
    terms, y0 = problem()
    named = [type(way).__name__] if way is not None else []
    named.append("RecursiveCheckpointAdjoint")

    def loss(args, adjoint):
        options = dict(adjoint=adjoint, max_steps=16)
        solution = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 0.1, y0, args, **options
        )
        return weigh(solution.ys)

    with pytest.raises(ValueError, match=type(solver).__name__) as error:
        loss(1.0, SymplecticAdjoint())
    found = re.findall("adjoint=(?:diffrax.)?([A-Za-z]*Adjoint)", str(error.value))
    assert found == ["SymplecticAdjoint", *named]
    for adjoint in (way, diffrax.RecursiveCheckpointAdjoint()):
        if adjoint is not None:
            jax.eval_shape(jax.grad(lambda args: loss(args, adjoint)), 1.0)


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
