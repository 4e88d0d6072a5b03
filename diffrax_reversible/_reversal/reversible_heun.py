"""The reversal of `diffrax.ReversibleHeun`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._autodiff.batch import Batch
from .._autodiff.linear import cotangents_depend
from .._autodiff.linearisation import Linearisation
from .._compat import depends, ω
from .._tree import add, scale, zeros_of
from .base import AbstractReversal, End, ReverseStep


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

        vf, pull_back = _evaluate(evaluate, step.parameters, yhat)
        half = scale(0.5, step.inputs.terms.prod(vf, control))
        return End((y**ω - half**ω).ω, (yhat, vf), pull_back)

    def undo(self, step, end):
        _refuse_jump(step.made_jump)
        inputs = step.inputs
        half = _half_of(step, inputs.terms.contr(inputs.t0, inputs.t1))
        y, yhat0 = self._middle(end, half, step.parameters)
        vf0 = inputs.terms.vf(inputs.t0, yhat0, inputs.args)
        y0 = (y**ω - half(vf0, step.parameters) ** ω).ω
        return y0, (yhat0, vf0), dict(y0=y0, y1=end.y)

    def _middle(self, end, half, parameters):
        y1, (yhat1, vf1), _ = end
        y = (y1**ω - half(vf1, parameters) ** ω).ω
        return y, (2 * y**ω - yhat1**ω).ω

    def pull_back(self, step, end, cotangent, batch, total):
        _refuse_jump(step.made_jump)
        _, (_, vf1), pull_back_evaluation = end
        inputs, parameters = step.inputs, step.parameters
        dense = cotangent.dense_info or dict(y0=None, y1=None)
        cotangent_yhat, cotangent_vf = cotangent.solver_state
        # Looked up once.
        control = inputs.terms.contr(inputs.t0, inputs.t1)
        half = _half_of(step, control)
        y, yhat0 = self._middle(end, half, parameters)

        def second_half(point, parameters):
            y, vf = point
            return (y**ω + half(vf, parameters) ** ω).ω

        def first_half(point, parameters):
            y, yhat, vf = point
            y = (y**ω + half(vf, parameters) ** ω).ω
            return y, (2 * y**ω - yhat**ω).ω

        _, (cotangent_y, from_y1), total = batch.vjp(
            second_half, (y, vf1), parameters, add(cotangent.y, dense["y1"]), total
        )
        from_yhat1, total = pull_back_evaluation(
            add(cotangent_vf, from_y1), batch, total
        )
        cotangent_middle = (cotangent_y, add(cotangent_yhat, from_yhat1))
        # Where only linear maps are left, it does not matter at which `vf0` and `y0`.
        vf0 = vf1
        if cotangents_depend(first_half, (y, yhat0, vf1), parameters, cotangent_middle):
            vf0 = inputs.terms.vf(inputs.t0, yhat0, inputs.args)
        y0 = (y**ω - half(vf0, parameters) ** ω).ω
        _, (cotangent_y, *cotangent_solver_state), total = batch.vjp(
            first_half, (y0, yhat0, vf0), parameters, cotangent_middle, total
        )
        return (
            (y, yhat0, control),
            add(cotangent_y, dense["y0"]),
            tuple(cotangent_solver_state),
            total,
        )


def _half_of(step: ReverseStep, control: PyTree) -> Callable[[PyTree, PyTree], PyTree]:
    """Half of the vector field times the control, as a function of the vector field and
    the parameters; `control` is that of the step."""

    def control_of(parameters):
        inputs = step.inputs_of(parameters)
        return inputs.terms.contr(inputs.t0, inputs.t1)

    moves = depends(control_of, step.parameters)

    def half(vf, parameters):
        terms = step.inputs_of(parameters).terms
        return scale(0.5, terms.prod(vf, control_of(parameters) if moves else control))

    return half


def _evaluate(
    fn: Callable, parameters: PyTree, point: PyTree
) -> tuple[PyTree, Callable[[PyTree, Batch, PyTree], tuple[PyTree, PyTree]]]:
    """`fn(parameters, point)`, and what of the cotangent makes that of the point, and a
    `total` with that of the parameters added."""
    everything = jtu.tree_map(lambda _: True, (point, parameters))
    linear = Linearisation.trace(
        lambda point, parameters: fn(parameters, point), point, parameters, everything
    )
    if linear is None:
        out, vjp = jax.vjp(fn, parameters, point)

        def pull_back(cotangent, batch, total):
            increment, cotangent_point = vjp(cotangent)
            return cotangent_point, batch.add(total, increment)

        return out, pull_back

    out, residuals = linear.evaluate(point, parameters)
    shared = linear.shared(point, parameters)

    def pull_back(cotangent, batch, total):
        tangent = lambda *xs: linear.tangent(residuals, shared, jtu.tree_leaves(xs))
        # Linear, and so the same at zero.
        zeros = jtu.tree_map(jnp.zeros_like, (point, parameters))
        _, cotangent_point, total = batch.vjp(tangent, *zeros, cotangent, total)
        return cotangent_point, total

    return out, pull_back
