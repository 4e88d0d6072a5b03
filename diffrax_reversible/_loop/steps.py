"""Which intervals the steps of a finished solve covered."""

import equinox as eqx
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, ConstantStepSize, StepTo
from jaxtyping import PyTree

from .._controller.recorded import RecordedSteps
from .._controller.replayed import ReplayedSteps
from .._types import BoolScalarLike, IntScalarLike, RealScalarLike
from .moving_steps import follow, moving_node


def knows_its_steps(controller: AbstractStepSizeController) -> bool:
    """Whether the steps can be told after the solve without having wrapped
    `controller` in `RecordedSteps`."""
    return isinstance(
        controller, ConstantStepSize | StepTo | ReplayedSteps | RecordedSteps
    )


class Span(eqx.Module):
    """The arguments of `diffeqsolve` that place the steps."""

    t0: RealScalarLike
    t1: RealScalarLike
    dt0: RealScalarLike | None


class Steps(eqx.Module):
    """The accepted steps of a finished solve.

    - `controller_state`: as the solve has left it.
    - `count`: how many they are.
    - `t_end`: where the last one ended, which diffrax may have moved by a few units in
        the last place.
    - `starts_with_jump`: whether the vector field jumped just before the first.
    """

    controller: AbstractStepSizeController
    controller_state: PyTree
    count: IntScalarLike
    t_end: RealScalarLike
    starts_with_jump: BoolScalarLike

    def interval(
        self, index: IntScalarLike, span: Span
    ) -> tuple[RealScalarLike, RealScalarLike]:
        """The interval of step number `index` (from 0), differentiable in `span`: the
        steps of `ConstantStepSize` as it makes them, all others as if they kept their
        places relative to `t0` and `t1`."""
        controller = self.controller
        if isinstance(controller, ConstantStepSize):
            return self._constant_interval(controller, index, span)
        if isinstance(controller, RecordedSteps):
            start, end = self._record(index) * controller._direction
        elif isinstance(controller, ReplayedSteps):
            start, end = controller.record.intervals[index]
        elif isinstance(controller, StepTo):
            start, end = controller.ts[index], controller.ts[index + 1]
            end = jnp.where(index == self.count - 1, self.t_end, end)
        else:
            raise AssertionError(f"No record of the steps of {controller}.")
        start = moving_node(start, span.t0, span.t1)
        end = moving_node(end, span.t0, span.t1)
        return start, end

    def made_jump(self, index: IntScalarLike) -> BoolScalarLike:
        """Whether the vector field jumped just before step number `index`; `False`, and
        not traced, if it never does."""
        controller = self.controller
        if isinstance(controller, RecordedSteps) and controller.jumps:
            later = self._record(index, "made_jump")
        elif isinstance(controller, ReplayedSteps) and controller.jumps:
            flags = controller.record.made_jump
            assert flags is not None
            later = flags[index]
        elif self.starts_with_jump is False:
            return False
        else:
            later = False
        return jnp.where(index == 0, self.starts_with_jump, later)

    def _record(self, index, name="intervals"):
        # A record that was passed in holds the steps of an earlier solve, too.
        record = self.controller_state.record
        return getattr(record, name)[record.count - self.count + index]

    def _constant_interval(self, controller, index, span):
        steps_completed, num_steps, t0, t1_or_dt0 = self.controller_state
        assert span.dt0 is not None
        # An element of a batch that makes no step is asked for one all the same.
        num_steps = jnp.where(num_steps == 0, 1, num_steps)
        # Ask diffrax where it went, rather than repeat its formula.
        t0 = follow(t0, jnp.where(t0 == span.t0, span.t0, t0))
        leader = jnp.where(jnp.isfinite(span.t1), span.t1, span.dt0)
        t1_or_dt0 = follow(t1_or_dt0, leader)

        def node(i):
            state = (steps_completed - self.count + i - 2, num_steps, t0, t1_or_dt0)
            previous = span.t0 + (i - 1) * span.dt0
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
