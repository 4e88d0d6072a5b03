"""Restarts: where the two copies of the solution have drifted apart, the second is made
anew."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver
from jaxtyping import Array, Int, PyTree

from ..._compat import unvmap_any, ω
from ..._tree import norm, where, zeros_of
from ..._types import BoolScalarLike, IntScalarLike, RealScalarLike, Y
from .update import AbstractUpdate, Restart, State


class RestartRecord(eqx.Module):
    """The states before the restarts of a solve, in the order in which they were made.

    - `y`, `copy`: the solution, and the second copy; with a leading axis of length
        `capacity`, of which the first `count` rows are filled.
    - `ages`: for each of them, that of the `RestartState`.
    - `count`: how many restarts there were; more than `capacity` if there was no room.

    ```python
    record = solution.solver_state.record  # with `SaveAt(solver_state=True)`
    first = jax.tree.map(lambda x: x[: record.count], record.y)
    ```
    """

    y: PyTree
    copy: PyTree
    ages: Int[Array, " capacity"]
    count: IntScalarLike

    @property
    def capacity(self) -> int:
        """How many states there is room for."""
        (capacity,) = self.ages.shape
        return capacity

    @staticmethod
    def empty(capacity: int, y: Y, copy: PyTree) -> "RestartRecord":
        """A record of no restarts, with room for `capacity`."""
        room = lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x))
        y, copy = jtu.tree_map(room, (y, copy))
        return RestartRecord(y, copy, jnp.zeros(capacity, int), jnp.array(0))

    def keep(
        self, y: Y, copy: PyTree, age: IntScalarLike, due: BoolScalarLike
    ) -> "RestartRecord":
        """The record with one more state, if `due`."""
        # What is out of range is dropped.
        place = jnp.where(due, self.count, self.capacity)
        write = lambda xs, x: xs.at[place].set(x)
        y, copy = jtu.tree_map(write, (self.y, self.copy), (y, copy))
        ages = self.ages.at[place].set(age)
        return RestartRecord(y, copy, ages, self.count + jnp.where(due, 1, 0))

    def last(self) -> tuple[Y, PyTree, IntScalarLike]:
        """The state before the last restart, and its age."""
        place = jnp.clip(self.count - 1, 0, self.capacity - 1)
        return jtu.tree_map(lambda xs: xs[place], (self.y, self.copy, self.ages))

    def without_last(self, pred: BoolScalarLike) -> "RestartRecord":
        """The record without its last state, if `pred`."""
        count = self.count - jnp.where(pred, 1, 0)
        return eqx.tree_at(lambda r: r.count, self, count)


class RestartState(eqx.Module):
    """The solver state of a solver that restarts.

    `init` of a solver of one's own returns `RestartState.fresh(copy, y0, ratio)`, if its
    steps have a [`diffrax_reversible.Restart`][]. Its updates see the copy alone, as
    `State.solver_state`. Only the copy is differentiated.

    Memory: the copy, the `memory`, six numbers, and what is recorded.

    - `copy`: the second copy of the solution, or of the vector field; any pytree.
    - `due`: whether the two copies differ by more than the error estimate allows, so that
        the next step starts with a restart. Whether they ever have, if none does.
    - `largest`: how large their difference, and the solution, have been at most.
    - `first`: how large their difference was after the first step since the last restart.
    - `memory`: what of the last step the solver needs to tell.
    - `restarts`: `False` if the solver is only watched.
    - `age`: the number of steps since the second copy was made anew, at the start of the
        solve or by a restart.
    - `record`: a `RestartRecord` if the solver is a
        [`diffrax_reversible.RecordedRestarts`][].

    ```python
    def init(self, terms, t0, t1, y0, args):
        return RestartState.fresh(y0, y0, self.ratio)
    ```
    """

    copy: PyTree
    due: BoolScalarLike
    largest: tuple[RealScalarLike, RealScalarLike]
    first: RealScalarLike
    memory: PyTree = None
    restarts: bool = eqx.field(static=True, default=True)
    age: IntScalarLike = 0
    record: RestartRecord | None = None

    @property
    def restarted(self) -> BoolScalarLike:
        """Whether the step that starts here starts with a restart."""
        return self.due if self.restarts else False

    @staticmethod
    def fresh(copy: PyTree, y: Y, ratio: float | None, memory: PyTree = None):
        """The solver state at the start of a solve, and after a restart.

        **Arguments:**

        - `copy`: the second copy.
        - `y`: the solution.
        - `ratio`: that of the `Restart`. `None` if the solver is only watched.
        - `memory`: zeros like what `Restart.memory` makes.
        """
        size = lax.stop_gradient(norm(y))
        largest = (jnp.zeros_like(size), size)
        no = jnp.array(False)
        first = jnp.zeros_like(size)
        age = jnp.array(0)
        return RestartState(copy, no, largest, first, memory, ratio is not None, age)


def copy_of(solver_state: PyTree) -> PyTree:
    """The solver state without what is only there to restart."""
    return solver_state.copy if type(solver_state) is RestartState else solver_state


def cotangent_of(solver_state: PyTree, copy: PyTree) -> PyTree:
    """The cotangent of a solver state, of which only the copy matters to the solution."""
    zeros = with_copy(jtu.tree_map(jnp.zeros_like, solver_state), copy)
    if type(solver_state) is not RestartState:
        return zeros
    record = solver_state.record
    return eqx.tree_at(lambda s: s.record, zeros, record, is_leaf=_is_none)


def with_copy(solver_state: PyTree, copy: PyTree) -> PyTree:
    """The inverse of `copy_of`."""
    if type(solver_state) is not RestartState:
        return copy
    return eqx.tree_at(lambda s: s.copy, solver_state, copy, is_leaf=_is_none)


def restarted(solver_state: PyTree) -> BoolScalarLike:
    """Whether the step that starts here starts with a restart. `False` itself if none
    ever does."""
    return solver_state.restarted if type(solver_state) is RestartState else False


def _is_none(x) -> bool:
    return x is None


def test_for_restart(
    restart: Restart,
    old: RestartState,
    y0: Y,
    state1: State,
    sums: PyTree,
    y_error: Y | None,
) -> RestartState:
    """The solver state at the end of a step."""
    y0_kept = y0
    y0, y1, error = lax.stop_gradient((y0, state1.y, y_error))
    # Of the step before a restart nothing is left.
    memory = where(~jnp.asarray(old.restarted), old.memory, 0)
    difference = restart.difference(state1, sums, memory)
    difference = lax.stop_gradient(difference)
    size, first = norm(difference), lax.stop_gradient(old.first)
    is_first = jnp.asarray(old.restarted) | (first == 0)
    first = jnp.where(is_first, size, first)
    largest = (size, norm(y1))
    largest = jtu.tree_map(jnp.maximum, lax.stop_gradient(old.largest), largest)
    due = jnp.array(False)
    if error is not None:
        ratio = 1.0 if restart.ratio is None else restart.ratio
        if restart.has_floor:
            ratio = jnp.where(size < 3 * first, 4 * ratio, ratio)
        due = _exceeds(difference, error, y0, y1, ratio, restart.order)
        due = due if old.restarts else old.due | due
    memory, restarted = lax.stop_gradient(restart.memory(sums)), old.restarted
    age, record = jnp.where(restarted, 0, old.age) + 1, old.record
    if record is not None:
        record = record.keep(y0_kept, old.copy, old.age, restarted)
    copy, restarts = state1.solver_state, old.restarts
    return RestartState(copy, due, largest, first, memory, restarts, age, record)


def starts_with_restart(solver_state: PyTree) -> BoolScalarLike:
    """Whether the step that ended here started with a restart before which the state was
    kept; `False` itself if none is kept."""
    if type(solver_state) is not RestartState or solver_state.record is None:
        return False
    return (solver_state.age == 1) & (solver_state.record.count > 0)


def before_step(solver_state: PyTree, y0: Y, restarts: BoolScalarLike):
    """The solution and the solver state at the start of a step that has been undone, from
    those to which it has led; `restarts` is what `starts_with_restart` was at its end."""
    if type(solver_state) is not RestartState:
        return y0, solver_state
    copy, age, record = solver_state.copy, solver_state.age - 1, solver_state.record
    if record is not None:
        y0, copy, age = where(restarts, record.last(), (y0, copy, age))
        record = record.without_last(restarts)
    # What the solver has measured on its way is not to be had again.
    memory = jtu.tree_map(jnp.zeros_like, solver_state.memory)
    fresh = RestartState.fresh(copy, y0, None)
    due, largest, first = jnp.asarray(restarts), fresh.largest, fresh.first
    watched = solver_state.restarts
    return y0, RestartState(copy, due, largest, first, memory, watched, age, record)


def pull_back_record(
    solver_state: PyTree, cotangent: PyTree, restarts: BoolScalarLike
) -> tuple[PyTree, PyTree, tuple[Y, PyTree] | None]:
    """Pulls back what a step, at the end of which the solver state is `solver_state`, has
    recorded: the solver state and its cotangent without that, and the cotangents of the
    solution and of the copy that were recorded."""
    if type(solver_state) is not RestartState or solver_state.record is None:
        return solver_state, cotangent, None
    record = solver_state.record
    place = jnp.clip(record.count - 1, 0, record.capacity - 1)
    kept = jnp.asarray(restarts) & (record.count <= record.capacity)
    rows = (cotangent.record.y, cotangent.record.copy)
    found = where(kept, jtu.tree_map(lambda xs: xs[place], rows), 0)
    clear = lambda xs: xs.at[place].set(jnp.where(kept, 0, xs[place]))
    of = lambda s: (s.record.y, s.record.copy)
    cotangent = eqx.tree_at(of, cotangent, jtu.tree_map(clear, rows))
    record = record.without_last(restarts)
    return eqx.tree_at(lambda s: s.record, solver_state, record), cotangent, found


def _exceeds(
    difference: Y, error: Y, y0: Y, y1: Y, ratio: RealScalarLike, order
) -> BoolScalarLike:
    """Whether `difference` exceeds a multiple of `atol + rtol * abs(y)` anywhere, with
    the smallest tolerances that `error` meets: so that what is small beside the rest of
    the solution keeps its own digits. See `Restart` for the multiple. What is no more
    than accumulated rounding does not count."""
    change = norm((y1**ω - y0**ω).ω)
    difference, error, y = jtu.tree_map(jnp.abs, (difference, error, y1))
    size = norm(y)
    digits = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(y)]
    eps = max(digits, default=0.0)
    rtol = jnp.maximum(norm(error) / jnp.where(size == 0, 1, size), eps)
    relative = lambda x: rtol.astype(x.dtype) * x
    factor = jnp.asarray(ratio, rtol.dtype)
    if order is not None:
        factor = factor * rtol ** (-1 / order)
    excess = lambda e, x: jnp.maximum(e - relative(x), 0)
    atol = norm(jtu.tree_map(excess, error, y))

    def one(difference, x):
        allowed = factor.astype(x.dtype) * (atol.astype(x.dtype) + relative(x))
        rounding = jnp.asarray(100 * eps, x.dtype) * (x + change.astype(x.dtype))
        return jnp.any(difference > jnp.maximum(allowed, rounding))

    exceeds = jtu.tree_leaves(jtu.tree_map(one, difference, y))
    return ft.reduce(jnp.logical_or, exceeds, jnp.array(False))


class MakeAnew(AbstractUpdate):
    """A restart: makes the solver state anew, as `solver.init` does, where it is `due`.

    What it forgets it cannot give back. `unwrite` leaves, where there was a restart, by
    how much the state differed from that after the restart: nothing but rounding.
    """

    solver: AbstractSolver
    t0: RealScalarLike
    t1: RealScalarLike
    due: BoolScalarLike

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point):
        init = self.solver.init
        anew = lambda: copy_of(init(terms, self.t0, self.t1, point, args))
        # Under `jax.vmap` evaluate only if any element restarts.
        any_due = unvmap_any(self.due)
        k = lax.cond(any_due, anew, lambda: zeros_of(anew))
        return where(self.due, k, 0)

    def write(self, state, k):
        return State(state.y, where(self.due, k, state.solver_state)), None

    def unwrite(self, state, k):
        return State(state.y, (state.solver_state**ω - k**ω).ω)


def make_anew(
    solver: Any,
    t0: RealScalarLike,
    t1: RealScalarLike,
    due: BoolScalarLike,
) -> list[AbstractUpdate]:
    """The update for a restart at the start of a step; none if there never is one."""
    return [] if due is False else [MakeAnew(solver, t0, t1, due)]


def jumps_after(due: BoolScalarLike, made_jump: BoolScalarLike) -> BoolScalarLike:
    """Whether there is a jump still to be taken into account: not by a solver state that
    has just been made, after it."""
    if made_jump is False or due is False:
        return made_jump
    return jnp.asarray(made_jump) & ~jnp.asarray(due)


def check_ratio(name: str, ratio: float | None) -> None:
    """Raises `ValueError` unless `name(restart=ratio)` is positive, or `None`."""
    if ratio is not None and not 0 < ratio < math.inf:
        raise ValueError(
            f"`{name}(restart={ratio!r})` must be positive, the ratio to the error "
            "estimate at which to restart; or `None`, never to restart."
        )
