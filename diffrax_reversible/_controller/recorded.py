"""Recording the steps that an adaptive solve has accepted."""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractStepSizeController,
    AbstractTerm,
    ClipStepSizeController,
    RESULTS,
)
from jaxtyping import Array, Bool, Float, PyTree

from .._compat import buffer_at_set, MaybeBuffer
from .._types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, VF, Y


class StepRecord(eqx.Module):
    """The accepted steps of a solve, in the order in which they were made.

    - `intervals`: where each step started and ended. An array of shape `(capacity, 2)`
        and of the dtype of time, of which the first `count` rows are filled; the others
        are `inf`. In the direction of the solve: a step ends before it starts if
        `t1 < t0`.
    - `count`: the number of accepted steps.
    - `made_jump`: whether the vector field jumped just before each step. A boolean array
        of shape `(capacity,)`; `None` if the controller does not step over jumps.
    """

    # One array rather than two: each step then writes just once.
    intervals: MaybeBuffer[Float[Array, "capacity 2"]]
    count: IntScalarLike
    made_jump: MaybeBuffer[Bool[Array, " capacity"]] | None

    @property
    def t0s(self) -> Float[Array, " capacity"]:
        """Where each step started."""
        return self.intervals[:, 0]

    @property
    def t1s(self) -> Float[Array, " capacity"]:
        """Where each step ended."""
        return self.intervals[:, 1]


class RecordedState(eqx.Module):
    """The controller state of [`diffrax_reversible.RecordedSteps`][].

    - `controller_state`: the state of the wrapped controller.
    - `record`: a [`diffrax_reversible.StepRecord`][].
    - `made_jump`: whether the vector field jumped just before the step that is next to
        be made; `None` if the controller does not step over jumps.
    """

    controller_state: PyTree
    record: StepRecord
    made_jump: BoolScalarLike | None


def may_jump(controller: AbstractStepSizeController) -> bool:
    """Whether `controller` steps over jumps of the vector field."""
    is_clip = lambda x: isinstance(x, ClipStepSizeController)
    clips = [x for x in jtu.tree_leaves(controller, is_leaf=is_clip) if is_clip(x)]
    return any(clip.jump_ts is not None or may_jump(clip.controller) for clip in clips)


class RecordedSteps(AbstractStepSizeController[RecordedState, Any]):
    """Wraps a step-size controller and records every step that it accepts.

    The record is part of the controller state:

    ```python
    solution = diffrax.diffeqsolve(
        ...,
        stepsize_controller=RecordedSteps(controller),
        saveat=diffrax.SaveAt(..., controller_state=True),
    )
    record = solution.controller_state.record
    ```

    and [`diffrax_reversible.ReplayedSteps`][] steps the same steps again.
    [`diffrax_reversible.ReversibleAdjoint`][] records by itself: there is no need to
    wrap a controller for its sake, except to solve with `max_steps=None` and adaptive
    steps, when it has no other way to know how much room to make.

    **Cost:** `2 * capacity` numbers. With `adjoint=ReversibleAdjoint()` a step writes
    just two of them, also under `jax.vmap`. With any other adjoint the same is true of
    a single solve, but under `jax.vmap` the whole record is copied in every step.

    **Raises:** an error at run time if more than `capacity` steps are accepted.
    """

    controller: AbstractStepSizeController
    capacity: int = eqx.field(static=True)
    # Whether `controller` steps over jumps of the vector field.
    jumps: bool = eqx.field(static=True)
    # Makes the times of the record those of the user, who may integrate backwards.
    _direction: IntScalarLike
    # Not needed where room for `max_steps` is made.
    _check_capacity: bool = eqx.field(static=True)

    def __init__(
        self,
        controller: AbstractStepSizeController,
        capacity: int = 4096,
        *,
        _check_capacity: bool = True,
    ):
        if capacity < 1:
            raise ValueError(
                "`RecordedSteps(capacity=...)` must be at least 1, the largest number "
                f"of accepted steps that there is room for; got {capacity}."
            )
        self.controller = controller
        self.capacity = capacity
        self.jumps = may_jump(controller)
        self._direction = 1
        self._check_capacity = _check_capacity

    def wrap(self, direction: IntScalarLike) -> "RecordedSteps":
        return eqx.tree_at(
            lambda c: (c.controller, c._direction),
            self,
            (self.controller.wrap(direction), direction),
        )

    def start(self, controller_state: PyTree, dtype: Any) -> RecordedState:
        """An empty record beside a state of the wrapped controller."""
        intervals = jnp.full((self.capacity, 2), jnp.inf, dtype)
        made_jump = jnp.zeros(self.capacity, bool) if self.jumps else None
        record = StepRecord(intervals, jnp.array(0), made_jump)
        pending = jnp.array(False) if self.jumps else None
        return RecordedState(controller_state, record, pending)

    def init(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        dt0: RealScalarLike | None,
        args: Args,
        func: Callable[[PyTree[AbstractTerm], RealScalarLike, Y, Args], VF],
        error_order: RealScalarLike | None,
    ) -> tuple[RealScalarLike, RecordedState]:
        tnext, controller_state = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        return tnext, self.start(controller_state, jnp.result_type(t0))

    def adapt_step_size(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        y1_candidate: Y,
        args: Args,
        y_error: Y | None,
        error_order: RealScalarLike,
        controller_state: RecordedState,
    ) -> tuple[
        BoolScalarLike,
        RealScalarLike,
        RealScalarLike,
        BoolScalarLike,
        RecordedState,
        RESULTS,
    ]:
        keep_step, tprev, tnext, made_jump, inner, result = (
            self.controller.adapt_step_size(
                t0,
                t1,
                y0,
                y1_candidate,
                args,
                y_error,
                error_order,
                controller_state.controller_state,
            )
        )
        record = controller_state.record
        count = record.count
        if self._check_capacity:
            count = eqx.error_if(
                count,
                keep_step & (count >= self.capacity),
                "More steps were accepted than `RecordedSteps(capacity="
                f"{self.capacity})` has room for. Pass a larger `capacity`.",
            )
        pred = cast(Any, keep_step)
        interval = jnp.stack([t0, t1]) * self._direction
        intervals: Any = buffer_at_set(record.intervals, count, interval, pred=pred)
        if self.jumps:
            before: Any = controller_state.made_jump
            flags: Any = record.made_jump
            jumped: Any = buffer_at_set(flags, count, before, pred=pred)
            after = jnp.where(keep_step, made_jump, before)
        else:
            jumped = after = None
        record = StepRecord(intervals, count + jnp.where(keep_step, 1, 0), jumped)
        state = RecordedState(inner, record, after)
        return keep_step, tprev, tnext, made_jump, state, result


RecordedSteps.__init__.__doc__ = """**Arguments:**

- `controller`: The [`diffrax.AbstractStepSizeController`][] to wrap.
- `capacity`: The largest number of accepted steps that there is room for.
"""
