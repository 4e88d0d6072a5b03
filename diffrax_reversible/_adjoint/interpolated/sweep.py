"""The reverse sweep of `InterpolatedAdjoint`: a step of it solves the adjoint equation
from one save time to the one before."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ..._autodiff.batch import Batch
from ..._autodiff.report import error_if, OnFailure
from ..._autodiff.sweep import AbstractSweep, Inputs, Residuals
from ..._loop.state import is_none, save_states, succeeded, with_save_state
from ..._types import BoolScalarLike, FloatScalarLike, IntScalarLike
from ..discrete.measures import norm
from .chebyshev import chebyshev_points, gauss_legendre
from .equation import inside, solve_adjoint_equation
from .options import unsupported
from .problem import InterpolatedProblem, Knots, ModelAndTimes
from .resolution import is_resolved, missing, Resolution, resolve, sizes, worse


_FAILED = (
    "The solve of the adjoint equation has failed. Ways out: "
    "`InterpolatedAdjoint(..., max_steps=...)`, larger tolerances "
    "(`InterpolatedAdjoint(..., stepsize_controller=...)`), another solver "
    "(`InterpolatedAdjoint(..., solver=...)`), or "
    "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)
_ONLY_SAVED = unsupported(
    "the derivative of anything in the solution but `ys` and `ts`"
)


class _Carry(eqx.Module):
    """The carry of the sweep.

    - `remaining`: the number of intervals.
    - `sizes`: of the solution.
    - `adjoint_sizes`: of the adjoint, so far.
    - `seen`: how far the interpolated solution goes from where it starts, so far.
    - `okay`: whether all solves have succeeded.
    """

    remaining: IntScalarLike
    adjoint: PyTree[Array]
    sizes: PyTree[Array]
    adjoint_sizes: PyTree[Array]
    resolution: Resolution
    seen: PyTree[Array]
    okay: BoolScalarLike


@dataclasses.dataclass(frozen=True, eq=False)
class InterpolatedSweep(AbstractSweep):
    """The loop of a solve, and its reverse sweep: the adjoint equation, in which the
    solution is interpolated.

    - `loop`: diffrax's own.
    - `static`: what of the problem is not an array.
    - `quadrature`: the number of Gauss points in each interval, or `None`.
    - `rtol`, `on_failure`: what error of the interpolation to accept, and what to do
        about a larger one.
    - `throw`: whether to raise where the adjoint equation could not be solved.
    """

    loop: Callable
    static: PyTree
    quadrature: int | None
    rtol: float
    on_failure: OnFailure
    throw: bool

    refusal = (
        "`adjoint=InterpolatedAdjoint(...)` does not differentiate with respect to a "
        "value that a callable closes over, other than the vector field. Pass it through "
        "`args`, or use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )
    refusal_twice = (
        "A gradient with `InterpolatedAdjoint(...)` cannot be differentiated in reverse "
        "mode again. For second derivatives use forward mode over reverse mode: "
        "`jax.jacfwd(jax.grad(...))`, `jax.jvp` of `jax.grad`, or a Hessian-vector "
        "product of these."
    )

    def _problem(self, inputs: Inputs) -> InterpolatedProblem:
        return InterpolatedProblem.from_inputs(inputs, self.static)

    def evaluate(self, inputs: Inputs) -> PyTree:
        outputs, _ = self._problem(inputs).solve(self.loop, keep=False)
        return outputs

    def evaluate_with_memory(
        self, inputs: Inputs, perturbed: Inputs
    ) -> tuple[PyTree, Knots]:
        del perturbed
        outputs, knots = self._problem(inputs).solve(self.loop, keep=True)
        assert knots is not None
        return outputs, knots

    def start(self, residuals: Residuals, cotangents: PyTree, batch: Batch) -> _Carry:
        del cotangents, batch
        problem, (final, _) = self._problem(residuals.inputs), residuals.outputs
        knots: Knots = residuals.memory
        okay = succeeded(final)
        for x in jtu.tree_leaves(knots.solution):
            okay = okay & jnp.all(jnp.isfinite(x))
        found = sizes(knots.solution)
        zero, t = jnp.zeros_like(norm(found)), problem.parameters.times.t0
        return _Carry(
            jnp.asarray(problem.intervals),
            jtu.tree_map(jnp.zeros_like, problem.y0),
            found,
            jtu.tree_map(jnp.zeros_like, found),
            Resolution(zero, zero, t, t, jnp.array(False)),
            jtu.tree_map(jnp.zeros_like, knots.reached),
            okay,
        )

    def length(self, carry: _Carry) -> IntScalarLike:
        return carry.remaining

    def step(
        self,
        residuals: Residuals,
        cotangents: PyTree,
        carry: _Carry,
        total: ModelAndTimes,
        batch: Batch,
    ) -> tuple[_Carry, ModelAndTimes]:
        problem = self._problem(residuals.inputs)
        parameters: ModelAndTimes = residuals.inputs.parameters
        model = problem.parameters.model
        breaks, order = problem.breaks(problem.parameters.times)
        number = carry.remaining - 1
        saved = _saved_cotangent(problem, cotangents, order[number])
        adjoint = jtu.tree_map(jnp.add, carry.adjoint, saved)
        size = lax.stop_gradient(norm(adjoint))
        adjoint_sizes = jtu.tree_map(
            lambda s, x: jnp.maximum(s, jnp.abs(x)), carry.adjoint_sizes, adjoint
        )
        start, end = breaks[number], breaks[number + 1]
        # There is nothing to be found where a solve has failed, or a cotangent is NaN.
        start = jnp.where(carry.okay & jnp.isfinite(size), start, end)
        trajectory = problem.trajectory(residuals.memory.solution, number, start, end)
        # Nor is zero times something that is not finite to be added up.
        known = lambda x, y0: jnp.where(
            carry.okay, x, jnp.where(jnp.isfinite(y0), y0, 0)
        )
        values = jtu.tree_map(known, trajectory.values, problem.y0)
        trajectory = eqx.tree_at(lambda x: x.values, trajectory, values)
        reached = trajectory.reached(problem.y0)

        def resolution(values, points, sizes, of_adjoint):
            loss, needed = resolve(values, points, sizes, self.rtol)
            loss = jnp.where(size > 0, loss, 0)
            return Resolution(loss, needed, start, end, jnp.array(of_adjoint))

        points = chebyshev_points(problem.nodes)
        found = resolution(values, points, carry.sizes, False)
        for_model = batch.select(lambda parameters: parameters.model)
        mask = lambda total, x: None if total is None else x
        perturbed = jtu.tree_map(mask, total.model, parameters.model, is_leaf=is_none)
        solve = ft.partial(solve_adjoint_equation, problem, trajectory, adjoint)
        if self.quadrature is None or len(jtu.tree_leaves(perturbed)) == 0:
            new, increment, _, okay = solve(perturbed)
            _, _, total_model = for_model.vjp(
                lambda _, p: jtu.tree_map(jnp.multiply, increment, p),
                (),
                perturbed,
                jtu.tree_map(jnp.ones_like, perturbed),
                total.model,
            )
        else:
            points, weights = gauss_legendre(self.quadrature)
            half, middle = (end - start) / 2, (start + end) / 2
            cast = lambda x: jnp.asarray(x, start.dtype)
            ts = jnp.clip(middle + half * cast(points), start, end)
            nothing = jtu.tree_map(lambda _: None, perturbed)
            new, _, adjoints, okay = solve(nothing, ts)
            # The ends are known, too, and are where the adjoint changes fastest.
            points = np.concatenate([[1], points, [-1]])
            values = jtu.tree_map(
                lambda a, x, b: jnp.concatenate([a[None], x, b[None]]),
                *(adjoint, adjoints, new),
            )
            adjoint_sizes = jtu.tree_map(jnp.maximum, adjoint_sizes, sizes(values))
            found = worse(found, resolution(values, points, adjoint_sizes, True))

            def add(total, node):
                t, weight, adjoint = node
                y = trajectory(t)
                _, _, total = for_model.vjp(
                    lambda _, p: eqx.combine(p, model).vector_field(t, y),
                    (),
                    perturbed,
                    jtu.tree_map(lambda a: weight.astype(a.dtype) * a, adjoint),
                    total,
                )
                return total, None

            nodes = ts, half * cast(weights), adjoints
            total_model, _ = lax.scan(add, total.model, nodes)
        total_times = _add_times(
            problem,
            trajectory,
            number,
            (saved, new),
            parameters.times,
            total.times,
            batch,
        )
        carry = _Carry(
            number,
            new,
            carry.sizes,
            adjoint_sizes,
            worse(carry.resolution, found),
            jtu.tree_map(jnp.maximum, carry.seen, reached),
            carry.okay & okay,
        )
        return carry, ModelAndTimes(total_model, total_times)

    def finish(
        self, residuals: Residuals, cotangents: PyTree, carry: _Carry
    ) -> tuple[PyTree, FloatScalarLike]:
        problem = self._problem(residuals.inputs)
        knots: Knots = residuals.memory
        (final, _), (cotangent, _) = residuals.outputs, cotangents
        adjoint, okay = carry.adjoint, carry.okay
        site = self.on_failure.call_site
        for sub, save in zip(problem.subsaveats, save_states(cotangent)):
            if sub.t0:
                adjoint = jtu.tree_map(lambda a, x: a + x[0], adjoint, save.ys)
        is_zero = norm(lax.stop_gradient(cotangents)) == 0
        others = with_save_state(cotangent, None)
        for x in jtu.tree_leaves(others):
            okay = error_if(okay, jnp.any(x != 0), _ONLY_SAVED, site)
        if self.throw:
            failed = succeeded(final) & ~okay & ~is_zero
            okay = error_if(okay, failed, _FAILED, site)
        breaks, _ = problem.breaks(problem.parameters.times)
        missed = Resolution(
            *missing(knots.reached, carry.seen, carry.sizes, self.rtol),
            *(breaks[0], breaks[-1], jnp.array(False)),
        )
        matters = carry.okay & (norm(carry.adjoint_sizes) > 0)
        loss = jnp.where(matters, missed.loss, 0)
        missed = eqx.tree_at(lambda r: r.loss, missed, loss)
        direction = problem.parameters.model.parts[0].direction
        resolution = eqx.tree_at(
            lambda r: (r.start, r.end),
            worse(carry.resolution, missed),
            replace_fn=lambda t: t * direction,
        )
        quadrature = self.quadrature or 0
        okay = okay & is_resolved(
            resolution, problem.nodes, quadrature, self.rtol, self.on_failure
        )
        # Nobody looks at what has failed where all cotangents are zero.
        return adjoint, jnp.where(okay | is_zero, 0.0, jnp.nan)


def _saved_cotangent(problem: InterpolatedProblem, cotangents: PyTree, index) -> PyTree:
    """The cotangent of what is saved at the time `index` of `problem.breaks(...)`."""
    final, _ = cotangents
    total = jtu.tree_map(jnp.zeros_like, problem.y0)
    first, end = 0, sum(problem.lengths) + len(problem.jumps)
    for sub, length, save in zip(
        problem.subsaveats, problem.lengths, save_states(final)
    ):
        # Where it is in the buffer, and whether it is there.
        places: list[tuple[Any, Any]] = [(-1, index == end)] if sub.t1 else []
        if length > 0:
            here = (index >= first) & (index < first + length)
            place = jnp.clip(index - first, 0, length - 1) + int(sub.t0)
            places.append((place, here))
        for place, here in places:
            add = lambda a, x: a + jnp.where(here, x[place], 0)
            total = jtu.tree_map(add, total, save.ys)
        first += length
    return total


def _add_times(
    problem: InterpolatedProblem, trajectory, number, cotangents, times, total, batch
):
    """Adds the cotangents of times: what is saved later moves on with the solution; a
    later start moves it back."""
    saved, adjoint = cotangents
    start, end = trajectory.start, trajectory.end

    def rate(t, node):
        y = jtu.tree_map(lambda x: x[node], trajectory.values)
        return problem.parameters.model.vector_field(inside(t, start, end), y)

    parts = []
    if total.ts is not None or total.t1 is not None:
        parts.append((number + 1, rate(end, -1), saved))
    if total.t0 is not None:
        first = number == 0
        zeros = jtu.tree_map(jnp.zeros_like, adjoint)
        rates = lax.cond(batch.any(first), lambda: rate(start, 0), lambda: zeros)
        back = jtu.tree_map(lambda x: jnp.where(first, -x, 0), adjoint)
        parts.append((number, rates, back))
    if len(parts) == 0:
        return total
    places, rates, cotangents = zip(*parts)

    def moved(_, times):
        breaks, _ = problem.breaks(times)
        move = lambda k, t: t.astype(k.dtype) * k
        return tuple(
            jtu.tree_map(lambda k: move(k, breaks[i]), rate)
            for i, rate in zip(places, rates)
        )

    for_times = batch.select(lambda parameters: parameters.times)
    _, _, total = for_times.vjp(moved, (), times, cotangents, total)
    return total
