"""A solve, and its solution at the Chebyshev points of every interval between the times
at which it is saved."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import ClipStepSizeController, SubSaveAt
from jaxtyping import Array, PyTree, Real

from ..._autodiff.sweep import Inputs
from ..._compat import SaveState, while_loop, WrapTerm
from ..._loop.closures import is_subsaveat
from ..._loop.problem import is_none
from ..._solver.runge_kutta.tableau import with_differentiable_stages
from ..._types import RealScalarLike, Y
from .chebyshev import chebyshev_points, combine, lagrange, refinement


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
    """- `ts`: those of all `SubSaveAt`s, one after the other."""

    t0: Real[Array, ""]
    t1: Real[Array, ""]
    ts: Real[Array, " times"]


class Parameters(eqx.Module):
    model: Model
    times: Times


class Trajectory(eqx.Module):
    """A solution between `start` and `end`, from its values at the Chebyshev points."""

    values: PyTree[Array]
    start: RealScalarLike
    end: RealScalarLike
    nodes: int = eqx.field(static=True)

    @property
    def length(self):
        return jnp.where(self.end > self.start, self.end - self.start, 1)

    def __call__(self, t: RealScalarLike) -> Y:
        x = ((t - self.start) - (self.end - t)) / self.length
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


class Problem(eqx.Module):
    """The loop of a solve as its adjoint method is handed it.

    - `state`: that of the loop at its start.
    - `subs`: without their `ts`, of which `lengths` has the numbers.
    - `jumps`: the times at which the vector field jumps.
    - `options`: the other arguments of `diffrax.AbstractAdjoint.loop`.
    - `backward`: those of `diffeqsolve` on the way back.
    - `nodes`, `landing`: see `InterpolatedAdjoint`.
    """

    y0: Y
    parameters: Parameters
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
    landing: bool = eqx.field(static=True)

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

    def breaks(self) -> tuple[Real[Array, " breaks"], Array]:
        """The ends of the intervals, `t0` first; and where each of them, but `t0`, is in
        `ts`, followed by `jumps`, followed by `t1`."""
        times = self.parameters.times
        t1 = times.t1[None] if self.ends_at_t1 else times.ts[:0]
        end = times.t1 if self.ends_at_t1 else jnp.max(times.ts)
        jumps = jnp.clip(self.jumps, times.t0, end)
        unsorted = jnp.concatenate([times.ts, jumps, t1])
        order = jnp.argsort(lax.stop_gradient(unsorted), stable=True)
        return jnp.concatenate([times.t0[None], unsorted[order]]), order

    def points(self) -> Real[Array, " points"]:
        """The Chebyshev points of all intervals; those of neighbours have one in
        common."""
        breaks, _ = self.breaks()
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


def split(problem: Problem) -> tuple[Inputs, PyTree]:
    """The arrays of a problem as inputs of the rule, and what is not an array."""
    where = lambda p: (p.y0, p.parameters)
    rest = eqx.tree_at(where, problem, (None, None), is_leaf=is_none)
    y0, y0_rest = eqx.partition(problem.y0, eqx.is_inexact_array)
    parameters, parameters_rest = eqx.partition(
        problem.parameters, eqx.is_inexact_array
    )
    rest, static = eqx.partition((rest, y0_rest, parameters_rest), eqx.is_array)
    # Constants of a vector field may be arrays of NumPy.
    y0, parameters = jtu.tree_map(jnp.asarray, (y0, parameters))
    return Inputs(y0, parameters, lax.stop_gradient(rest)), static


def join(inputs: Inputs, static: PyTree) -> Problem:
    """The inverse of `split`."""
    rest, y0_rest, parameters_rest = eqx.combine(inputs.rest, static)
    y0 = eqx.combine(inputs.state, y0_rest)
    parameters = eqx.combine(inputs.parameters, parameters_rest)
    where = lambda p: (p.y0, p.parameters)
    return eqx.tree_at(where, rest, (y0, parameters), is_leaf=is_none)


def _land(problem: Problem, points, state):
    """The controller and the initial state of a solve that steps onto the points."""
    times, model = problem.parameters.times, problem.parameters.model
    solver = problem.solver
    points = lax.stop_gradient(points)
    controller = ClipStepSizeController(problem.stepsize_controller, step_ts=points)
    _, controller_state = controller.init(
        model.terms,
        times.t0,
        times.t1,
        problem.y0,
        problem.options["dt0"],
        model.args,
        solver.func,
        solver.error_order(model.terms),
    )
    controller_state = eqx.tree_at(
        lambda s: s.inner_state,
        controller_state,
        state.controller_state,
        is_leaf=is_none,
    )
    first = jnp.min(jnp.where(points > state.tprev, points, jnp.inf))
    tnext = jnp.minimum(state.tnext, first)
    where = lambda s: (s.controller_state, s.tnext)
    return controller, eqx.tree_at(
        where, state, (controller_state, tnext), is_leaf=is_none
    )


def _observed(problem: Problem, seen: list):
    """A loop that also finds out how far the solution goes from where it starts."""
    breaks, _ = problem.breaks()
    end = breaks[-1]
    distance = lambda y: jtu.tree_map(lambda a, b: jnp.abs(a - b), y, problem.y0)

    def outer_while_loop(cond_fun, body_fun, init, *, max_steps, buffers):
        def body(carry):
            state, reached = carry
            state = body_fun(state)
            further = jtu.tree_map(jnp.maximum, reached, distance(state.y))
            keep = lambda a, b: jnp.where(state.tprev <= end, a, b)
            return state, jtu.tree_map(keep, further, reached)

        final, reached = while_loop(
            lambda carry: cond_fun(carry[0]),
            body,
            (init, distance(problem.y0)),
            max_steps=max_steps,
            buffers=lambda carry: buffers(carry[0]),
            kind="lax",
        )
        seen.append(lax.stop_gradient(reached))
        return final

    return outer_while_loop


class Outputs(eqx.Module):
    """- `final`: the state at the end of the loop.
    - `solution`: at all points.
    - `reached`: the largest distance of the solution from where it starts.
    """

    final: Any
    solution: PyTree[Array]
    reached: PyTree[Array]
    stats: dict


def run(loop: Callable, problem: Problem) -> Outputs:
    """- `loop`: diffrax's own."""
    times, model = problem.parameters.times, problem.parameters.model
    points = problem.points()
    save = SaveState(
        saveat_ts_index=0,
        ts=jnp.full(points.shape, jnp.inf, points.dtype),
        ys=jtu.tree_map(
            lambda y: jnp.full((len(points), *y.shape), jnp.inf, y.dtype), problem.y0
        ),
        save_index=0,
    )
    each = iter(jnp.split(times.ts, list(_cumulative(problem.lengths))[:-1]))

    def restore(sub):
        ts = next(each)
        where = lambda s: s.ts
        return sub if len(ts) == 0 else eqx.tree_at(where, sub, ts, is_leaf=is_none)

    subs = jtu.tree_map(restore, problem.subs, is_leaf=is_subsaveat)
    options = dict(problem.options)
    saveat = eqx.tree_at(
        lambda s: s.subs,
        options.pop("saveat"),
        (subs, SubSaveAt(ts=points)),
        is_leaf=is_none,
    )
    solver = with_differentiable_stages(problem.solver)
    solver_state = problem.state.solver_state
    if not problem.passed_solver_state:
        # As `diffeqsolve` has done, but now inside of what is differentiated.
        t0, tnext = times.t0, problem.state.tnext
        solver_state = solver.init(model.terms, t0, tnext, problem.y0, model.args)
    state = eqx.tree_at(
        lambda s: (s.y, s.tprev, s.solver_state, s.save_state),
        problem.state,
        (problem.y0, times.t0, solver_state, (problem.state.save_state, save)),
        is_leaf=is_none,
    )
    controller = problem.stepsize_controller
    if problem.landing:
        controller, state = _land(problem, points, state)
    seen = []
    final, stats = loop(
        args=model.args,
        terms=model.terms,
        solver=solver,
        stepsize_controller=controller,
        event=None,
        saveat=saveat,
        t0=times.t0,
        t1=times.t1,
        init_state=state,
        inner_while_loop=ft.partial(while_loop, kind="lax"),
        outer_while_loop=_observed(problem, seen),
        **options,
    )
    users, save = final.save_state
    final = eqx.tree_at(lambda s: s.save_state, final, users, is_leaf=is_none)
    if problem.landing:
        inner = final.controller_state.inner_state
        final = eqx.tree_at(lambda s: s.controller_state, final, inner, is_leaf=is_none)
    return jtu.tree_map(jnp.asarray, Outputs(final, save.ys, seen[0], stats))


def _cumulative(lengths):
    total = 0
    for length in lengths:
        total += length
        yield total
