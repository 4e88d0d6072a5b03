"""Recording the steps that an adaptive solve has accepted."""

import functools as ft
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
from diffrax import AbstractStepSizeController
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import check_integer
from .._compat import buffer_at_set, MaybeBuffer
from .._types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, Y


class StepRecord(eqx.Module):
    """The accepted steps of a solve, in the order in which they were made.

    - `intervals`: where each step started and ended. An array of shape `(capacity, 2)`
        and of the dtype of time, of which the first `count` rows are filled; the others
        are `inf`. In the direction of the solve: a step ends before it starts if
        `t1 < t0`.
    - `count`: the number of accepted steps.
    - `made_jump`: whether the vector field jumped just before each step. A boolean array
        of shape `(capacity,)`; `None` if the controller does not step over jumps.

    ```python
    record = solution.controller_state.record  # with `RecordedSteps`
    starts, ends = record.intervals[: record.count].T
    ```
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

    @staticmethod
    def empty(capacity: int, dtype: Any, may_jump: bool) -> "StepRecord":
        """A record of no steps, with room for `capacity`."""
        made_jump = jnp.zeros(capacity, bool) if may_jump else None
        intervals = jnp.full((capacity, 2), jnp.inf, dtype)
        return StepRecord(intervals, jnp.array(0), made_jump)

    def keep(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        made_jump: BoolScalarLike | None,
        pred: BoolScalarLike,
    ) -> "StepRecord":
        """The record with one more step, if `pred`."""
        write: Any = ft.partial(buffer_at_set, pred=cast(Any, pred))
        intervals = write(self.intervals, self.count, jnp.stack([t0, t1]))
        jumps = self.made_jump
        if jumps is not None:
            jumps = write(jumps, self.count, jnp.asarray(made_jump))
        return StepRecord(intervals, self.count + jnp.where(pred, 1, 0), jumps)


class RecordedState(eqx.Module):
    """The controller state of [`diffrax_reversible.RecordedSteps`][].

    - `controller_state`: the state of the wrapped controller.
    - `record`: a [`diffrax_reversible.StepRecord`][].
    - `made_jump`: whether the vector field jumped just before the step that is next to
        be made; `None` if the controller does not step over jumps.

    ```python
    options = dict(saveat=diffrax.SaveAt(t1=True, controller_state=True))
    solution = diffrax.diffeqsolve(..., stepsize_controller=controller, **options)
    record = solution.controller_state.record  # if it is a `RecordedSteps`
    ```
    """

    controller_state: PyTree
    record: StepRecord
    made_jump: BoolScalarLike | None


def may_jump(
    controller: AbstractStepSizeController,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    error_order: RealScalarLike | None,
    controller_state: PyTree,
) -> bool:
    """Whether `controller` ever says that the vector field jumps: `made_jump` is then
    traced, not `False` itself."""
    adapted = eqx.filter_eval_shape(
        controller.adapt_step_size,
        *(t0, t1, y0, y0, args, y0, error_order, controller_state),
    )
    return adapted[3] is not False


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
    wrap a controller for its sake.

    **Cost:** `2 * capacity` numbers. With the adjoint methods of this package a step
    writes just two of them, also under `jax.vmap`. With any other one the same is true
    of a single solve, but under `jax.vmap` the whole record is copied in every step.

    **Raises:** an error at run time if more than `capacity` steps are accepted.
    """

    controller: AbstractStepSizeController
    capacity: int = eqx.field(static=True)
    # Makes the times of the record those of the user, who may integrate backwards.
    _direction: IntScalarLike

    def __init__(self, controller: AbstractStepSizeController, capacity: int = 4096):
        check_integer("RecordedSteps", "capacity", capacity)
        self.controller = controller
        self.capacity = capacity
        self._direction = 1

    def wrap(self, direction):
        return eqx.tree_at(
            lambda c: (c.controller, c._direction),
            self,
            (self.controller.wrap(direction), direction),
        )

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        tnext, controller_state = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        jumps = may_jump(
            self.controller, t0, tnext, y0, args, error_order, controller_state
        )
        record = StepRecord.empty(self.capacity, jnp.result_type(t0), jumps)
        pending = jnp.array(False) if jumps else None
        return tnext, RecordedState(controller_state, record, pending)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
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
        record, pending = controller_state.record, controller_state.made_jump
        count = eqx.error_if(
            record.count,
            keep_step & (record.count >= self.capacity),
            "More steps were accepted than `RecordedSteps(capacity="
            f"{self.capacity})` has room for. Pass a larger `capacity`.",
        )
        record = eqx.tree_at(lambda r: r.count, record, count)
        direction = self._direction
        record = record.keep(t0 * direction, t1 * direction, pending, keep_step)
        if pending is not None:
            pending = jnp.where(keep_step, made_jump, pending)
        state = RecordedState(inner, record, pending)
        return keep_step, tprev, tnext, made_jump, state, result


RecordedSteps.__init__.__doc__ = """**Arguments:**

- `controller`: The [`diffrax.AbstractStepSizeController`][] to wrap.
- `capacity`: The largest number of accepted steps that there is room for.
"""
