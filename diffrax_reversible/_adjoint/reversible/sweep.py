"""The reverse sweep that reconstructs the states of a solve."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._autodiff.report import Action
from ..._loop.problem import Problem
from ..._loop.state import differentiated, end_time, num_accepted
from ..._reversal.base import ReverseStep, StepInputs
from ..._reversal.registry import reversal_of
from ..._tree import where
from ..._types import BoolScalarLike, RealScalarLike
from ..discrete.checkpoints import Checkpoints
from ..discrete.measures import largest, norm, sizes
from ..discrete.sweep import AbstractStepSweep, Solved
from .accuracy import default_rtol, doubt, noise, of_both, relative_loss


class States(eqx.Module):
    """What is kept of the states of a solve.

    - `sizes`: the largest absolute value of every component of the solution, and of the
        solver state.
    - `checkpoints`: `None` if there are none.
    """

    sizes: tuple[PyTree[Array], PyTree[Array]]
    checkpoints: Checkpoints | None

    @property
    def buffers(self) -> list:
        return [] if self.checkpoints is None else self.checkpoints.buffers


class Loss(eqx.Module):
    """The largest loss so far, and where it was."""

    size: Array
    t: RealScalarLike

    def add(self, size: Array, t: RealScalarLike) -> "Loss":
        return Loss(largest(self.size, size), jnp.where(size > self.size, t, self.t))


@dataclasses.dataclass(frozen=True, eq=False)
class ReversibleSweep(AbstractStepSweep):
    """Every step is undone, and pulled back at the state that was found.

    - `slots`: for checkpoints.
    - `rtol` (`None`: the default), `on_failure`: what loss to accept, and what to do
        about a larger one.
    """

    slots: int | None
    rtol: float | None
    on_failure: Action

    keeps_every_state: ClassVar[bool] = False

    def init_states(self, problem):
        state, checkpoints = _state(problem.state), None
        if self.slots is not None:
            checkpoints = Checkpoints.empty(self.slots, state)
        return States(sizes(_floating(state)), checkpoints)

    def keep_states(self, states, before, after):
        state, checkpoints = _state(after), states.checkpoints
        if checkpoints is not None:
            number = num_accepted(after)
            accepted = number > num_accepted(before)
            checkpoints = checkpoints.keep(number, state, accepted)
        # Where a step was rejected this is the old state.
        return States(largest(states.sizes, sizes(_floating(state))), checkpoints)

    def init_carry(self, solved):
        state, t = _state(solved.final), end_time(solved.final)
        end = _init_carry(solved.problem, t, state)
        no_loss = Loss(norm(jtu.tree_map(jnp.zeros_like, _floating(state))), t)
        return self._unless_lost(solved, t, end, no_loss)

    def _unless_lost(
        self, solved: Solved, t, end, loss: Loss, active: BoolScalarLike = True
    ) -> tuple[Any, Loss]:
        """`end` and `loss`; the initial state, and infinity, where `end` is so far away
        from the solution that the vector field may not even be finite. Whether that
        matters is found out in `doubt`."""
        y_sizes, _ = solved.memory.states.sizes
        size = norm(lax.stop_gradient(end[0]))
        lost = active & ~(size <= 100 * norm(y_sizes).astype(size.dtype))
        initial = _state(solved.problem.state)
        end = where(lost, _init_carry(solved.problem, t, initial), end)
        return end, loss.add(jnp.where(lost, jnp.inf, 0).astype(loss.size.dtype), t)

    def reversal(self, solved, carry, step, batch):
        return reversal_of(solved.problem.parameters.solver), carry.extra

    def _rtol(self, solved: Solved) -> RealScalarLike:
        if self.rtol is not None:
            return self.rtol
        y, _ = _state(solved.final)
        return default_rtol(y, num_accepted(solved.final))

    def _loss(self, solved: Solved, t, end, known: tuple) -> Array:
        """The loss at `t`, where the solution and the solver state `known` should have
        been found."""
        found = _floating(_end_of(solved.problem, t, end))
        floor = noise(found, num_accepted(solved.final))
        losses = [
            relative_loss(*x, floor)
            for x in zip(found, _floating(known), solved.memory.states.sizes)
        ]
        return of_both(*losses)

    def at_start(self, solved, carry, step, end, batch):
        problem, states = solved.problem, solved.memory.states
        t0, _ = step.interval(step.parameters)
        end, loss = self._unless_lost(solved, t0, end, carry.extra, step.active)
        if states.checkpoints is None:
            return end, loss
        found, known = states.checkpoints.find(step.number - 1)
        found = found & step.active

        def restart():
            new_loss = where(found, self._loss(solved, t0, end, known), 0)
            return where(found, _init_carry(problem, t0, known), end), new_loss

        end, new_loss = lax.cond(
            batch.any(found), restart, lambda: (end, jnp.zeros_like(loss.size))
        )
        return end, loss.add(new_loss, t0)

    def doubt(self, solved, carry):
        t0, known = solved.problem.parameters.span.t0, _state(solved.problem.state)
        loss = carry.extra.add(self._loss(solved, t0, carry.end, known), t0)
        rtol = jnp.asarray(self._rtol(solved), loss.size.dtype)
        return doubt(self.on_failure, loss.size, carry.size, rtol, loss.t)


def _state(state: Any) -> tuple[PyTree, PyTree]:
    """The solution and the solver state in the state of the loop."""
    y, solver_state, *_ = differentiated(state)
    return y, solver_state


def _floating(state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    return eqx.filter(state, eqx.is_inexact_array)


def _init_carry(problem: Problem, t: RealScalarLike, state: tuple) -> Any:
    parameters = problem.parameters
    return reversal_of(parameters.solver).init_carry(parameters.terms, t, *state)


def _end_of(problem: Problem, t: RealScalarLike, end: Any) -> tuple[PyTree, PyTree]:
    """The solution and the solver state at `t`, from what the sweep carries there."""
    parameters = problem.parameters
    inputs = StepInputs(parameters.solver, parameters.terms, parameters.args, t, t)
    step = ReverseStep(lambda _: inputs, None, t, False, 0, True)
    end = reversal_of(parameters.solver).end_of(step, end)
    return end.y, end.solver_state
