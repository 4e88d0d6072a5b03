"""The reversal of `diffrax.LeapfrogMidpoint`."""

import jax.numpy as jnp

from .._compat import ω
from .._tree import add
from .base import AbstractReversal


class LeapfrogMidpointReversal(AbstractReversal):
    """Undoes the steps of [`diffrax.LeapfrogMidpoint`][]: with the solver state
    `(t_{-1}, y_{-1})` a step is

    ```
    y_{-1} += f(t0, y) (X(t1) - X(t_{-1}))
    y, y_{-1} = y_{-1}, y
    ```

    **Cost:** one evaluation and one vector-Jacobian product per step.
    """

    def difference(self, before, after):
        # Every other step is of one copy: what alternates.
        (y0, (_, ym1)), (y1, _) = before, after
        return ((y1**ω - 2 * y0**ω + ym1**ω) / 4).ω

    def undo(self, step, end):
        y1, (t0, y0), _ = end
        tm1 = _previous(step, t0)
        dy = _increment(step, y0, tm1, step.parameters)
        return y0, (tm1, (y1**ω - dy**ω).ω), dict(y0=y0, y1=y1)

    def pull_back(self, step, end, cotangent, batch, total):
        y1, (t0, y0), _ = end
        cotangent_t0, cotangent_y0 = cotangent.solver_state
        dense = cotangent.dense_info or dict(y0=None, y1=None)
        cotangent_y1 = add(cotangent.y, dense["y1"])
        tm1 = _previous(step, t0)

        def increment(point, parameters):
            y0, tm1 = point
            return _increment(step, y0, tm1, parameters)

        dy, (from_dy, cotangent_tm1), total = batch.vjp(
            increment, (y0, tm1), step.parameters, cotangent_y1, total
        )
        start = lambda _, parameters: jnp.asarray(
            step.inputs_of(parameters).t0, t0.dtype
        )
        _, _, total = batch.vjp(start, (), step.parameters, cotangent_t0, total)
        return (
            (y0, (tm1, (y1**ω - dy**ω).ω)),
            add(cotangent_y0, from_dy, dense["y0"]),
            (cotangent_tm1, cotangent_y1),
            total,
        )


def _previous(step, t0):
    # The solver forgets the start of the step before.
    return jnp.asarray(step.t_previous, t0.dtype)


def _increment(step, y0, tm1, parameters):
    inputs = step.inputs_of(parameters)
    control = inputs.terms.contr(tm1, inputs.t1)
    return inputs.terms.vf_prod(inputs.t0, y0, inputs.args, control)
