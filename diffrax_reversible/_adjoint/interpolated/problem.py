"""A solve, and its solution at the Chebyshev points of every interval between two save
times."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import SubSaveAt
from jaxtyping import Array, PyTree, Real

from ..._autodiff.sweep import Inputs
from ..._compat import SaveState, while_loop, WrapTerm
from ..._loop.closures import is_subsaveat
from ..._loop.state import (
    at,
    differentiated,
    end_time,
    is_none,
    next_step,
    save_state,
    with_save_state,
    with_solver_state,
)
from ..._solver.runge_kutta.tableau import with_differentiable_stages
from ..._tree import combine
from ..._types import RealScalarLike, Y
from .chebyshev import chebyshev_points, lagrange, refinement


class Model(eqx.Module):
    """What the vector field depends on, besides time and state."""

    args: PyTree
    terms: PyTree

    @property
    def parts(self) -> list[WrapTerm]:
        """The terms, of which the vector field is the sum."""
        return jtu.tree_leaves(self.terms, is_leaf=lambda x: isinstance(x, WrapTerm))

    def part(self, index: int, t: RealScalarLike, y: Y) -> Y:
        term, one = self.parts[index], jnp.ones_like(t)
        return term.vf_prod(t, y, self.args, term.contr(jnp.zeros_like(t), one))

    def vector_field(self, t: RealScalarLike, y: Y) -> Y:
        parts = [self.part(i, t, y) for i in range(len(self.parts))]
        return jtu.tree_map(lambda *x: sum(x[1:], x[0]), *parts)


class Times(eqx.Module):
    """The ends of a solve and its save times.

    - `ts`: those of all `SubSaveAt`s, one after the other.
    """

    t0: Real[Array, ""]
    t1: Real[Array, ""]
    ts: Real[Array, " times"]


class ModelAndTimes(eqx.Module):
    """The parameters of a solve."""

    model: Model
    times: Times


class Trajectory(eqx.Module):
    """A solution between `start` and `end`, from its values at the Chebyshev points."""

    values: PyTree[Array]
    start: RealScalarLike
    end: RealScalarLike
    nodes: int = eqx.field(static=True)

    def __call__(self, t: RealScalarLike) -> Y:
        length = jnp.where(self.end > self.start, self.end - self.start, 1)
        x = ((t - self.start) - (self.end - t)) / length
        return combine(lagrange(x, self.nodes), self.values)

    def reached(self, y0: Y) -> PyTree[Array]:
        """The largest distance from `y0`."""

        def further(reached, matrix):
            ys = combine(matrix, self.values)
            one = lambda r, y, y0: jnp.maximum(r, jnp.max(jnp.abs(y - y0[None]), 0))
            return jtu.tree_map(one, reached, ys, y0), None

        # In parts, each of them as large as `values`.
        matrix = jnp.asarray(refinement(self.nodes).reshape(8, -1, self.nodes))
        zeros = jtu.tree_map(lambda y: jnp.zeros_like(jnp.abs(y)), y0)
        reached, _ = lax.scan(further, zeros, lax.stop_gradient(matrix))
        return reached


class Knots(eqx.Module):
    """What a solve keeps for its reverse sweep.

    - `solution`: at the Chebyshev points of all intervals.
    - `reached`: the largest distance of the solution from where it starts, at any step.
    """

    solution: PyTree[Array]
    reached: PyTree[Array]


class InterpolatedProblem(eqx.Module):
    """The loop of a solve as `InterpolatedAdjoint` is handed it.

    - `state`: that of the loop at its start.
    - `subs`: without their `ts`, of which `lengths` has the numbers.
    - `jumps`: the times at which the vector field jumps.
    - `options`: the other arguments of `diffrax.AbstractAdjoint.loop`.
    - `backward`: those of `diffeqsolve` for the adjoint equation.
    - `nodes`: the number of Chebyshev points in each interval.
    """

    y0: Y
    parameters: ModelAndTimes
    solver: Any
    stepsize_controller: Any
    subs: PyTree
    state: Any
    jumps: Real[Array, " jumps"]
    options: dict[str, Any]
    backward: dict[str, Any]
    passed_solver_state: bool = eqx.field(static=True)
    lengths: tuple[int, ...] = eqx.field(static=True)
    nodes: int = eqx.field(static=True)

    def to_inputs(self) -> tuple[Inputs, PyTree]:
        """The inputs of the reverse sweep, and what is not an array."""
        where = lambda p: (p.y0, p.parameters)
        rest = eqx.tree_at(where, self, (None, None), is_leaf=is_none)
        return Inputs.split(self.y0, self.parameters, rest)

    @staticmethod
    def from_inputs(inputs: Inputs, static: PyTree) -> "InterpolatedProblem":
        """The inverse of `to_inputs`."""
        y0, parameters, rest = inputs.join(static)
        where = lambda p: (p.y0, p.parameters)
        return eqx.tree_at(where, rest, (y0, parameters), is_leaf=is_none)

    @property
    def subsaveats(self) -> list[SubSaveAt]:
        return jtu.tree_leaves(self.subs, is_leaf=is_subsaveat)

    @property
    def ends_at_t1(self) -> bool:
        """Whether the gradient depends on the solution up to `t1`."""
        return any(s.t1 for s in self.subsaveats) or sum(self.lengths) == 0

    @property
    def intervals(self) -> int:
        return sum(self.lengths) + len(self.jumps) + self.ends_at_t1

    def breaks(self, times: Times) -> tuple[Real[Array, " breaks"], Array]:
        """The ends of the intervals, `t0` first; and where each of them, but `t0`, is in
        `ts`, followed by `jumps`, followed by `t1`."""
        t1 = times.t1[None] if self.ends_at_t1 else times.ts[:0]
        end = times.t1 if self.ends_at_t1 else jnp.max(times.ts)
        jumps = jnp.clip(self.jumps, times.t0, end)
        unsorted = jnp.concatenate([times.ts, jumps, t1])
        order = jnp.argsort(lax.stop_gradient(unsorted), stable=True)
        return jnp.concatenate([times.t0[None], unsorted[order]]), order

    def points(self) -> Real[Array, " points"]:
        """The Chebyshev points of all intervals; those of neighbours have one in
        common."""
        breaks, _ = self.breaks(self.parameters.times)
        start, end = breaks[:-1, None], breaks[1:, None]
        fractions = (1 + chebyshev_points(self.nodes)[None, :-1]) / 2
        inside = start + (end - start) * jnp.asarray(fractions, breaks.dtype)
        return jnp.append(jnp.minimum(inside, end), breaks[-1])

    def trajectory(self, solution: PyTree[Array], number, start, end) -> Trajectory:
        """That of an interval, where `solution` is that at all `points`."""
        first = number * (self.nodes - 1)
        values = jtu.tree_map(
            lambda x: lax.dynamic_slice_in_dim(x, first, self.nodes), solution
        )
        return Trajectory(values, start, end, self.nodes)

    def solve(
        self, loop: Callable, keep: bool
    ) -> tuple[tuple[Any, dict], Knots | None]:
        """The state at the end of diffrax's `loop` and the statistics of the solve; and
        what is kept for the reverse sweep, if anything is to be."""
        times, model = self.parameters.times, self.parameters.model
        each = iter(jnp.split(times.ts, np.cumsum(self.lengths, dtype=int)[:-1]))

        def restore(sub):
            ts = next(each)
            where = lambda s: s.ts
            return sub if len(ts) == 0 else eqx.tree_at(where, sub, ts, is_leaf=is_none)

        subs = jtu.tree_map(restore, self.subs, is_leaf=is_subsaveat)
        saves, distance, end = save_state(self.state), lambda _: None, times.t1
        if keep:
            points = self.points()
            end, n = points[-1], len(points)
            nothing = lambda y: jnp.full((n, *y.shape), jnp.inf, y.dtype)
            ys = jtu.tree_map(nothing, self.y0)
            subs = subs, SubSaveAt(ts=points)
            saves = saves, SaveState(0, jnp.full_like(points, jnp.inf), ys, 0)
            away = lambda a, b: jnp.abs(a - b)
            distance = lambda y: lax.stop_gradient(jtu.tree_map(away, y, self.y0))
        solver = with_differentiable_stages(self.solver)
        state = with_save_state(at(self.state, times.t0, self.y0), saves)
        if not self.passed_solver_state:
            # As `diffeqsolve` has done, but now inside of what is differentiated.
            t0, tnext, _ = next_step(state)
            solver_state = solver.init(model.terms, t0, tnext, self.y0, model.args)
            state = with_solver_state(state, solver_state)
        reached = None

        def outer_while_loop(cond_fun, body_fun, init, *, max_steps, buffers):
            def body(carry):
                state, reached = carry
                state = body_fun(state)
                further = lambda r, x: jnp.where(
                    end_time(state) <= end, jnp.maximum(r, x), r
                )
                return state, jtu.tree_map(
                    further, reached, distance(differentiated(state)[0])
                )

            nonlocal reached
            final, reached = while_loop(
                lambda carry: cond_fun(carry[0]),
                body,
                (init, distance(self.y0)),
                max_steps=max_steps,
                buffers=lambda carry: buffers(carry[0]),
                kind="lax",
            )
            return final

        options = dict(self.options)
        final, stats = loop(
            args=model.args,
            terms=model.terms,
            solver=solver,
            stepsize_controller=self.stepsize_controller,
            event=None,
            saveat=eqx.tree_at(
                lambda s: s.subs, options.pop("saveat"), subs, is_leaf=is_none
            ),
            t0=times.t0,
            t1=times.t1,
            init_state=state,
            inner_while_loop=ft.partial(while_loop, kind="lax"),
            outer_while_loop=outer_while_loop,
            **options,
        )
        knots = None
        if keep:
            saves, save = save_state(final)
            final = with_save_state(final, saves)
            knots = Knots(save.ys, reached)
        return jtu.tree_map(jnp.asarray, ((final, stats), knots))
