"""The reverse of `diffrax.ReversibleHeun`."""

import jax
from diffrax import RESULTS

from .._compat import depends, ω
from .._tree import zeros_of
from .base import AbstractReversal, add, vjp_with


def _refuse_jump(made_jump):
    if made_jump is not False:
        raise NotImplementedError(
            "`adjoint=ReversibleAdjoint()` with `solver=diffrax.ReversibleHeun()` does "
            "not support jumps in the vector field: at a jump this solver forgets its "
            "state. Use `solver=ReversibleALF4()`."
        )


def _half(terms, vf, control):
    return (0.5 * terms.prod(vf, control) ** ω).ω


class HeunReversal(AbstractReversal):
    """The reverse of [`diffrax.ReversibleHeun`][]: with the solver state `(yhat, vf)` a
    step is

    ```
    y += vf dX / 2
    yhat = 2 y - yhat
    vf = f(t1, yhat)
    y += vf dX / 2
    ```

    To undo it takes the vector field at `(t0, yhat0)`, which the step before needs again
    for its vector-Jacobian product. So that it is evaluated only once, the sweep carries
    the `y` in the middle of the step, and what it takes to get from there to its start:
    `y -= vf dX / 2`.

    **Cost:** one evaluation and one vector-Jacobian product per step. One evaluation
    more where the times or the control are differentiated.
    """

    def depart(self, terms, t, y, solver_state):
        yhat, _ = solver_state
        return y, (yhat, zeros_of(terms.contr, t, t))

    def arrive(self, rebuild, parameters, y, solver_state):
        yhat, control = solver_state

        def evaluate(parameters, yhat):
            terms, args, _, t1 = rebuild(parameters)
            return terms.vf(t1, yhat, args)

        terms, *_ = rebuild(parameters)
        vf, vjp = jax.vjp(evaluate, parameters, yhat)
        y = (y**ω - _half(terms, vf, control) ** ω).ω
        return y, (yhat, vf, vjp)

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        del ts_state
        _refuse_jump(made_jump)
        yhat1, vf1, *_ = solver_state
        control = terms.contr(t0, t1)
        y = (y1**ω - _half(terms, vf1, control) ** ω).ω
        yhat0 = (2 * y**ω - yhat1**ω).ω
        vf0 = terms.vf(t0, yhat0, args)
        y0 = (y**ω - _half(terms, vf0, control) ** ω).ω
        return y0, dict(y0=y0, y1=y1), (yhat0, vf0), RESULTS.successful

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
        del ts_state
        _refuse_jump(made_jump)
        terms, args, t0, t1 = rebuild(parameters)
        yhat1, vf1, vjp_evaluate = solver_state
        dense = cotangent_dense_info or dict(y0=None, y1=None)

        def control(parameters):
            terms, _, t0, t1 = rebuild(parameters)
            return terms.contr(t0, t1)

        def start(parameters, y, yhat, vf):
            y = (y**ω + _half(terms, vf, control(parameters)) ** ω).ω
            return y, (2 * y**ω - yhat**ω).ω

        def end(parameters, y, vf):
            return (y**ω + _half(terms, vf, control(parameters)) ** ω).ω

        y = (y1**ω - _half(terms, vf1, control(parameters)) ** ω).ω
        yhat0 = (2 * y**ω - yhat1**ω).ω
        with_control = depends(control, parameters)
        # Otherwise only linear maps are left, and it does not matter at which `vf0`.
        vf0 = terms.vf(t0, yhat0, args) if with_control else vf1
        _, vjp_start = vjp_with(start, parameters, with_control, y, yhat0, vf0)
        _, vjp_end = vjp_with(end, parameters, with_control, y, vf1)

        cotangent_yhat, cotangent_vf = cotangent_solver_state
        from_end, cotangent_y, increment = vjp_end(add(cotangent_y, dense["y1"]))
        from_vf, increment_yhat = vjp_evaluate(add(cotangent_vf, increment))
        from_start, cotangent_y, *cotangent_solver_state = vjp_start(
            (cotangent_y, add(cotangent_yhat, increment_yhat))
        )
        increment = add(from_end, from_vf, from_start)
        return (
            y,
            (yhat0, control(parameters)),
            add(cotangent_y, dense["y0"]),
            tuple(cotangent_solver_state),
            batch.accumulate(cotangent_parameters, increment),
        )
