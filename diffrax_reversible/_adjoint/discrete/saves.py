"""The pull-back through `SaveAt`: undoes what a step has saved, in reverse order."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._autodiff.batch import Batch
from ..._autodiff.linear import cotangents_depend
from ..._reversal.base import ReverseStep
from ..._tree import add, zeros_of
from ..._types import BoolScalarLike, DenseInfo, IntScalarLike, RealScalarLike, Y


class Cursor(eqx.Module):
    """How much of one `SubSaveAt` is still to be undone.

    - `saved`: the number of entries in its buffer.
    - `ts_saved`: how many of `SubSaveAt(ts=...)` are among them.
    """

    saved: IntScalarLike
    ts_saved: IntScalarLike


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
        self,
        step: ReverseStep,
        cursor: Cursor,
        y1: Y,
        cotangent_y: Y,
        batch: Batch,
        total: PyTree,
    ) -> tuple[Y, PyTree, Cursor]:
        """Undoes `SubSaveAt(steps=...)`: the new cotangent of `y1`, the new cotangent of
        the parameters, and the new cursor."""
        if self.steps == 0:
            return cotangent_y, total, cursor
        saved = step.active & (step.number % self.steps == 0)
        cursor = Cursor(cursor.saved - jnp.where(saved, 1, 0), cursor.ts_saved)

        def value(y, parameters):
            _, t = step.interval(parameters)
            return t, self.fn(parameters, t, y)

        row = self._row(saved, cursor)
        _, found, total = batch.vjp(value, y1, step.parameters, row, total)
        return add(cotangent_y, found), total, cursor

    def _is_pending(self, step: ReverseStep, cursor: Cursor) -> BoolScalarLike:
        """Whether the last of `ts` that is not undone yet was saved in this step. A
        save at the very start of the solve belongs to its first step."""
        assert self.ts is not None
        t = self.ts(step.parameters)[jnp.maximum(cursor.ts_saved - 1, 0)]
        t0, _ = step.interval(step.parameters)
        return step.active & (cursor.ts_saved > 0) & ((t > t0) | (step.number == 1))

    def _value(self, step, cursor, pending, interpolate, dense_info, parameters):
        """What is saved at the cursor."""
        assert self.ts is not None
        t0, _ = step.interval(parameters)
        t = jnp.where(pending, self.ts(parameters)[cursor.ts_saved], t0)
        return t, self.fn(parameters, t, interpolate(parameters, dense_info, t))

    def needs_dense_info(self, step: ReverseStep, cursor: Cursor, interpolate, zeros):
        """Whether the cotangents of `SubSaveAt(ts=...)` depend on the dense output, and
        whether there is anything to undo in this step."""
        pending = self._is_pending(step, cursor)
        value = ft.partial(self._value, step, cursor, pending, interpolate)
        row = self._row(pending, cursor)
        fn = lambda *args: eqx.filter(value(*args), eqx.is_inexact_array)
        depends = cotangents_depend(fn, zeros, step.parameters, row)
        return pending if depends else False

    def pull_back_ts(
        self,
        step: ReverseStep,
        cursor: Cursor,
        interpolate: Callable[[PyTree, DenseInfo, RealScalarLike], Y],
        dense_info: DenseInfo,
        cotangent: DenseInfo,
        batch: Batch,
        total: PyTree,
    ) -> tuple[DenseInfo, PyTree, Cursor]:
        """Undoes `SubSaveAt(ts=...)`: the new cotangent of `dense_info`, the new
        cotangent of the parameters, and the new cursor. `interpolate` makes the solution
        at a time."""
        go_on = lambda cursor: batch.any(self._is_pending(step, cursor))

        def body(loop):
            _, cursor, cotangent, total = loop
            pending = self._is_pending(step, cursor)
            one = jnp.where(pending, 1, 0)
            cursor = Cursor(cursor.saved - one, cursor.ts_saved - one)
            value = ft.partial(self._value, step, cursor, pending, interpolate)
            row = self._row(pending, cursor)
            _, found, total = batch.vjp(value, dense_info, step.parameters, row, total)
            return go_on(cursor), cursor, add(cotangent, found), total

        loop = (go_on(cursor), cursor, cotangent, total)
        _, cursor, cotangent, total = lax.while_loop(lambda loop: loop[0], body, loop)
        return cotangent, total, cursor

    def _row(self, saved, cursor):
        """The cotangents of what was saved at the cursor; zeros if nothing was."""
        row = jtu.tree_map(lambda c: c[cursor.saved], self.cotangents)
        return jtu.tree_map(lambda c: jnp.where(saved, c, 0), row)


def pull_back_inside(
    savers: list[Saver],
    step: ReverseStep,
    cursors: list[Cursor],
    interpolate: Callable[[PyTree, DenseInfo, RealScalarLike], Y],
    make_dense_info: Callable[[], DenseInfo],
    cotangent: DenseInfo | None,
    batch: Batch,
    total: PyTree,
) -> tuple[DenseInfo | None, PyTree, list[Cursor]]:
    """Undoes every `SubSaveAt(ts=...)`: the cotangent of the dense output of the step
    (`None` if there is none), that of the parameters, and the new cursors.

    - `make_dense_info`: makes the dense output, which takes evaluations of the vector
        field, and is called where the cotangents depend on it.
    """
    cursors = list(cursors)
    with_ts = [i for i, saver in enumerate(savers) if saver.ts is not None]
    if len(with_ts) == 0:
        return cotangent, total, cursors
    zeros = zeros_of(make_dense_info)
    dense_info = zeros
    pending = [
        savers[i].needs_dense_info(step, cursors[i], interpolate, zeros)
        for i in with_ts
    ]
    pending = [x for x in pending if x is not False]
    if len(pending) > 0:
        any_pending = batch.any(ft.reduce(jnp.logical_or, pending))
        dense_info = lax.cond(any_pending, make_dense_info, lambda: zeros)
    cotangent = zeros if cotangent is None else cotangent
    for i in with_ts:
        cotangent, total, cursors[i] = savers[i].pull_back_ts(
            step, cursors[i], interpolate, dense_info, cotangent, batch, total
        )
    return cotangent, total, cursors
