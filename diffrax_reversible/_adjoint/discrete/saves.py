"""The pull-back through `SaveAt`: undoes what a step has saved, in reverse order."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._autodiff.sweep import Batch
from ..._compat import depends, ω
from ..._types import BoolScalarLike, IntScalarLike, RealScalarLike, Y


class Cursor(eqx.Module):
    """How much of one `SubSaveAt` is still to be undone.

    - `saved`: the number of entries in its buffer.
    - `ts_saved`: how many of `SubSaveAt(ts=...)` are among them.
    """

    saved: IntScalarLike
    ts_saved: IntScalarLike


class Step(eqx.Module):
    """The step that is being undone.

    - `number`: from 1.
    - `active`: `False` for an element of a batch that has no steps left; it must add
        nothing. `True`, and not traced, where there is no batch.
    - `interval`: makes the start and the end of the step of the parameters.
    - `t_previous`: the start of the step before it.
    """

    number: IntScalarLike
    active: BoolScalarLike
    interval: Callable[[PyTree], tuple[RealScalarLike, RealScalarLike]]
    t_previous: RealScalarLike
    t0: RealScalarLike
    t1: RealScalarLike
    made_jump: BoolScalarLike


def pull_back(
    value: Callable, x: PyTree, parameters: PyTree, cotangent, total, batch: Batch
):
    """Adds to `total`, the cotangents of `x` and of the parameters, those that
    `value(x, parameters)` contributes. The parameters are left alone if `value` does not
    depend on them."""
    total_x, total_parameters = total
    value_of_x = lambda x: eqx.filter(value(x, parameters), eqx.is_inexact_array)
    value_of_both = lambda x, p: eqx.filter(value(x, p), eqx.is_inexact_array)
    if depends(lambda p: value_of_both(x, p), parameters):
        _, increment, increment_parameters = batch.pull_back(
            value_of_both, x, parameters, cotangent
        )
        total_parameters = batch.accumulate(total_parameters, increment_parameters)
    else:
        _, vjp = jax.vjp(value_of_x, x)
        (increment,) = vjp(cotangent)
    return (total_x**ω + increment**ω).ω, total_parameters


class Saver(eqx.Module):
    """One `SubSaveAt`, and the cotangents of what it saved.

    - `ts`: makes its `ts` of the parameters.
    - `fn`: makes the saved value of `(parameters, t, y)`.
    - `cotangents`: of its buffers of times and values.
    """

    ts: Callable[[PyTree], Array] | None
    steps: int = eqx.field(static=True)
    fn: Callable = eqx.field(static=True)
    cotangents: tuple[Array, PyTree[Array]]

    def pull_back_end(
        self, step: Step, cursor: Cursor, y1: Y, parameters, total, batch: Batch
    ):
        """Undoes `SubSaveAt(steps=...)`. `total` are the cotangents of `y1` and of the
        parameters; returns the new ones and the new cursor."""
        saved = step.active & (step.number % self.steps == 0)
        cursor = Cursor(cursor.saved - jnp.where(saved, 1, 0), cursor.ts_saved)

        def value(y, parameters):
            _, t = step.interval(parameters)
            return t, self.fn(parameters, t, y)

        row = self._row(saved, cursor)
        return pull_back(value, y1, parameters, row, total, batch), cursor

    def has_pending(self, step: Step, cursor: Cursor, parameters) -> BoolScalarLike:
        """Whether the last of `ts` that is not undone yet was saved in this step. A
        save at the very start of the solve belongs to its first step."""
        assert self.ts is not None
        t = self.ts(parameters)[jnp.maximum(cursor.ts_saved - 1, 0)]
        within = (t > step.t0) | (step.number == 1)
        return step.active & (cursor.ts_saved > 0) & within

    def pull_back_ts(
        self,
        step: Step,
        cursor: Cursor,
        interpolate: Callable[[PyTree, PyTree, RealScalarLike], Y],
        dense_info: PyTree,
        parameters,
        total,
        batch: Batch,
    ):
        """Undoes `SubSaveAt(ts=...)`. `interpolate` makes the solution at a time of the
        parameters and of `dense_info`, whatever that is; `total` are the cotangents of
        `dense_info` and of the parameters. Returns the new ones and the new cursor."""
        ts = self.ts
        assert ts is not None
        go_on = lambda cursor: batch.any(self.has_pending(step, cursor, parameters))

        def body(loop):
            _, cursor, total = loop
            pending = self.has_pending(step, cursor, parameters)
            one = jnp.where(pending, 1, 0)
            cursor = Cursor(cursor.saved - one, cursor.ts_saved - one)

            def value(dense_info, parameters):
                t = jnp.where(pending, ts(parameters)[cursor.ts_saved], step.t0)
                y = interpolate(parameters, dense_info, t)
                return t, self.fn(parameters, t, y)

            row = self._row(pending, cursor)
            total = pull_back(value, dense_info, parameters, row, total, batch)
            return go_on(cursor), cursor, total

        loop = (go_on(cursor), cursor, total)
        _, cursor, total = lax.while_loop(lambda loop: loop[0], body, loop)
        return total, cursor

    def _row(self, saved, cursor):
        """The cotangents of what was saved at the cursor; zeros if nothing was."""
        return jtu.tree_map(
            lambda c: jnp.where(saved, c[cursor.saved], 0), self.cotangents
        )
