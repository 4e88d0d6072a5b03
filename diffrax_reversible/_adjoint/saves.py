"""The pull-back through `SaveAt`: undoes what a step has saved, in reverse order."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._compat import ω
from .._types import BoolScalarLike, DenseInfo, IntScalarLike, RealScalarLike, Y
from .abstract_sweep import Batch


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
    - `t_previous`: the start of the step before it.
    """

    number: IntScalarLike
    active: BoolScalarLike
    t_previous: RealScalarLike
    t0: RealScalarLike
    t1: RealScalarLike


class Saver(eqx.Module):
    """One `SubSaveAt`, and the cotangents of what it saved.

    - `fn`: makes the saved value of `(parameters, t, y)`.
    - `saves_y`: whether that value is just `y`.
    """

    ts: Float[Array, " times"] | None
    steps: int = eqx.field(static=True)
    fn: Callable = eqx.field(static=True)
    saves_y: bool = eqx.field(static=True)
    cotangents: PyTree[Array]

    def pull_back_end(
        self, step: Step, cursor: Cursor, y1: Y, parameters, cotangents, batch: Batch
    ):
        """Undoes `SubSaveAt(steps=...)`. `cotangents` are those of `y1` and of the
        parameters; returns the new ones and the new cursor."""
        saved = step.active & (step.number % self.steps == 0)
        cursor = Cursor(cursor.saved - jnp.where(saved, 1, 0), cursor.ts_saved)
        row = self._row(saved, cursor)
        increments = self._vjp(lambda y: y, step.t1, y1, parameters, row)
        return self._add(cotangents, increments, batch), cursor

    def has_pending(self, step: Step, cursor: Cursor) -> BoolScalarLike:
        """Whether the last of `ts` that is not undone yet was saved in this step. A
        save at the very start of the solve belongs to its first step."""
        assert self.ts is not None
        t = self.ts[jnp.maximum(cursor.ts_saved - 1, 0)]
        within = (t > step.t0) | (step.number == 1)
        return step.active & (cursor.ts_saved > 0) & within

    def pull_back_ts(
        self,
        step: Step,
        cursor: Cursor,
        interpolate: Callable[[DenseInfo, RealScalarLike], Y],
        dense_info: DenseInfo,
        parameters,
        cotangents,
        batch: Batch,
    ):
        """Undoes `SubSaveAt(ts=...)`. `cotangents` are those of `dense_info` and of the
        parameters; returns the new ones and the new cursor."""

        ts = self.ts
        assert ts is not None

        def body(loop):
            _, cursor, cotangents = loop
            pending = self.has_pending(step, cursor)
            one = jnp.where(pending, 1, 0)
            cursor = Cursor(cursor.saved - one, cursor.ts_saved - one)
            t = jnp.where(pending, ts[cursor.ts_saved], step.t0)
            increments = self._vjp(
                lambda dense_info: interpolate(dense_info, t),
                t,
                dense_info,
                parameters,
                self._row(pending, cursor),
            )
            cotangents = self._add(cotangents, increments, batch)
            return batch.any(self.has_pending(step, cursor)), cursor, cotangents

        loop = (batch.any(self.has_pending(step, cursor)), cursor, cotangents)
        _, cursor, cotangents = lax.while_loop(lambda loop: loop[0], body, loop)
        return cotangents, cursor

    def _row(self, saved, cursor):
        """The cotangents of the saved value at the cursor; zeros if nothing was."""
        return jtu.tree_map(
            lambda c: jnp.where(saved, c[cursor.saved], 0), self.cotangents
        )

    def _vjp(self, y_of, t, x, parameters, row):
        """The cotangents of `x` and of the parameters (`None` if there are none), where
        `fn(parameters, t, y_of(x))` has been saved."""

        def value(x, parameters):
            y = y_of(x)
            y = y if self.saves_y else self.fn(parameters, t, y)
            return eqx.filter(y, eqx.is_inexact_array)

        if self.saves_y:
            _, vjp = jax.vjp(lambda x: value(x, None), x)
            return *vjp(row), None
        _, vjp = jax.vjp(value, x, parameters)
        return vjp(row)

    @staticmethod
    def _add(cotangents, increments, batch):
        total_x, total_parameters = cotangents
        x, parameters = increments
        total_x = (total_x**ω + x**ω).ω
        if parameters is not None:
            total_parameters = batch.accumulate(total_parameters, parameters)
        return total_x, total_parameters
