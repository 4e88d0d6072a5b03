"""The reverse of `diffrax.LeapfrogMidpoint`."""

import jax
import jax.numpy as jnp
from diffrax import RESULTS

from .._compat import depends, ω
from .._tree import zeros_of
from .base import AbstractReversal, add, vjp_with


class LeapfrogReversal(AbstractReversal):
    """The reverse of [`diffrax.LeapfrogMidpoint`][]: with the solver state
    `(t_{-1}, y_{-1})` a step is

    ```
    y_{-1} += f(t0, y) (X(t1) - X(t_{-1}))
    y, y_{-1} = y_{-1}, y
    ```

    The start of the previous step, which the solver forgets, is in `ts_state`.

    **Cost:** one evaluation and one vector-Jacobian product per step.
    """

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        del made_jump
        dtype = jnp.result_type(solver_state[0])
        tm1, y0 = jnp.asarray(ts_state[0], dtype), solver_state[1]
        control = terms.contr(tm1, t1)
        ym1 = (y1**ω - terms.vf_prod(t0, y0, args, control) ** ω).ω
        return y0, dict(y0=y0, y1=y1), (tm1, ym1), RESULTS.successful

    def pull_back_step(
        self,
        rebuild,
        parameters,
        y1,
        ts_state,
        solver_state,
        made_jump,
        cotangent_y,
        cotangent_solver_state,
        cotangent_dense_info,
        batch,
        cotangent_parameters,
    ):
        del made_jump
        tm1, y0 = jnp.asarray(ts_state[0], solver_state[0].dtype), solver_state[1]
        cotangent_t0, cotangent_y0 = cotangent_solver_state
        dense = cotangent_dense_info or dict(y0=None, y1=None)
        cotangent_y1 = add(cotangent_y, dense["y1"])

        def start(parameters):
            _, _, t0, _ = rebuild(parameters)
            return t0

        def evaluate(y, parameters):
            terms, args, t0, _ = rebuild(parameters)
            return terms.vf(t0, y, args)

        def prod(parameters, vf, tm1):
            terms, _, _, t1 = rebuild(parameters)
            return terms.prod(vf, terms.contr(tm1, t1))

        def control(parameters):
            terms, _, _, t1 = rebuild(parameters)
            return terms.contr(tm1, t1)

        with_control = depends(control, parameters)
        # `prod` is linear in the vector field, so that its transpose is known before.
        zeros = zeros_of(evaluate, y0, parameters)
        _, vjp_prod = jax.vjp(lambda vf: prod(parameters, vf, tm1), zeros)
        (cotangent_vf,) = vjp_prod(cotangent_y1)
        vf, increment_y0, from_vf = batch.pull_back(
            evaluate, y0, parameters, cotangent_vf
        )
        cotangent_parameters = batch.accumulate(cotangent_parameters, from_vf)
        increment, vjp_prod = vjp_with(prod, parameters, with_control, vf, tm1)
        from_prod, _, cotangent_tm1 = vjp_prod(cotangent_y1)
        if with_control:
            cotangent_parameters = batch.accumulate(cotangent_parameters, from_prod)
        if depends(start, parameters):
            _, vjp_start = jax.vjp(start, parameters)
            cotangent_parameters = batch.accumulate(
                cotangent_parameters, *vjp_start(cotangent_t0)
            )
        return (
            y0,
            (tm1, (y1**ω - increment**ω).ω),
            add(cotangent_y0, increment_y0, dense["y0"]),
            (cotangent_tm1, cotangent_y1),
            cotangent_parameters,
        )
