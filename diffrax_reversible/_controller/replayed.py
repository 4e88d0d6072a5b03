"""Stepping recorded steps again."""

import equinox as eqx
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, RESULTS

from .._types import IntScalarLike, RealScalarLike
from .recorded import StepRecord


class ReplayedSteps(AbstractStepSizeController[IntScalarLike, RealScalarLike | None]):
    """Makes exactly the steps of a record, one after the other, none rejected.

    Unlike [`diffrax.StepTo`][] it can be vmapped over records with different numbers of
    steps. It is for solving again on the same discretisation: with other parameters, in
    another dtype, or to compare gradients.

    `diffeqsolve` must be given the `t0` and `t1` of the recorded solve and `dt0=None`.

    ```python
    controller = ReplayedSteps(record)
    diffrax.diffeqsolve(terms, solver, t0, t1, None, y0, stepsize_controller=controller)
    ```

    **Raises:** `ValueError` if `dt0` is not `None`; an error at run time if `t0` or
    `t1` is not where the record starts or ends.
    """

    record: StepRecord

    def wrap(self, direction):
        record = self.record
        return ReplayedSteps(
            StepRecord(record.intervals * direction, record.count, record.made_jump)
        )

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
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
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
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
