"""A walk back over steps whose starts are remembered."""

from collections.abc import Callable

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..._loop.problem import join, Problem, run
from ..._reversal.explicit_runge_kutta import no_stages, Stages, StagesReversal
from ..._types import IntScalarLike, Y
from ..discrete.checkpoints import Checkpoints
from ..discrete.memory import Everything
from ..discrete.step_back import where
from ..discrete.sweep import AbstractStepSweep, steps_of
from .keeps_stages import KeepsStages


class Start(eqx.Module):
    """What is remembered of a step: its start and, perhaps, its stages."""

    y: Y
    stages: Stages | None


class Segment(eqx.Module):
    """The steps between two checkpoints, made again.

    - `before`: the number of steps before the first of them.
    """

    starts: Everything
    before: IntScalarLike


def largest_stride(slots: int, capacity: int) -> int:
    """How far apart `slots` checkpoints of `capacity` steps come to lie."""
    stride = 1
    # As `Checkpoints.keep` doubles it when there is no room for one more.
    while (slots + 1) * stride <= capacity:
        stride *= 2
    return stride


class SymplecticSweep(AbstractStepSweep):
    """Every step is made again from its start, and pulled back stage by stage.

    - `capacity`: how many steps there is room for.
    - `check_capacity`: whether there could be more.
    - `slots`: for checkpoints; `None`: every start is remembered.
    - `store_stages`: whether stages are remembered, too.
    - `passed_solver_state`: whether what the solver has cached at the start of the solve
        is to be used.
    """

    def __init__(
        self,
        loop: Callable,
        static: PyTree,
        name: str,
        capacity: int,
        check_capacity: bool,
        slots: int | None,
        store_stages: bool,
        passed_solver_state: bool,
    ):
        super().__init__(loop, static, name)
        self.capacity = capacity
        self.check_capacity = check_capacity
        self.slots = slots
        self.store_stages = store_stages
        self.passed_solver_state = passed_solver_state

    def _start(self, y: Y, solver_state: PyTree, k: PyTree) -> Start:
        if not self.store_stages:
            return Start(y, None)
        f0 = None if solver_state is None else solver_state[1]
        return Start(y, Stages(k, f0))

    def _no_starts(self, problem: Problem, length: int) -> Everything:
        """Room for so many."""
        state = problem.state
        k = no_stages(problem.solver, problem.state.y) if self.store_stages else None
        return Everything.empty(length, self._start(state.y, state.solver_state, k))

    def evaluate(self, inputs):
        problem = join(inputs, self.static)
        stages_in_loop = self.store_stages and self.slots is None
        if self.slots is None:
            memory = self._no_starts(problem, self.capacity)
        else:
            memory = Checkpoints.empty(self.slots, problem.state.y)

        def keep(memory, before, after):
            number = self._checked(after.num_accepted_steps)
            accepted = number > before.num_accepted_steps
            if self.slots is not None:
                return memory.keep(number, after.y, accepted)
            solver_state, k = before.solver_state, None
            if stages_in_loop:
                solver_state, _ = solver_state
                _, k = after.solver_state
            start = self._start(before.y, solver_state, k)
            return memory.keep(before.num_accepted_steps, start, accepted)

        if not stages_in_loop:
            return run(self.loop, problem, memory, keep)
        problem = eqx.tree_at(
            lambda p: (p.solver, p.state.solver_state),
            problem,
            (
                KeepsStages(problem.solver),
                (
                    problem.state.solver_state,
                    no_stages(problem.solver, problem.state.y),
                ),
            ),
            is_leaf=lambda x: x is None,
        )
        final, memory = run(self.loop, problem, memory, keep)
        solver_state, _ = final.solver_state
        final = eqx.tree_at(lambda s: s.solver_state, final, solver_state)
        return final, memory

    def _checked(self, number: IntScalarLike) -> IntScalarLike:
        if not self.check_capacity:
            return number
        return eqx.error_if(
            number,
            number > self.capacity,
            f"More steps were accepted than `{self.name}(capacity={self.capacity})` has "
            "room for. Pass a larger `capacity`.",
        )

    def depart(self, problem, final):
        segment = None
        if self.slots is not None:
            length = largest_stride(self.slots, self.capacity)
            starts = self._no_starts(problem, length)
            segment = Segment(starts, final.num_accepted_steps)
        return final.y, final.solver_state, segment

    def look_up(self, problem, memory, final, walk, step, batch):
        segment = walk.notes
        index = step.number - 1
        if segment is None:
            start = memory.find(index)
        else:
            segment = self._enter(problem, memory, final, segment, step, batch)
            start = segment.starts.find(index - segment.before)
        solver, solver_state = problem.solver, problem.state.solver_state
        evaluates_first, cached = True, None
        if solver_state is not None:
            # What this has cached is different at every other step.
            first_step, _ = solver_state
            is_first = step.number == 1
            evaluates_first = step.active & (is_first & first_step | step.made_jump)
            if self.passed_solver_state:
                cached = is_first & ~first_step & ~jnp.asarray(step.made_jump)
        reversal = StagesReversal(
            solver, start.y, solver_state, evaluates_first, cached, start.stages
        )
        return reversal, segment

    def _enter(self, problem, checkpoints, final, segment, step, batch) -> Segment:
        """The segment that `step` is in: made again from the checkpoint before it, where
        the walk comes to its last step."""
        solver, parameters = problem.solver, problem.parameters
        steps = steps_of(problem, final)
        last = step.number - 1
        due = step.active & (last < segment.before)

        def make(loop):
            _, i, y, solver_state, starts = loop
            t0, t1 = steps.interval(i, parameters.span)
            y1, _, dense_info, solver_state1, _ = solver.step(
                parameters.terms,
                t0,
                t1,
                y,
                parameters.args,
                solver_state,
                steps.made_jump(i),
            )
            start = self._start(y, solver_state, dense_info.get("k"))
            starts = starts.keep(i - before, start, due & (i <= last))
            return go_on(i + 1), i + 1, y1, solver_state1, starts

        def remake():
            found, y = checkpoints.find(before)
            y = where(found, y, problem.state.y)
            solver_state = problem.state.solver_state
            if solver_state is not None:
                first_step, f0 = solver_state
                solver_state = (first_step | (before > 0), f0)
            loop = (go_on(before), before, y, solver_state, segment.starts)
            *_, starts = lax.while_loop(lambda loop: loop[0], make, loop)
            return Segment(starts, jnp.where(due, before, segment.before))

        before = last - last % checkpoints.stride
        go_on = lambda i: batch.any(due & (i <= last))
        return lax.cond(batch.any(due), remake, lambda: segment)

    def compare(self, problem, memory, final, walk, step, batch):
        del problem, memory, final, step, batch
        return walk

    def trusted(self, problem, final, walk):
        del problem, final, walk
        return True
