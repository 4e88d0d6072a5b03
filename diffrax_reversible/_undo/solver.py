"""A solver whose steps undo those of another one."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractLocalInterpolation,
    AbstractPath,
    AbstractSolver,
    AbstractStratonovichSolver,
    AbstractTerm,
    MultiTerm,
    RESULTS,
)
from jaxtyping import Array, PyTree

from .._compat import WrapTerm, ω
from .._loop.moving_steps import moving_node
from .._loop.steps import UndoneSteps
from .._reversal.base import End, ReverseStep, StepInputs
from .._reversal.registry import reversal_of
from .._solver.base import AbstractReversibleSolver
from .._solver.forwarding import AbstractForwardingSolver
from .._solver.updates.restart import before_step, starts_with_restart
from .._tree import norm
from .._types import BoolScalarLike, IntScalarLike, RealScalarLike


def in_direction(
    terms: PyTree[AbstractTerm], direction: IntScalarLike
) -> PyTree[AbstractTerm]:
    """The terms as diffrax integrates them: in the time `direction * t`."""
    is_leaf = lambda x: isinstance(x, AbstractTerm) and not isinstance(x, MultiTerm)
    wrap = lambda term: WrapTerm(term, direction)
    return jtu.tree_map(wrap, terms, is_leaf=is_leaf)


def to_bits(x: Array) -> Array:
    """A number that is not negative as an integer, in the same order."""
    x = lax.stop_gradient(x).astype(jnp.float32)
    return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(x: Array) -> Array:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.float32)


class UndoneInterpolation(AbstractLocalInterpolation):
    """The dense output of a step, as a function of the time `-t`."""

    t0: RealScalarLike
    t1: RealScalarLike
    path: AbstractPath

    def evaluate(self, t0, t1=None, left=True):
        return self.path.evaluate(-t0, None if t1 is None else -t1, left)


@dataclasses.dataclass(frozen=True)
class _Interpolate:
    """Makes the interpolation of a step that is undone, from that of the step."""

    make: Callable

    def __call__(self, *, t0, t1, dense_info) -> UndoneInterpolation:
        return UndoneInterpolation(t0, t1, self.make(t0=-t1, t1=-t0, **dense_info))


class UndoneState(eqx.Module):
    """The solver state of `Undone`.

    - `remaining`: the number of steps that are still to be undone.
    - `solver_state`: of the solver whose steps are undone.
    - `loss`: the largest difference of a solution that was found and the one that was kept
        of it, or that was found next to last; its bits as an integer, which is not
        differentiated, nor found again.
    """

    remaining: IntScalarLike
    solver_state: PyTree
    loss: Array


class Undone(
    AbstractForwardingSolver, AbstractReversibleSolver, AbstractStratonovichSolver
):
    """Undoes the steps of a solver, in the time `-t`. Its own steps are undone by making
    those of the solver.

    - `steps`: those that are undone.
    - `t0`, `t1`: of the solve that undoes them.
    """

    solver: AbstractSolver
    steps: UndoneSteps
    t0: RealScalarLike
    t1: RealScalarLike

    undoes_restarts: ClassVar[bool] = True

    @property
    def interpolation_cls(self):  # pyright: ignore
        return _Interpolate(self.solver.interpolation_cls)

    def error_order(self, terms):
        del terms
        return None

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args
        raise NotImplementedError("A solve is undone from its solver state.")

    def _made_jump(self, number: IntScalarLike) -> BoolScalarLike:
        return self.steps.steps.made_jump(jnp.maximum(number - 1, 0))

    def _find(self, step: ReverseStep, end: End) -> tuple:
        """The start of a step, its dense output, and how far off its end may be."""
        undo, inputs = reversal_of(self.solver).undo, step.inputs
        first = y0, state, dense_info = undo(step, end)
        loss = jnp.zeros((), jnp.float32)
        if getattr(self.solver, "reversal_rtol", None) is None:
            return (y0, state), dense_info, loss
        # It is undone only nearly: `undo(step(x)) = x + e(x)` with a small `e`, which
        # drops out to the second order, and then to the fourth.
        correction = None
        for _ in range(2):
            y1, _, dense_info, state1, _ = self.solver.step(
                inputs.terms,
                inputs.t0,
                inputs.t1,
                y0,
                inputs.args,
                state,
                step.made_jump,
            )
            again = undo(step, End(y1, state1))
            variables = lambda x: eqx.filter(x[:2], eqx.is_inexact_array)
            correction = (variables(first) ** ω - variables(again) ** ω).ω
            y0, state = eqx.apply_updates((y0, state), correction)
        assert correction is not None
        return (y0, state), dense_info, norm(correction)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        remaining, state = solver_state.remaining, solver_state.solver_state
        restarts = starts_with_restart(state)
        inputs = StepInputs(self.solver, in_direction(terms, -1), args, -t1, -t0)
        before = self.steps.start_before(remaining)
        step = ReverseStep(
            lambda _: inputs,
            None,
            moving_node(before, -self.t1, -self.t0),
            self._made_jump(remaining),
            restarts,
            remaining,
            True,
        )
        (found, state), dense_info, last = self._find(step, End(y0, state))
        y1, state = before_step(state, found, restarts)
        loss = jnp.maximum(norm((found**ω - y1**ω).ω).astype(last.dtype), last)
        loss = jnp.maximum(solver_state.loss, to_bits(loss))
        new = UndoneState(remaining - 1, state, loss)
        return y1, None, dict(dense_info=dense_info), new, RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        del ts_state, made_jump
        remaining = solver_state.remaining + 1
        y0, _, dense_info, state, result = self.solver.step(
            in_direction(terms, -1),
            -t1,
            -t0,
            y1,
            args,
            solver_state.solver_state,
            self._made_jump(remaining),
        )
        new = UndoneState(remaining, state, solver_state.loss)
        return y0, dict(dense_info=dense_info), new, result
