"""Solvers of somebody else's, for the tests, which do whatever a solver may do."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from diffrax_reversible import (
    AbstractReversibleSolver,
    AbstractUpdate,
    AbstractUpdateSolver,
    Add,
    Repeat,
    Reversible,
    ReversibleALF2,
    Step,
)


class OnlyBackwardStep(AbstractReversibleSolver):
    """Knows how to step back, and nothing of updates."""

    inside: Reversible = Reversible(diffrax.Heun(), restart=None)

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation

    def order(self, terms):
        return 2

    def error_order(self, terms):
        return self.inside.error_order(terms)

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


def _y(state):
    return state.y


def _z(state):
    return state.solver_state


class CoupledEuler(AbstractUpdateSolver):
    """Two copies of the solution that push each other on, and what a third party may do
    with them.

    - `share`: an array of its own: how much of the push is made.
    - `substeps`: how often, in a `Repeat`.
    """

    share: jax.Array | float = 1.0
    substeps: int | None = None

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return y0

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def lines(self, t0, t1, control):
        control = jtu.tree_map(lambda c: self.share * c, control)
        return [
            Add(to=_y, at=_z, t=t0, control=control),
            Add(to=_z, at=_y, t=t1, control=control),
        ]

    def updates(self, terms, t0, t1, made_jump):
        if self.substeps is None:
            return Step(self.lines(t0, t1, terms.contr(t0, t1)))
        nodes = t0 + (t1 - t0) * jnp.arange(self.substeps + 1.0) / self.substeps
        control = jax.vmap(terms.contr)(nodes[:-1], nodes[1:])
        lines = jax.vmap(self.lines)(nodes[:-1], nodes[1:], control)
        return Step([Repeat(lines)])


class Grow(AbstractUpdate):
    """`to *= exp(f(t, at) control)`, which is not affine in what is evaluated."""

    to: Callable = eqx.field(static=True)
    at: Callable = eqx.field(static=True)
    t: Any
    control: Any

    def read(self, state):
        return self.at(state)

    def evaluate(self, terms, args, point):
        return terms.vf_prod(self.t, point, args, self.control)

    def write(self, state, k):
        return eqx.tree_at(self.to, state, self.to(state) * jnp.exp(k)), k

    def unwrite(self, state, k):
        return eqx.tree_at(self.to, state, self.to(state) * jnp.exp(-k))


class Growing(CoupledEuler):
    def lines(self, t0, t1, control):
        first, second = super().lines(t0, t1, control)
        lines = [(_y, _z, first), (_z, _y, second)]
        return [Grow(to, at, line.t, line.control) for to, at, line in lines]


class Bending(CoupledEuler):
    """Its `dense_info` is not linear in the states."""

    def updates(self, terms, t0, t1, made_jump):
        step = super().updates(terms, t0, t1, made_jump)

        def dense_info(state0, state1, sums):
            middle = self.share * (state0.y + state1.y) / 2 + state0.y * state1.y
            return dict(y0=state0.y, y1=middle)

        return Step(step.updates, dense_info=dense_info)


class CoupledEulerByHand(AbstractReversibleSolver):
    """As `CoupledEuler`, with an array of its own, but without updates."""

    share: jax.Array

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return y0

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        control = terms.contr(t0, t1)
        y1 = y0 + self.share * terms.vf_prod(t0, solver_state, args, control)
        z1 = solver_state + self.share * terms.vf_prod(t1, y1, args, control)
        return y1, None, dict(y0=y0, y1=y1), z1, diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        control = terms.contr(t0, t1)
        z0 = solver_state - self.share * terms.vf_prod(t1, y1, args, control)
        y0 = y1 - self.share * terms.vf_prod(t0, z0, args, control)
        return y0, dict(y0=y0, y1=y1), z0, diffrax.RESULTS.successful


class Bent(diffrax.AbstractLocalInterpolation):
    """Not linear in what `inside` is made of, and with an array of its own."""

    t0: Any
    t1: Any
    inside: diffrax.AbstractLocalInterpolation
    bend: jax.Array

    def evaluate(self, t0, t1=None, left=True):
        theta = (t0 - self.t0) / (self.t1 - self.t0)
        y = self.inside.evaluate(t0, t1, left)
        return y + self.bend * theta * (1 - theta) * y**2


def bent(interpolation_cls, bend):
    """`interpolation_cls` that bends what `interpolation_cls` interpolates."""

    def make(*, t0, t1, **dense_info):
        inside = interpolation_cls(t0=t0, t1=t1, **dense_info)
        return Bent(t0, t1, inside, bend)

    return make


class BentHeun(diffrax.ReversibleHeun):
    bend: jax.Array = 0.0

    @property
    def interpolation_cls(self):
        return bent(diffrax.ReversibleHeun.interpolation_cls, self.bend)


class BentLeapfrog(diffrax.LeapfrogMidpoint):
    bend: jax.Array = 0.0

    @property
    def interpolation_cls(self):
        return bent(diffrax.LeapfrogMidpoint.interpolation_cls, self.bend)


class BentALF2(ReversibleALF2):
    bend: jax.Array = 0.0

    @property
    def interpolation_cls(self):
        return bent(ReversibleALF2.interpolation_cls.fget(self), self.bend)


class BentBosh3(diffrax.Bosh3):
    bend: jax.Array = 0.0

    @property
    def interpolation_cls(self):
        return bent(diffrax.Bosh3.interpolation_cls, self.bend)


class BentByHand(CoupledEulerByHand):
    @property
    def interpolation_cls(self):
        return bent(diffrax.LocalLinearInterpolation, self.share)


class BentUpdates(CoupledEuler):
    @property
    def interpolation_cls(self):
        return bent(diffrax.LocalLinearInterpolation, self.share)
