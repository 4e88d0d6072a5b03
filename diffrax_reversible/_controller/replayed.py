"""Stepping recorded steps again."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, AbstractTerm, RESULTS
from jaxtyping import PyTree

from .._types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, VF, Y
from .recorded import StepRecord


class ReplayedSteps(AbstractStepSizeController[IntScalarLike, RealScalarLike | None]):
    """Makes exactly the steps of a record, one after the other, none rejected.

    Unlike [`diffrax.StepTo`][] it can be vmapped over records with different numbers of
    steps. It is for solving again on the same discretisation: with other parameters, in
    another dtype, or to compare gradients.

    `diffeqsolve` must be given the `t0` and `t1` of the recorded solve and `dt0=None`.

    **Raises:** `ValueError` if `dt0` is not `None`; an error at run time if `t0` or
    `t1` is not where the record starts or ends.
    """

    record: StepRecord

    @property
    def jumps(self) -> bool:
        """Whether the recorded solve stepped over jumps of the vector field."""
        return self.record.made_jump is not None

    def wrap(self, direction: IntScalarLike) -> "ReplayedSteps":
        record = self.record
        return ReplayedSteps(
            StepRecord(record.intervals * direction, record.count, record.made_jump)
        )

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
    ) -> tuple[RealScalarLike, IntScalarLike]:
        del terms, y0, args, func, error_order
        if dt0 is not None:
            raise ValueError(
                "`dt0` should be `None`. The steps are already determined by "
                "`ReplayedSteps(record)`."
            )
        record = self.record
        empty = record.count == 0
        start = jnp.where(empty, t0, record.t0s[0])
        end = jnp.where(empty, t0, record.t1s[record.count - 1])
        tnext = eqx.error_if(
            jnp.where(empty, t1, record.t1s[0]),
            (t0 != start) | (t1 != end),
            "The record of `ReplayedSteps(record)` must start at `t0` and end at `t1`.",
        )
        return tnext, jnp.array(1)

    def adapt_step_size(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        y1_candidate: Y,
        args: Args,
        y_error: Y | None,
        error_order: RealScalarLike | None,
        controller_state: IntScalarLike,
    ) -> tuple[
        bool, RealScalarLike, RealScalarLike, BoolScalarLike, IntScalarLike, RESULTS
    ]:
        del t0, y0, y1_candidate, args, y_error, error_order
        record = self.record
        done = controller_state >= record.count
        index = jnp.where(done, 0, controller_state)
        tprev = jnp.where(done, t1, record.t0s[index])
        tnext = jnp.where(done, t1, record.t1s[index])
        made_jump = False
        if record.made_jump is not None:
            made_jump = jnp.where(done, False, record.made_jump[index])
        return True, tprev, tnext, made_jump, controller_state + 1, RESULTS.successful


ReplayedSteps.__init__.__doc__ = """**Arguments:**

- `record`: A [`diffrax_reversible.StepRecord`][], as
    [`diffrax_reversible.RecordedSteps`][] makes it.
"""
