"""Terms, solvers and interpolations of the user's own, with parameters wherever they may
have some: whatever they do is differentiated exactly, or refused by name."""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import (
    ALF,
    InterpolatedAdjoint,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    StormerVerlet,
    SymplecticAdjoint,
)

from ..._reversal.third_party import (
    Bending,
    BentALF2,
    BentBosh3,
    BentByHand,
    BentHeun,
    BentLeapfrog,
    BentUpdates,
    CoupledEuler,
    CoupledEulerByHand,
    Growing,
    OnlyBackwardStep,
)
from ...helpers import (
    adjoint_of,
    check,
    check_both_directions,
    constant,
    jit,
)


_slow = pytest.mark.slow


def _save_inside(t0, t1, p):
    del p
    ts = t0 + (t1 - t0) * jnp.array([0.13, 0.17, 0.63])
    return diffrax.SaveAt(ts=ts, t1=True)


#
# Terms
#


class _Learned(diffrax.AbstractTerm):
    """Parameters in its methods: a strength, a pace if it has one, and a mass."""

    force: Callable = eqx.field(static=True)
    strength: jax.Array
    mass: jax.Array
    pace: jax.Array | float = 0.2

    def vf(self, t, y, args):
        return self.strength * self.force(t, y, args)

    def contr(self, t0, t1, **kwargs):
        return jnp.exp(self.pace) * (t1 - t0)

    def prod(self, vf, control):
        return vf * control / self.mass


def _force(t, y, args):
    return jnp.sin(args * y[::-1] + t)


def _learned(p):
    return _Learned(_force, **p["term"])


def _learned_pair(p):
    return _learned(p), _Learned(_force, *(1.1 * x for x in p["term"].values()))


def _parameters(with_pace):
    term = dict(strength=0.9, mass=1.3) | (dict(pace=0.2) if with_pace else {})
    term = {key: jnp.array(x) for key, x in term.items()}
    return dict(term=term, y0=jnp.array([0.3, 0.9]), args=jnp.array(1.2))


@pytest.mark.parametrize(
    "solver, with_pace",
    (
        pytest.param(ReversibleALF4(), False, id="ALF4"),
        pytest.param(ReversibleALF4(), True, id="ALF4-pace"),
        pytest.param(
            ReversibleALF2(restart=1e-6), False, id="ALF2 restarting", marks=_slow
        ),
        pytest.param(ALF(), False, id="MALI", marks=_slow),
        pytest.param(Reversible(diffrax.Heun()), False, id="coupled"),
        pytest.param(CoupledEuler(), True, id="updates-pace"),
        pytest.param(diffrax.ReversibleHeun(), False, id="ReversibleHeun"),
        pytest.param(diffrax.ReversibleHeun(), True, id="ReversibleHeun-pace"),
        pytest.param(diffrax.LeapfrogMidpoint(), False, id="LeapfrogMidpoint"),
        pytest.param(diffrax.LeapfrogMidpoint(), True, id="LeapfrogMidpoint-pace"),
        pytest.param(OnlyBackwardStep(), True, id="backward_step-pace"),
        pytest.param(StormerVerlet(), False, id="pair"),
        pytest.param(diffrax.Bosh3(), True, id="Bosh3-pace"),
        pytest.param(diffrax.Heun(), False, id="Heun", marks=_slow),
    ),
)
def test_term(solver, with_pace):
    """What a control does not depend on must not be lost, nor what it does."""
    terms, p = _learned, _parameters(with_pace)
    if isinstance(solver, StormerVerlet):
        terms, p = _learned_pair, p | {"y0": (p["y0"], 0.7 * p["y0"])}
    check_both_directions(
        solver, constant, _save_inside, adjoint_of(solver), terms, p, matters="all"
    )


def test_term_with_interpolated_adjoint():
    """The adjoint equation is known for those of which it can tell the rate only."""
    p = _parameters(True)
    rest = (diffrax.Tsit5(), 0.0, 1.0, 0.05, p["y0"], p["args"])
    with pytest.raises(NotImplementedError, match="`ODETerm`.*`MultiTerm`"):
        diffrax.diffeqsolve(_learned(p), *rest, adjoint=InterpolatedAdjoint(12))


#
# Solvers
#


def _euler(p):
    return diffrax.ODETerm(lambda t, y, args: jnp.sin(args * y[::-1] + t))


def _of_share(kind, **options):
    return lambda p: kind(share=p["share"], **options)


def _of_bend(kind):
    return lambda p: kind(bend=p["share"])


@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(_of_share(CoupledEuler), id="array"),
        pytest.param(_of_share(CoupledEuler, substeps=3), id="array in Repeat"),
        pytest.param(_of_share(CoupledEulerByHand), id="array in backward_step"),
        pytest.param(_of_share(Growing), id="write not affine"),
        pytest.param(_of_share(Growing, substeps=2), id="write in Repeat", marks=_slow),
        pytest.param(_of_share(Bending), id="dense_info not linear"),
        pytest.param(_of_share(BentUpdates), id="interpolation, updates"),
        pytest.param(_of_share(BentByHand), id="interpolation, backward_step"),
        pytest.param(_of_bend(BentALF2), id="interpolation, ALF2"),
        pytest.param(_of_bend(BentHeun), id="interpolation, ReversibleHeun"),
        pytest.param(_of_bend(BentLeapfrog), id="interpolation, leapfrog"),
        pytest.param(_of_bend(BentBosh3), id="interpolation, Bosh3"),
    ),
)
@pytest.mark.parametrize(
    "dense", (False, pytest.param(True, marks=_slow)), ids=("times", "dense")
)
def test_solver(solver, dense):
    """With an array of its own. A write, an interpolation or `dense_info` may be
    anything."""
    p = dict(y0=jnp.array([0.3, 0.9]), args=jnp.array(1.2), share=jnp.array(0.8))

    def saves(t0, t1, p):
        saveat = _save_inside(t0, t1, p)
        return eqx.tree_at(lambda s: s.dense, saveat, dense) if dense else saveat

    ours = adjoint_of(solver(p))
    check_both_directions(solver, constant, saves, ours, _euler, p, matters="all")


def test_function_of_args_that_is_not_linear():
    """A term and `fn` of one's own with what the field does not depend on."""
    p = dict(y0=jnp.array([0.3, 0.9]), args=jnp.array(1.2), share=jnp.array(0.8))

    def saves(t0, t1, p):
        saveat = _save_inside(t0, t1, p)
        fn = lambda t, y, args: jnp.exp(p["share"] * y * args) * t
        subs = eqx.tree_at(lambda s: s.fn, saveat.subs, fn)
        return diffrax.SaveAt(subs=subs)

    solver = _of_share(BentUpdates)
    check_both_directions(
        solver, constant, saves, ReversibleAdjoint(), _euler, p, matters="all"
    )


#
# Subclasses that are not what we know
#


class _Projected(diffrax.Heun):
    """Back onto the unit circle after each step."""

    def step(self, *args, **kwargs):
        y1, error, dense_info, *rest = super().step(*args, **kwargs)
        y1 = y1 / jnp.linalg.norm(y1)
        return y1, error, dense_info | dict(y1=y1), *rest


class _ProjectedALF2(ReversibleALF2):
    def step(self, *args, **kwargs):
        y1, *rest = super().step(*args, **kwargs)
        return y1 / jnp.linalg.norm(y1), *rest


class _ProjectedHeun(diffrax.ReversibleHeun):
    def step(self, *args, **kwargs):
        y1, *rest = super().step(*args, **kwargs)
        return y1 / jnp.linalg.norm(y1), *rest


class _OtherStart(diffrax.ReversibleHeun):
    def init(self, *args):
        y, vf = super().init(*args)
        return 2 * y, vf


class _Both(CoupledEuler):
    """Overrides both, and so is reversed by its own `backward_step`."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1 = y0 + terms.contr(t0, t1)
        return y1, None, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

    def init(self, terms, t0, t1, y0, args):
        return None

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        y0 = y1 - terms.contr(t0, t1)
        return y0, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful


def _solve(y0, solver, adjoint):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y[::-1]),
        solver,
        0.0,
        1.0,
        0.25,
        y0,
        adjoint=adjoint,
        max_steps=8,
    ).ys


@pytest.mark.parametrize(
    "solver, adjoint",
    (
        (_ProjectedALF2(), ReversibleAdjoint()),
        (_ProjectedHeun(), ReversibleAdjoint()),
        (_OtherStart(), ReversibleAdjoint()),
        (_Projected(), SymplecticAdjoint()),
    ),
)
@pytest.mark.parametrize("differentiate", (False, True))
def test_overriding_subclass_refused(solver, adjoint, differentiate):
    f = lambda y0: jnp.sum(_solve(y0, solver, adjoint))
    f = jax.grad(f) if differentiate else f
    name = type(solver).__name__
    with pytest.raises(ValueError, match=f"(?s){name}.*RecursiveCheckpointAdjoint"):
        jax.eval_shape(f, jnp.ones(2))


def test_overriding_subclass_is_not_coupled():
    with pytest.raises(ValueError, match="_Projected"):
        Reversible(_Projected())


def test_subclass_with_a_step_back_of_its_own():
    f = lambda y0, adjoint: jnp.sum(_solve(y0, _Both(), adjoint) ** 2)
    grad = jax.value_and_grad(lambda y0: f(y0, ReversibleAdjoint()))
    value, found = jit(grad)(jnp.ones(2))
    check((value, found), (8.0, jnp.full(2, 4.0)))
