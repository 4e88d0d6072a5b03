"""The reversal of `diffrax.ReversibleHeun`."""

import jax

from .._autodiff.linear import cotangents_depend
from .._compat import ω
from .._tree import add, scale, zeros_of
from .base import AbstractReversal, End


def _refuse_jump(made_jump):
    if made_jump is not False:
        raise NotImplementedError(
            "`solver=diffrax.ReversibleHeun()` does not support jumps in the vector field "
            "where its steps are undone, by `ReversibleAdjoint` or by `undo`: at a jump "
            "this solver forgets its state. Use `solver=ReversibleALF4()`."
        )


class ReversibleHeunReversal(AbstractReversal):
    """Undoes the steps of [`diffrax.ReversibleHeun`][]: with the solver state
    `(yhat, vf)` a step is

    ```
    y += vf dX / 2
    yhat = 2 y - yhat
    vf = f(t1, yhat)
    y += vf dX / 2
    ```

    To undo it takes the vector field at `(t0, yhat0)`, which the step before needs again
    for its vector-Jacobian product. So that it is evaluated only once, the sweep carries
    the `y` in the middle of the step, and the control with which to get from there to
    its start: `y -= vf dX / 2`.

    **Cost:** one evaluation and one vector-Jacobian product per step. One evaluation
    more where the cotangents of `y += vf dX / 2` depend on `vf`: where the times, the
    control or a parameter of the product are differentiated.
    """

    def difference(self, before, after):
        y, (yhat, _) = after
        return (y**ω - yhat**ω).ω

    def init_carry(self, terms, t, y, solver_state):
        yhat, _ = solver_state
        return y, yhat, zeros_of(terms.contr, t, t)

    def end_of(self, step, carry):
        y, yhat, control = carry

        def evaluate(parameters, yhat):
            inputs = step.inputs_of(parameters)
            return inputs.terms.vf(inputs.t1, yhat, inputs.args)

        vf, vjp = jax.vjp(evaluate, step.parameters, yhat)
        half = scale(0.5, step.inputs.terms.prod(vf, control))
        return End((y**ω - half**ω).ω, (yhat, vf), vjp)

    def undo(self, step, end):
        _refuse_jump(step.made_jump)
        inputs = step.inputs
        y, yhat0 = self._middle(step, end)
        vf0 = inputs.terms.vf(inputs.t0, yhat0, inputs.args)
        y0 = (y**ω - _half(step, vf0, step.parameters) ** ω).ω
        return y0, (yhat0, vf0), dict(y0=y0, y1=end.y)

    def _middle(self, step, end):
        y1, (yhat1, vf1), _ = end
        y = (y1**ω - _half(step, vf1, step.parameters) ** ω).ω
        return y, (2 * y**ω - yhat1**ω).ω

    def pull_back(self, step, end, cotangent, batch, total):
        _refuse_jump(step.made_jump)
        _, (_, vf1), vjp_evaluate = end
        inputs, parameters = step.inputs, step.parameters
        dense = cotangent.dense_info or dict(y0=None, y1=None)
        cotangent_yhat, cotangent_vf = cotangent.solver_state
        y, yhat0 = self._middle(step, end)

        def second_half(point, parameters):
            y, vf = point
            return (y**ω + _half(step, vf, parameters) ** ω).ω

        def first_half(point, parameters):
            y, yhat, vf = point
            y = (y**ω + _half(step, vf, parameters) ** ω).ω
            return y, (2 * y**ω - yhat**ω).ω

        _, (cotangent_y, from_y1), total = batch.vjp(
            second_half, (y, vf1), parameters, add(cotangent.y, dense["y1"]), total
        )
        from_vf1, from_yhat1 = vjp_evaluate(add(cotangent_vf, from_y1))
        total = batch.add(total, from_vf1)
        cotangent_middle = (cotangent_y, add(cotangent_yhat, from_yhat1))
        # Where only linear maps are left, it does not matter at which `vf0` and `y0`.
        vf0 = vf1
        if cotangents_depend(first_half, (y, yhat0, vf1), parameters, cotangent_middle):
            vf0 = inputs.terms.vf(inputs.t0, yhat0, inputs.args)
        y0 = (y**ω - _half(step, vf0, parameters) ** ω).ω
        _, (cotangent_y, *cotangent_solver_state), total = batch.vjp(
            first_half, (y0, yhat0, vf0), parameters, cotangent_middle, total
        )
        return (
            (y, yhat0, inputs.terms.contr(inputs.t0, inputs.t1)),
            add(cotangent_y, dense["y0"]),
            tuple(cotangent_solver_state),
            total,
        )


def _half(step, vf, parameters):
    inputs = step.inputs_of(parameters)
    return scale(0.5, inputs.terms.prod(vf, inputs.terms.contr(inputs.t0, inputs.t1)))
