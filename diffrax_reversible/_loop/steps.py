"""The intervals of the steps of a finished solve, as functions of `t0`, `t1` and `dt0`."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, ConstantStepSize, RESULTS, StepTo
from jaxtyping import PyTree

from .._controller import ReplayedSteps
from .._types import BoolScalarLike, IntScalarLike, RealScalarLike
from .moving_steps import follow, moving_node
from .record import TimeRecord
from .state import constant_steps, follow_span, Span


def knows_its_steps(controller: AbstractStepSizeController) -> bool:
    """Whether the steps can be told after the solve without a record of them."""
    known = ConstantStepSize | StepTo | ReplayedSteps | UndoneSteps
    return isinstance(controller, known)


class Steps(eqx.Module):
    """The accepted steps of a finished solve.

    - `controller_state`: as the solve has left it.
    - `count`: how many they are.
    - `t_end`: where the last one ended.
    - `starts_with_jump`: whether the vector field jumped just before the first.
    - `record`: `None` if the controller knows its steps.
    """

    controller: AbstractStepSizeController
    controller_state: PyTree
    count: IntScalarLike
    t_end: RealScalarLike
    starts_with_jump: BoolScalarLike
    record: TimeRecord | None

    def interval(
        self, index: IntScalarLike, span: Span
    ) -> tuple[RealScalarLike, RealScalarLike]:
        """The interval of step number `index` (from 0), differentiable in `span`: the
        steps of `ConstantStepSize` as it makes them, all others as if they kept their
        places relative to `t0` and `t1`."""
        controller = self.controller
        if isinstance(controller, ConstantStepSize):
            return self._constant_interval(controller, index, span)
        if isinstance(controller, ReplayedSteps):
            start, end = controller.record.intervals[index]
        elif isinstance(controller, UndoneSteps):
            start, end = controller.interval(index)
        elif isinstance(controller, StepTo):
            start, end = controller.ts[index], controller.ts[index + 1]
            end = jnp.where(index == self.count - 1, self.t_end, end)
        else:
            assert self.record is not None
            start, end = self.record.interval(index)
        start = moving_node(start, span.t0, span.t1)
        return start, moving_node(end, span.t0, span.t1)

    def made_jump(self, index: IntScalarLike) -> BoolScalarLike:
        """Whether the vector field jumped just before step number `index`; `False`, and
        not traced, if it never does."""
        if self.record is not None:
            jumps = self.record.made_jump
            return False if jumps is None else jumps[self.record.row_of(index)]
        later = None
        if isinstance(self.controller, ReplayedSteps):
            later = self.controller.record.made_jump
        if later is None and self.starts_with_jump is False:
            return False
        later = False if later is None else later[index]
        return jnp.where(index == 0, self.starts_with_jump, later)

    def _constant_interval(self, controller, index, span):
        completed, num_steps, t0, t1_or_dt0 = constant_steps(self.controller_state)
        assert span.dt0 is not None
        # An element of a batch that makes no step is asked for one all the same.
        num_steps = jnp.where(num_steps == 0, 1, num_steps)
        # Ask diffrax where it went, rather than repeat its formula.
        own = eqx.tree_at(lambda s: s.t0, span, jnp.where(t0 == span.t0, span.t0, t0))
        t0, t1_or_dt0 = follow_span((t0, t1_or_dt0), own)

        def node(i):
            now = completed + jnp.asarray(i - self.count - 2, completed.dtype)
            state = (now, num_steps, t0, t1_or_dt0)
            previous = span.t0 + jnp.asarray(i - 1, span.t0.dtype) * span.dt0
            _, _, tnext, *_ = controller.adapt_step_size(
                span.t0, previous, None, None, None, None, None, state
            )
            first = jnp.minimum(span.t0 + span.dt0, span.t1)
            return jnp.where(i == 1, first, tnext)

        last = jnp.where(self.t_end == span.t1, span.t1, node(self.count))
        start = jnp.where(index == 0, span.t0, node(index))
        end = node(index + 1)
        end = jnp.where(index == self.count - 1, follow(self.t_end, last), end)
        return start, end


class UndoneSteps(AbstractStepSizeController[IntScalarLike, None]):
    """Makes the steps of a finished solve again from the last to the first, each from its
    end to its start, in the time `-t`.

    - `steps`, `span`: of the solve.
    """

    steps: Steps
    span: Span

    def interval(self, index: IntScalarLike) -> tuple[RealScalarLike, RealScalarLike]:
        """The interval of step number `index` (from 0) that is undone."""
        return self._interval(self.steps.count - 1 - index)

    def _interval(self, number: IntScalarLike):
        start, end = self.steps.interval(jnp.maximum(number, 0), self.span)
        empty = self.steps.count == 0
        start, end = (jnp.where(empty, self.span.t0, t) for t in (start, end))
        return lax.stop_gradient((-end, -start))

    def start_before(self, remaining: IntScalarLike) -> RealScalarLike:
        """Where the step before step number `remaining` (from 1) of the solve started; for
        the first one, where that started."""
        _, start = self._interval(remaining - 2)
        return -start

    def wrap(self, direction):
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del terms, t0, t1, y0, dt0, args, func, error_order
        _, tnext = self.interval(0)
        return tnext, jnp.array(1)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        del t0, y0, y1_candidate, args, y_error, error_order
        done = controller_state >= self.steps.count
        tprev, tnext = self.interval(controller_state)
        tprev, tnext = jnp.where(done, t1, tprev), jnp.where(done, t1, tnext)
        return True, tprev, tnext, False, controller_state + 1, RESULTS.successful
