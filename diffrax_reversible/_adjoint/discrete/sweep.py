"""The reverse sweep over the accepted steps of a solve."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._autodiff.batch import Batch
from ..._autodiff.report import is_trusted, OnFailure
from ..._autodiff.sweep import AbstractSweep, Inputs, Residuals
from ..._call_site import CallSite
from ..._controller import RecordedSteps
from ..._loop.problem import join, Parameters, Problem, run
from ..._loop.record import TimeRecord
from ..._loop.state import (
    buffers,
    controller_state,
    cotangent_of_dense_info,
    cotangents_of_times,
    differentiated,
    end_time,
    is_none,
    may_jump,
    next_step,
    num_accepted,
    resumable,
    saved,
    times_of,
)
from ..._loop.steps import knows_its_steps, Steps
from ..._reversal.base import AbstractReversal, Cotangent, ReverseStep, StepInputs
from ..._tree import where
from ..._types import BoolScalarLike, IntScalarLike
from .measures import norm
from .saves import Cursor, pull_back_inside, Saver
from .times import Restarts, Times


class Memory(eqx.Module):
    """What a solve keeps for its reverse sweep.

    - `record`: of its steps; `None` if the controller knows them.
    - `restarts`: from where those of them can be made again that the record has no room
        for; `None` if it has room for all.
    - `states`: what the adjoint method keeps of the states.
    """

    record: TimeRecord | None
    restarts: Restarts | None
    states: Any

    @property
    def buffers(self) -> list:
        parts = (self.record, self.restarts, self.states)
        return [x for part in parts if part is not None for x in part.buffers]


class Carry(eqx.Module):
    """What the reverse sweep carries, at the end of the next step to be undone.

    - `number`: of the step, from 1, that is undone next: the same for all elements of a
        batch. Those with fewer steps wait for it to come to their last one, so that what
        is kept of every so many steps is looked up by all at once.
    - `remaining`: the number of steps that are left.
    - `end`: the solution and the solver state, as the reversal of the solver carries
        them.
    - `size`: of the cotangents of the solve.
    - `times`: those of the next steps; `None` if all times are known.
    - `extra`: what else an adjoint method needs.
    """

    number: IntScalarLike
    remaining: IntScalarLike
    cursors: list[Cursor]
    end: Any
    cotangent_y: PyTree
    cotangent_solver_state: PyTree
    size: Array
    times: Times | None
    extra: PyTree


class Solved(eqx.Module):
    """A finished solve: the problem, the last state of the loop, and what was kept."""

    problem: Problem
    final: Any
    memory: Memory

    def steps(self, times: Times | None) -> Steps:
        """The steps; if `times`, then those which it knows."""
        _, _, starts_with_jump = next_step(self.problem.state)
        return Steps(
            self.problem.stepsize_controller,
            controller_state(self.final),
            num_accepted(self.final),
            end_time(self.final),
            starts_with_jump,
            self.memory.record if times is None else times.record,
        )


# How many times are kept by default, unless there can be very many steps: more than most
# solves make, and fewer numbers than the states of small systems that diffrax keeps.
default_room = 512


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractStepSweep(AbstractSweep):
    """The loop of a solve, and its reverse sweep step by step.

    - `loop`: diffrax's own.
    - `static`: what of the problem is not an array.
    - `name`: of the adjoint method, for errors.
    - `capacity`: how many adaptive steps to make room for, so that more are refused;
        `None`: not for all of them, if they can be many.
    - `throw`: whether to raise where there is not enough room.
    - `call_site`: of the solve, for errors at run time.
    """

    loop: Callable
    static: PyTree
    name: str
    capacity: int | None
    throw: bool
    call_site: CallSite | None

    @property
    def refusal(self):
        return (
            f"`adjoint={self.name}()` does not differentiate with respect to a value that "
            "a callable closes over, other than the vector field and `SaveAt(fn=...)`. "
            "Pass it through `args`, or make the callable an `equinox.Module` of which "
            "it is a field; or use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )

    @property
    def refusal_twice(self):
        return (
            f"A solve with `adjoint={self.name}()` cannot be differentiated twice in "
            "reverse mode, nor in reverse mode over forward mode. For second derivatives "
            "use forward mode over reverse mode: `jax.jacfwd(jax.grad(...))`, `jax.jvp` "
            "of `jax.grad`, or a Hessian-vector product of these."
        )

    #
    # What the adjoint methods differ in.
    #

    @abc.abstractmethod
    def init_states(self, problem: Problem) -> Any:
        """What is kept of the states, at the start of the solve: has a property
        `buffers`; or `None`."""

    @abc.abstractmethod
    def keep_states(
        self, states: Any, problem: Problem, before: Any, after: Any
    ) -> Any:
        """What is kept of the states, after a step of the loop."""

    @abc.abstractmethod
    def init_carry(self, solved: Solved, batch: Batch) -> tuple[Any, PyTree]:
        """`end` and `extra` of the carry where the sweep starts."""

    @abc.abstractmethod
    def reversal(
        self, solved: Solved, carry: Carry, step: ReverseStep, batch: Batch
    ) -> tuple[AbstractReversal, PyTree]:
        """What undoes the next step, and the new `extra`."""

    @abc.abstractmethod
    def at_start(
        self, solved: Solved, carry: Carry, step: ReverseStep, end: Any, batch: Batch
    ) -> tuple[Any, PyTree]:
        """`end` and `extra` of the carry, after the step has been undone and has led to
        `end`. `carry` is that before, with the new `extra`."""

    def restarts(self, solved: Solved, number: IntScalarLike) -> BoolScalarLike:
        """Whether step `number`, from 1, started with a restart; `False` itself if no
        step does."""
        del solved, number
        return False

    @abc.abstractmethod
    def doubt(self, solved: Solved, carry: Carry) -> Array:
        """Zero, or NaN where the sweep is not to be trusted."""

    def reach(self, problem: Problem) -> int:
        """How many steps before the next one are looked up at most."""
        del problem
        return 3

    def plain_solver_state(self, problem: Problem, state: Any) -> PyTree:
        """The solver state of the user's solver, of a state of the loop."""
        del problem
        _, solver_state, *_ = differentiated(state)
        return solver_state

    #
    # What they have in common.
    #

    def evaluate(self, inputs: Inputs) -> Any:
        nothing = Memory(None, None, None)
        final, _ = run(
            self.loop, join(inputs, self.static), nothing, lambda *_: nothing
        )
        return final

    def evaluate_with_memory(
        self, inputs: Inputs, perturbed: Inputs
    ) -> tuple[Any, Memory | None]:
        del perturbed
        problem = join(inputs, self.static)
        if self._lacks_capacity(problem):
            # Forward mode does without. Reverse mode is refused in `start`.
            return self.evaluate(inputs), None
        return self.run_with_memory(problem)

    def run_with_memory(self, problem: Problem) -> tuple[Any, Memory]:
        """The last state of the loop, and what was kept on the way."""
        record, restarts, parameters = None, None, problem.parameters
        resume = lambda s: resumable(s, self.plain_solver_state(problem, s))
        if not knows_its_steps(problem.stepsize_controller):
            jumps = may_jump(
                problem.stepsize_controller,
                parameters.solver,
                parameters.terms,
                parameters.args,
                problem.state,
            )
            t0, _, _ = next_step(problem.state)
            room = self._room(problem)
            forgets = not self._has_room_for_all(problem)
            record = TimeRecord.empty(room, t0, jumps, forgets)
            if forgets:
                max_steps = problem.options["max_steps"]
                restarts = Restarts.empty(room, max_steps, resume(problem.state))

        def keep(memory, before, after):
            record, restarts = memory.record, memory.restarts
            accepted = num_accepted(after) > num_accepted(before)
            if record is not None:
                record = record.keep(*next_step(before), accepted)
            if restarts is not None:
                restarts = restarts.keep(resume(after), accepted)
            states = self.keep_states(memory.states, problem, before, after)
            return Memory(record, restarts, states)

        memory = Memory(record, restarts, self.init_states(problem))
        return run(self.loop, problem, memory, keep)

    def _solved(self, residuals: Residuals) -> Solved:
        problem = join(residuals.inputs, self.static)
        return Solved(problem, residuals.outputs, residuals.memory)

    def _lacks_capacity(self, problem: Problem) -> bool:
        knows = knows_its_steps(problem.stepsize_controller)
        is_known = self.capacity is not None or problem.options["max_steps"] is not None
        return not is_known and not knows

    def _room(self, problem: Problem) -> int:
        """For how many times there is room."""
        if self.capacity is not None:
            return self.capacity
        max_steps = problem.options["max_steps"]
        if isinstance(problem.stepsize_controller, RecordedSteps):
            # Its state, which is as large, is not to be kept.
            return max_steps
        room = max(default_room, max_steps // 32, 2 * self.reach(problem))
        return min(room, max_steps)

    def _has_room_for_all(self, problem: Problem) -> bool:
        """Whether there is a time for each step that is not refused."""
        max_steps = problem.options["max_steps"]
        return self.capacity is not None or self._room(problem) == max_steps

    def steps(self, solved: Solved, carry: Carry) -> Steps:
        """Those of the solve, where the sweep is now."""
        return solved.steps(carry.times)

    def start(self, residuals: Residuals, cotangents: PyTree, batch: Batch) -> Carry:
        if residuals.memory is None:
            raise ValueError(
                f"`adjoint={self.name}()` must know how many steps to make room for. "
                f"Pass `adjoint={self.name}(capacity=...)`, or "
                "`diffeqsolve(..., max_steps=...)`."
            )
        solved = self._solved(residuals)
        end, extra = self.init_carry(solved, batch)
        cotangent_y, cotangent_solver_state, *_ = differentiated(cotangents)
        cursors = [Cursor(*numbers) for numbers in saved(solved.final)]
        remaining, memory = num_accepted(solved.final), solved.memory
        times = None
        if memory.restarts is not None:
            assert memory.record is not None
            times = Times.at_end(memory.record, batch)
        return Carry(
            batch.max(remaining),
            remaining,
            cursors,
            end,
            cotangent_y,
            cotangent_solver_state,
            norm(cotangents),
            times,
            extra,
        )

    def length(self, carry: Carry) -> IntScalarLike:
        return carry.remaining

    def step(
        self,
        residuals: Residuals,
        cotangents: PyTree,
        carry: Carry,
        total: PyTree,
        batch: Batch,
    ) -> tuple[Carry, PyTree]:
        solved = self._solved(residuals)
        problem, final = solved.problem, solved.final
        mask = lambda total, x: None if total is None else x
        parameters = jtu.tree_map(
            mask, total, residuals.inputs.parameters, is_leaf=is_none
        )
        all_parameters = lambda p: eqx.combine(p, problem.parameters)
        carry = self._with_times(solved, carry, batch)
        step = self._current_step(solved, all_parameters, parameters, carry, batch)
        is_last = step.active & (step.number == num_accepted(final))
        reversal, extra = self.reversal(solved, carry, step, batch)
        end = reversal.end_of(step, carry.end)
        savers = _savers(problem, all_parameters, cotangents)

        # In the reverse order: saved the end, saved the inside, stepped.
        cursors = list(carry.cursors)
        cotangent_y, cotangent_solver_state = where(
            step.active, (carry.cotangent_y, carry.cotangent_solver_state), 0
        )
        for i, saver in enumerate(savers):
            cotangent_y, total, cursors[i] = saver.pull_back_end(
                step, cursors[i], end.y, cotangent_y, batch, total
            )
        _, _, total = batch.vjp(
            lambda _, p: times_of(final, *step.interval(p)),
            (),
            parameters,
            cotangents_of_times(cotangents, step.number, step.active, is_last),
            total,
        )

        def interpolate(parameters, dense_info, t):
            inputs = step.inputs_of(parameters)
            make = inputs.solver.interpolation_cls
            return make(t0=inputs.t0, t1=inputs.t1, **dense_info).evaluate(t)

        cotangent_dense_info, total, cursors = pull_back_inside(
            savers,
            step,
            cursors,
            interpolate,
            lambda: reversal.dense_info(step, end),
            cotangent_of_dense_info(cotangents, step.number, step.active, is_last),
            batch,
            total,
        )
        cotangent = Cotangent(cotangent_y, cotangent_solver_state, cotangent_dense_info)
        start, cotangent_y, cotangent_solver_state, total = reversal.pull_back(
            step, end, cotangent, batch, total
        )
        before = eqx.tree_at(lambda c: c.extra, carry, extra, is_leaf=is_none)
        start, extra = self.at_start(solved, before, step, start, batch)
        new = Carry(
            carry.number,
            carry.remaining - 1,
            cursors,
            start,
            cotangent_y,
            cotangent_solver_state,
            carry.size,
            None,
            None,
        )
        # These may be large: whoever changes them leaves them alone if not active.
        large = lambda c: (c.times, c.extra)
        old = eqx.tree_at(large, carry, (None, None), is_leaf=is_none)
        new = where(step.active, new, old)
        changed = lambda c: (c.number, c.times, c.extra)
        values = (carry.number - 1, carry.times, extra)
        return eqx.tree_at(changed, new, values, is_leaf=is_none), total

    def _with_times(self, solved: Solved, carry: Carry, batch: Batch) -> Carry:
        """The carry with the times that the next step takes."""
        times, restarts = carry.times, solved.memory.restarts
        if times is None:
            return carry
        assert restarts is not None
        reach = self.reach(solved.problem)
        of = (self.loop, solved.problem, restarts)
        times = times.reaching(*of, carry.number, carry.remaining, reach, batch)
        return eqx.tree_at(lambda c: c.times, carry, times)

    def _current_step(
        self, solved: Solved, all_parameters, parameters, carry: Carry, batch: Batch
    ) -> ReverseStep:
        # Outside a batch the loop ends when there are no steps left.
        active = len(batch.names) == 0 or carry.remaining == carry.number
        number = carry.remaining if active is True else jnp.maximum(carry.remaining, 1)
        steps, span = self.steps(solved, carry), solved.problem.parameters.span

        def inputs_of(parameters):
            everything: Parameters = all_parameters(parameters)
            # A step of length zero is safe to evaluate, whatever the vector field.
            nowhere = (everything.span.t0, everything.span.t0)
            interval = where(
                active, steps.interval(number - 1, everything.span), nowhere
            )
            solver, terms, args = everything.solver, everything.terms, everything.args
            return StepInputs(solver, terms, args, *interval)

        t_previous, _ = steps.interval(jnp.maximum(number - 2, 0), span)
        made_jump = steps.made_jump(number - 1)
        restarts = self.restarts(solved, number)
        restarts = restarts if restarts is False else restarts & active
        return ReverseStep(
            inputs_of, parameters, t_previous, made_jump, restarts, number, active
        )

    def finish(
        self, residuals: Residuals, cotangents: PyTree, carry: Carry
    ) -> tuple[PyTree, Array]:
        solved = self._solved(residuals)
        doubt = self.doubt(solved, carry)
        record = solved.memory.record
        if record is not None:
            agrees = True if carry.times is None else carry.times.agrees
            doubt = doubt + self._check_record(record, agrees).astype(doubt.dtype)
        _, _, *others = differentiated(cotangents)
        return (carry.cotangent_y, carry.cotangent_solver_state, *others), doubt

    def _check_record(self, record: TimeRecord, agrees: BoolScalarLike) -> Array:
        """Zero, or NaN where the steps cannot be told from what was kept of them."""
        action = OnFailure("raise" if self.throw else "nan", self.call_site)

        def no_room(element, number, capacity):
            return (
                f"The solve{element} accepted {int(number)} steps, and there is room for "
                f"{int(capacity)}. Pass `adjoint={self.name}(capacity={int(number)})`, "
                "or more."
            )

        def gaps(element, *_):
            return (
                f"The solve{element} made a step that does not start where the one before "
                "it ended, and its controller does not say that the vector field jumps. "
                "Use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
            )

        def differ(element, *_):
            return (
                f"Steps of the solve{element} were made again, since they were more than "
                f"{record.capacity}, and came out otherwise: the vector field, or the "
                "step-size controller, does not return the same when it is called again. "
                f"Pass `adjoint={self.name}(capacity=...)`, the number of steps, so that "
                "none is made again."
            )

        if record.forgets:
            mistaken = jnp.where(agrees, 0, 1).astype(jnp.float32)
            has_room = is_trusted(mistaken, 0, action, differ)
        else:
            number = jnp.asarray(record.count).astype(jnp.float32)
            has_room = is_trusted(number, record.capacity, action, no_room)
        missing = jnp.where(record.is_complete, 0, 1).astype(jnp.float32)
        okay = has_room & is_trusted(missing, 0, action, gaps)
        return jnp.where(okay, 0, jnp.nan)


def _savers(problem: Problem, all_parameters, cotangents) -> list[Saver]:
    def saver(i, subsaveat, cotangents):
        ts = None
        if subsaveat.ts is not None:
            ts = lambda parameters: all_parameters(parameters).subsaveats[i].ts

        def fn(parameters, t, y):
            everything = all_parameters(parameters)
            return everything.subsaveats[i].fn(t, y, everything.args)

        return Saver(ts, subsaveat.steps, fn, cotangents)

    pairs = zip(problem.parameters.subsaveats, buffers(cotangents))
    return [saver(i, *pair) for i, pair in enumerate(pairs)]
