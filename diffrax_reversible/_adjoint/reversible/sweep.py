"""The reverse sweep that reconstructs the states of a solve."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver
from jaxtyping import Array, PyTree

from ..._autodiff.report import OnFailure
from ..._compat import is_sde
from ..._loop.problem import direction_of, Problem
from ..._loop.state import differentiated, end_time, num_accepted
from ..._reversal.base import ReverseStep, StepInputs
from ..._reversal.registry import reversal_of
from ..._reversal.updates import UpdatesReversal
from ..._solver.updates.restart import copy_of, restarted, RestartState, with_copy
from ..._tree import where
from ..._types import BoolScalarLike, RealScalarLike
from ..discrete.checkpoints import Checkpoints
from ..discrete.measures import largest, norm, sizes
from ..discrete.sweep import AbstractStepSweep, Solved
from .accuracy import (
    default_rtol,
    doubt,
    has_room_for,
    is_solution,
    noise,
    of_both,
    relative_loss,
)
from .monitor import Monitor, watch


class States(eqx.Module):
    """What is kept of the states of a solve.

    - `sizes`: the largest absolute value of every component of the solution, and of the
        solver state.
    - `difference`: how large that of the two copies of the solution was at most; `None`
        if the solver tells it itself, or has one copy only.
    - `checkpoints`: `None` if there are none.
    """

    sizes: tuple[PyTree[Array], PyTree[Array]]
    difference: Array | None
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
    - `monitor`: is told what the loss was.
    """

    slots: int | None
    rtol: float | None
    on_failure: OnFailure
    monitor: Monitor | None

    def init_states(self, problem):
        state, checkpoints, slots = _state(problem.state), None, self.slots
        refuse_restarts_inside(problem.parameters.solver, state)
        if slots is None:
            slots = _default_slots(problem)
        if slots > 0:
            checkpoints = Checkpoints.empty(slots, _copies(state))
        parameters, difference = problem.parameters, None
        if not is_sde(parameters.terms):
            difference = reversal_of(parameters.solver).difference(state, state)
        if difference is not None:
            difference = jnp.zeros_like(norm(difference))
        return States(sizes(_floating(state)), difference, checkpoints)

    def keep_states(self, states, problem, before, after):
        checkpoints, difference = states.checkpoints, states.difference
        if checkpoints is not None:
            number = num_accepted(before)
            accepted = (num_accepted(after) > number) & (number > 0)
            state = _state(before)
            restart = restarted(state[1])
            checkpoints = checkpoints.keep(number, _copies(state), accepted, restart)
        # Where a step was rejected this is the old state.
        state = _state(after)
        if difference is not None:
            reversal = reversal_of(problem.parameters.solver)
            new = reversal.difference(_state(before), state)
            difference = jnp.maximum(difference, lax.stop_gradient(norm(new)))
        new_sizes = largest(states.sizes, sizes(_floating(state)))
        return States(new_sizes, difference, checkpoints)

    def restarts(self, solved, number):
        _, solver_state = _state(solved.problem.state)
        checkpoints, first = solved.memory.states.checkpoints, restarted(solver_state)
        if first is False:
            return False
        return (number == 1) & first | checkpoints.is_before_restart(number - 1)

    def init_carry(self, solved, batch):
        del batch
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
        own = _own_rtol(solved.problem)
        if own is not None:
            return own
        y, _ = _state(solved.final)
        return default_rtol(y, num_accepted(solved.final))

    def _loss(self, solved: Solved, t, end, known: tuple, was_restart) -> Array:
        """The loss at `t`, where the solution and the solver state `known` should have
        been found; of the latter nothing, if it is that before a restart."""
        found = _floating(_end_of(solved.problem, t, end))
        floor = noise(found, num_accepted(solved.final))
        y, copy = _floating(known)
        if was_restart is not False:
            copy = where(~was_restart, copy, 0)
        losses = [
            relative_loss(*x, floor)
            for x in zip(found, (y, copy), solved.memory.states.sizes)
        ]
        return of_both(*losses)

    def at_start(self, solved, carry, step, end, batch):
        problem, states = solved.problem, solved.memory.states
        t0, _ = step.interval(step.parameters)
        end, loss = self._unless_lost(solved, t0, end, carry.extra, step.active)
        if states.checkpoints is None:
            return end, loss
        found, (y, copy) = states.checkpoints.find(step.number - 1)
        found = found & step.active
        # If a solver restarts, the solver state comes second in what is carried.
        known = (y, _with_copies(end[1], copy))

        def restart():
            loss = self._loss(solved, t0, end, known, step.restarts)
            new_loss = where(found, loss, 0)
            return where(found, _init_carry(problem, t0, known), end), new_loss

        end, new_loss = lax.cond(
            batch.any(found), restart, lambda: (end, jnp.zeros_like(loss.size))
        )
        return end, loss.add(new_loss, t0)

    def doubt(self, solved, carry):
        (y0, solver_state0), final = _state(solved.problem.state), _state(solved.final)
        t0, states = solved.problem.parameters.span.t0, solved.memory.states
        known, first = (y0, solver_state0), restarted(solver_state0)
        was_restart = (
            first if first is False else first & (num_accepted(solved.final) > 0)
        )
        loss = carry.extra.add(
            self._loss(solved, t0, carry.end, known, was_restart), t0
        )
        matters = lax.stop_gradient(carry.size) != 0
        # One error is enough.
        fine, difference = jnp.array(True), _difference(states, final)
        if difference is not None:
            fine = is_solution(self.on_failure, *difference, matters)
        if first is not False:
            assert states.checkpoints is not None
            number, slots = states.checkpoints.restarts, len(states.checkpoints.numbers)
            fine = fine & has_room_for(self.on_failure, number, slots, matters & fine)
        rtol = jnp.asarray(self._rtol(solved), loss.size.dtype)
        t, checkpoints = loss.t * direction_of(solved.problem), states.checkpoints
        size = watch(
            self.monitor,
            loss.size,
            loss=loss.size,
            rtol=rtol,
            t=t,
            num_restarts=0 if checkpoints is None else checkpoints.restarts,
            checkpoints=0 if checkpoints is None else checkpoints.slots,
            num_steps=num_accepted(solved.final),
        )
        size = jnp.where(fine, size, 0)
        lost = doubt(self.on_failure, size, carry.size, rtol, t)
        return jnp.where(fine, lost, jnp.nan)


def _default_slots(problem: Problem) -> int:
    """How many states to keep, if nobody says: for restarts, or where a solver is undone
    only nearly; fewer where two copies of the solution drift apart and the solver knows of
    no restarts, since undoing that amplifies rounding; and none where there is one copy, or
    where restarts have been switched off."""
    y, solver_state = _state(problem.state)
    _, copy = _floating((y, solver_state))
    if restarted(solver_state) is not False or _own_rtol(problem) is not None:
        slots = 32
    elif type(solver_state) is RestartState:
        slots = 0
    else:
        slots = 8 if jtu.tree_leaves(copy) else 0
    return min(slots, problem.options["max_steps"] or slots)


def _own_rtol(problem: Problem) -> float | None:
    """What loss to expect of a solver that is undone only nearly."""
    return getattr(problem.parameters.solver, "reversal_rtol", None)


def _difference(states: States, final: tuple) -> tuple[Array, Array] | None:
    """How large the difference of the two copies of the solution, and the solution,
    have been at most; `None` if a solver restarts, or carries only one."""
    _, solver_state = final
    if type(solver_state) is RestartState and not solver_state.restarts:
        return jtu.tree_map(jnp.asarray, lax.stop_gradient(solver_state.largest))
    if states.difference is None:
        return None
    return states.difference, norm(lax.stop_gradient(states.sizes[0]))


def _state(state: Any) -> tuple[PyTree, PyTree]:
    """The solution and the solver state in the state of the loop."""
    y, solver_state, *_ = differentiated(state)
    return y, solver_state


def refuse_restarts_inside(solver: AbstractSolver, state: tuple) -> None:
    """Refuses a solver that is made of another one, which restarts."""
    _, solver_state = state
    is_leaf = lambda x: type(x) is RestartState
    leaves = filter(is_leaf, jtu.tree_leaves(solver_state, is_leaf=is_leaf))
    undone = isinstance(reversal_of(solver), UpdatesReversal) and is_leaf(solver_state)
    undone = undone or getattr(solver, "undoes_restarts", False)
    if not undone and any(x.restarts for x in leaves):
        raise NotImplementedError(
            f"`{type(solver).__name__}` is undone by its `backward_step`, and the solver "
            "inside of it restarts, which cannot be undone so. Pass `restart=None` to "
            "the solver inside."
        )


def _copies(state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """The solution, and the solver state without what is only there to restart, also
    inside of the state of a solver that is made of another one."""
    copies = jtu.tree_map(copy_of, state, is_leaf=_is_restart_state)
    return jtu.tree_map(jnp.asarray, copies)


def _with_copies(carried: PyTree, copies: PyTree) -> PyTree:
    """The inverse of `_copies`, for the solver state. What is only there to restart is that
    which is `carried`; if there is nothing of the kind, that may be of another form."""
    if not any(
        map(_is_restart_state, jtu.tree_leaves(carried, is_leaf=_is_restart_state))
    ):
        return copies
    return jtu.tree_map(with_copy, carried, copies, is_leaf=_is_restart_state)


def _is_restart_state(x: Any) -> bool:
    return type(x) is RestartState


def _floating(state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    return eqx.filter(_copies(state), eqx.is_inexact_array)


def _init_carry(problem: Problem, t: RealScalarLike, state: tuple) -> Any:
    parameters = problem.parameters
    return reversal_of(parameters.solver).init_carry(parameters.terms, t, *state)


def _end_of(problem: Problem, t: RealScalarLike, end: Any) -> tuple[PyTree, PyTree]:
    """The solution and the solver state at `t`, from what the sweep carries there."""
    parameters = problem.parameters
    inputs = StepInputs(parameters.solver, parameters.terms, parameters.args, t, t)
    step = ReverseStep(lambda _: inputs, None, t, False, False, 0, True)
    end = reversal_of(parameters.solver).end_of(step, end)
    return end.y, end.solver_state
