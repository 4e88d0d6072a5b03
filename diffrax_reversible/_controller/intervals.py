"""Which intervals the steps of a finished solve covered."""

import jax.numpy as jnp
from diffrax import AbstractStepSizeController, ConstantStepSize, StepTo
from jaxtyping import PyTree

from .._types import IntScalarLike, RealScalarLike
from .recorded import RecordedSteps
from .replayed import ReplayedSteps


def knows_its_steps(controller: AbstractStepSizeController) -> bool:
    """Whether the steps can be told after the solve without having wrapped
    `controller` in `RecordedSteps`."""
    return isinstance(
        controller, ConstantStepSize | StepTo | ReplayedSteps | RecordedSteps
    )


def step_interval(
    controller: AbstractStepSizeController,
    controller_state: PyTree,
    index: IntScalarLike,
    num_steps: IntScalarLike,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
) -> tuple[RealScalarLike, RealScalarLike]:
    """The interval of step number `index` (from 0).

    - `controller_state`: as the solve has left it.
    - `num_steps`: the number of accepted steps.
    - `t0`: where the solve started; `t1`: where its last step ended, which diffrax may
        have moved by a few units in the last place.
    """
    if isinstance(controller, RecordedSteps):
        # A record that was passed in already holds the steps of an earlier solve.
        record = controller_state.record
        index = record.count - num_steps + index
        start, end = record.intervals[index] * controller._direction
        return start, end
    if isinstance(controller, ReplayedSteps):
        start, end = controller.record.intervals[index]
        return start, end
    if isinstance(controller, StepTo):
        node = lambda i: controller.ts[i]
    elif isinstance(controller, ConstantStepSize):
        assert dt0 is not None
        steps_completed, *bounds = controller_state

        def node(i):
            # Ask diffrax where it went, rather than repeat its formula.
            completed = steps_completed - num_steps + i - 2
            previous = t0 + (i - 1) * dt0
            _, _, tnext, *_ = controller.adapt_step_size(
                t0, previous, None, None, None, None, None, (completed, *bounds)
            )
            return jnp.where(i == 1, t0 + dt0, tnext)

    else:
        raise AssertionError(f"No record of the steps of {controller}.")
    start = jnp.where(index == 0, t0, node(index))
    end = jnp.where(index == num_steps - 1, t1, node(index + 1))
    return start, end
