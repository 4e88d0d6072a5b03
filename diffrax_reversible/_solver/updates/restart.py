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
from jaxtyping import PyTree

from ..._compat import unvmap_any, ω
from ..._tree import norm, where, zeros_of
from ..._types import BoolScalarLike, RealScalarLike, Y
from .update import AbstractUpdate, Restart, State


class RestartState(eqx.Module):
    """The solver state of a solver that restarts.

    `init` of a solver of one's own returns `RestartState.fresh(copy, y0, ratio)`, if its
    steps have a [`diffrax_reversible.Restart`][]. Its updates see the copy alone, as
    `State.solver_state`. Only the copy is differentiated.

    Memory: the copy, the `memory`, and five numbers.

    - `copy`: the second copy of the solution, or of the vector field; any pytree.
    - `due`: whether the two copies differ by more than the error estimate allows, so that
        the next step starts with a restart. Whether they ever have, if none does.
    - `largest`: how large their difference, and the solution, have been at most.
    - `first`: how large their difference was after the first step since the last restart.
    - `memory`: what of the last step the solver needs to tell.
    - `restarts`: `False` if the solver is only watched.
    """

    copy: PyTree
    due: BoolScalarLike
    largest: tuple[RealScalarLike, RealScalarLike]
    first: RealScalarLike
    memory: PyTree = None
    restarts: bool = eqx.field(static=True, default=True)

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
        return RestartState(copy, no, largest, first, memory, ratio is not None)


def copy_of(solver_state: PyTree) -> PyTree:
    """The solver state without what is only there to restart."""
    return solver_state.copy if type(solver_state) is RestartState else solver_state


def cotangent_of(solver_state: PyTree, copy: PyTree) -> PyTree:
    """The cotangent of a solver state, of which only the copy matters to the solution."""
    zeros = jtu.tree_map(jnp.zeros_like, solver_state)
    return with_copy(zeros, copy)


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
    memory = lax.stop_gradient(restart.memory(sums))
    return RestartState(state1.solver_state, due, largest, first, memory, old.restarts)


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
