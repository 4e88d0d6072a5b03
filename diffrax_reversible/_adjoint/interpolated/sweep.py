"""The adjoint equation, from one save time to the one before."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    diffeqsolve,
    ForwardMode,
    is_successful,
    MultiTerm,
    ODETerm,
    SaveAt,
    SubSaveAt,
)
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree

from ..._autodiff.sweep import AbstractSweep, Batch, Inputs
from ..._compat import nextafter, prevbefore
from ..._loop.problem import is_none, save_states
from ..._types import BoolScalarLike, IntScalarLike
from .chebyshev import chebyshev_points, gauss_legendre
from .options import unsupported
from .problem import join, Model, Parameters, Problem, run, Trajectory
from .resolution import (
    check,
    largest,
    missing,
    OnUnresolved,
    Resolution,
    resolve,
    sizes,
    worse,
)


_FAILED = (
    "The solve of the adjoint equation has failed. Ways out: "
    "`InterpolatedAdjoint(..., max_steps=...)`, larger tolerances "
    "(`InterpolatedAdjoint(..., stepsize_controller=...)`), another solver "
    "(`InterpolatedAdjoint(..., solver=...)`), or "
    "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
)
_ONLY_SAVED = unsupported(
    "the derivative of anything in the solution but `ys` and `ts`"
).args[0]


class _Walk(eqx.Module):
    """- `remaining`: intervals.
    - `sizes`: of the solution.
    - `adjoint_sizes`: of the adjoint, so far.
    - `seen`: how far the interpolated solution goes from where it starts.
    - `okay`: whether all solves have succeeded.
    """

    remaining: IntScalarLike
    adjoint: PyTree[Array]
    sizes: PyTree[Array]
    adjoint_sizes: PyTree[Array]
    resolution: Resolution
    seen: PyTree[Array]
    okay: BoolScalarLike


def _inside(t, start, end):
    """`t`, not where the vector field jumps."""
    inside = jnp.clip(t, nextafter(start), prevbefore(end))
    return t + lax.stop_gradient(jnp.where(end > start, inside - t, 0))


class _AdjointField(eqx.Module):
    """The right hand side of the adjoint equation, for one of the terms.

    - `rest`: of the model; what is not among the parameters that it is called with.
    """

    trajectory: Trajectory
    rest: Model
    index: int = eqx.field(static=True)

    def __call__(self, t, adjoint, parameters):
        inside = _inside(t, self.trajectory.start, self.trajectory.end)

        def vector_field(y, parameters):
            model = eqx.combine(parameters, self.rest)
            return model.part(self.index, inside, y)

        _, vjp = jax.vjp(vector_field, self.trajectory(t), parameters)
        cotangent_y, _ = adjoint
        return jtu.tree_map(jnp.negative, vjp(cotangent_y))


class InterpolatedSweep(AbstractSweep):
    """The loop of a solve, and the adjoint equation, in which the solution is
    interpolated.

    - `loop`: diffrax's own.
    - `static`: what of the problem is not an array.
    - `quadrature`: the number of Gauss points in each interval, or `None`.
    - `rtol`, `on_unresolved`: what error of the interpolation to accept, and what to do
        about a larger one.
    - `throw`: whether to raise where the adjoint equation could not be solved.
    """

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

    def __init__(
        self,
        loop: Callable,
        static: PyTree,
        quadrature: int | None,
        rtol: float,
        on_unresolved: OnUnresolved,
        throw: bool,
    ):
        self.loop = loop
        self.static = static
        self.quadrature = quadrature
        self.rtol = rtol
        self.on_unresolved: OnUnresolved = on_unresolved
        self.throw = throw

    def evaluate(self, inputs: Inputs) -> PyTree:
        return run(self.loop, join(inputs, self.static))

    def start(self, inputs: Inputs, outputs: PyTree, cotangents: PyTree) -> _Walk:
        del cotangents
        problem = join(inputs, self.static)
        found = sizes(outputs.solution)
        zero = jnp.zeros((), jnp.result_type(float, *jtu.tree_leaves(found)))
        t = problem.parameters.times.t0
        return _Walk(
            jnp.asarray(problem.intervals),
            jtu.tree_map(jnp.zeros_like, problem.y0),
            found,
            jtu.tree_map(jnp.zeros_like, found),
            Resolution(zero, zero, t, t, jnp.array(False)),
            jtu.tree_map(jnp.zeros_like, outputs.reached),
            is_successful(outputs.final.result),
        )

    def length(self, carry: _Walk) -> Int[ArrayLike, "..."]:
        return carry.remaining

    def step(
        self,
        inputs: Inputs,
        outputs: PyTree,
        cotangents: PyTree,
        carry: _Walk,
        cotangent_parameters: PyTree,
        batch: Batch,
    ) -> tuple[_Walk, PyTree]:
        problem = join(inputs, self.static)
        total, model = cotangent_parameters, problem.parameters.model
        mask = lambda total, x: None if total is None else x
        parameters = jtu.tree_map(
            mask, total.model, inputs.parameters.model, is_leaf=is_none
        )
        breaks, order = problem.breaks()
        number = carry.remaining - 1
        index = order[number]
        saved = _saved_cotangent(problem, cotangents, index)
        adjoint = jtu.tree_map(jnp.add, carry.adjoint, saved)
        size = largest(sizes(adjoint))
        adjoint_sizes = jtu.tree_map(jnp.maximum, carry.adjoint_sizes, sizes(adjoint))
        start, end = breaks[number], breaks[number + 1]
        # There is nothing to be found where a solve has failed, or a cotangent is NaN.
        start = jnp.where(carry.okay & jnp.isfinite(size), start, end)
        trajectory = problem.trajectory(outputs.solution, number, start, end)
        reached = trajectory.reached(problem.y0)
        seen = jtu.tree_map(jnp.maximum, carry.seen, reached)

        def resolution(values, points, sizes, of_adjoint):
            loss, needed = resolve(values, points, sizes, self.rtol)
            loss = jnp.where(size > 0, loss, 0)
            return Resolution(loss, needed, start, end, jnp.array(of_adjoint))

        found = resolution(
            trajectory.values, chebyshev_points(problem.nodes), carry.sizes, False
        )
        for_model = Batch(batch.names, batch.summed.model)
        if self.quadrature is None or len(jtu.tree_leaves(parameters)) == 0:
            new, increment, _, okay = self._solve(
                problem, trajectory, adjoint, parameters
            )
            total_model = for_model.accumulate(total.model, increment)
        else:
            ts, weights = _gauss(self.quadrature, start, end)
            nothing = jtu.tree_map(lambda _: None, parameters)
            new, _, inside, okay = self._solve(
                problem, trajectory, adjoint, nothing, ts
            )
            points, _ = gauss_legendre(self.quadrature)
            # The ends are known, too, and are where the adjoint changes fastest.
            points = np.concatenate([[1], points, [-1]])
            values = jtu.tree_map(
                lambda a, x, b: jnp.concatenate([a[None], x, b[None]]),
                *(adjoint, inside, new),
            )
            adjoint_sizes = jtu.tree_map(jnp.maximum, adjoint_sizes, sizes(values))
            found = worse(found, resolution(values, points, adjoint_sizes, True))

            def pull_back(total, node):
                t, weight, adjoint = node
                vector_field = lambda y, p: eqx.combine(p, model).vector_field(t, y)
                _, _, increment = for_model.pull_back(
                    vector_field,
                    trajectory(t),
                    parameters,
                    jtu.tree_map(lambda a: weight.astype(a.dtype) * a, adjoint),
                )
                return for_model.accumulate(total, increment), None

            total_model, _ = lax.scan(pull_back, total.model, (ts, weights, inside))
        total_times = _pull_back_times(
            problem, trajectory, (number, index), (saved, new), total.times, batch
        )
        walk = _Walk(
            number,
            new,
            carry.sizes,
            adjoint_sizes,
            worse(carry.resolution, found),
            seen,
            carry.okay & okay,
        )
        return walk, Parameters(total_model, total_times)

    def _solve(self, problem, trajectory, adjoint, parameters, ts=None):
        """The adjoint at the start of the trajectory, the cotangent of the parameters,
        the adjoint at `ts`, and whether this was successful."""
        # The equation is linear. Absolute tolerances know nothing of the size of a loss.
        size = lax.stop_gradient(largest(sizes(adjoint)))
        size = jnp.where(size == 0, 1, size)
        adjoint = jtu.tree_map(lambda x: x / size.astype(x.dtype), adjoint)
        model = problem.parameters.model
        terms = [
            ODETerm(_AdjointField(trajectory, model, i))
            for i in range(len(model.parts))
        ]
        zeros = jtu.tree_map(jnp.zeros_like, parameters)
        subs = {"start": SubSaveAt(t1=True)}
        if ts is not None:
            subs["inside"] = SubSaveAt(ts=ts, fn=lambda t, y, args: y[0])
        solution = diffeqsolve(
            MultiTerm(*terms) if isinstance(model.terms, MultiTerm) else terms[0],
            t0=trajectory.end,
            t1=trajectory.start,
            y0=(adjoint, zeros),
            args=parameters,
            saveat=SaveAt(subs=subs),
            adjoint=ForwardMode(),
            throw=False,
            **problem.backward,
        )
        ys = jtu.tree_map(lambda x: size.astype(x.dtype) * x, solution.ys)
        new, increment = jtu.tree_map(lambda x: x[0], ys["start"])
        return new, increment, ys.get("inside"), is_successful(solution.result)

    def finish(
        self, inputs: Inputs, outputs: PyTree, cotangents: PyTree, carry: _Walk
    ) -> tuple[PyTree, Bool[Array, ""]]:
        problem = join(inputs, self.static)
        adjoint = carry.adjoint
        for sub, save in zip(problem.subsaveats, save_states(cotangents.final)):
            if sub.t0:
                adjoint = jtu.tree_map(lambda a, x: a + x[0], adjoint, save.ys)
        others = eqx.tree_at(
            lambda s: s.save_state, cotangents.final, None, is_leaf=is_none
        )
        okay = carry.okay
        for x in jtu.tree_leaves(others):
            okay = eqx.error_if(okay, jnp.any(x != 0), _ONLY_SAVED)
        if self.throw:
            okay = eqx.error_if(
                okay, is_successful(outputs.final.result) & ~okay, _FAILED
            )
        breaks, _ = problem.breaks()
        missed = Resolution(
            *missing(outputs.reached, carry.seen, carry.sizes),
            *(breaks[0], breaks[-1], jnp.array(False)),
        )
        matters = carry.okay & (largest(carry.adjoint_sizes) > 0)
        missed = eqx.tree_at(lambda r: r.loss, missed, replace_fn=matters.__mul__)
        direction = problem.parameters.model.parts[0].direction
        resolution = eqx.tree_at(
            lambda r: (r.start, r.end),
            worse(carry.resolution, missed),
            replace_fn=lambda t: t * direction,
        )
        trusted = check(
            resolution,
            problem.nodes,
            self.quadrature or 0,
            self.rtol,
            self.on_unresolved,
        )
        return adjoint, trusted & okay


def _gauss(n, start, end):
    """Points and weights in an interval."""
    points, weights = gauss_legendre(n)
    half, middle = (end - start) / 2, (start + end) / 2
    cast = lambda x: jnp.asarray(x, start.dtype)
    return jnp.clip(middle + half * cast(points), start, end), half * cast(weights)


def _saved_cotangent(problem: Problem, cotangents, index):
    """The cotangent of what is saved at the time `index` of `Problem.breaks`."""
    total = jtu.tree_map(jnp.zeros_like, problem.y0)
    first = 0
    end = sum(problem.lengths) + len(problem.jumps)
    states = save_states(cotangents.final)
    for sub, length, save in zip(problem.subsaveats, problem.lengths, states):
        # Where it is in the buffer, and whether it is there.
        places = []
        if length > 0:
            here = (index >= first) & (index < first + length)
            place = jnp.clip(index - first, 0, length - 1) + sub.t0
            places.append((place, here))
        if sub.t1:
            places.append((-1, index == end))
        for place, here in places:
            total = jtu.tree_map(
                lambda a, x: a + jnp.where(here, x[place], 0), total, save.ys
            )
        first += length
    return total


def _pull_back_times(problem: Problem, trajectory, place, cotangents, total, batch):
    """Adds the cotangents of times: what is saved later moves on with the solution; a
    later start moves it back."""
    number, index = place
    saved, adjoint = cotangents
    start, end = trajectory.start, trajectory.end

    def rate(t, node, cotangent):
        y = jtu.tree_map(lambda x: x[node], trajectory.values)
        t = _inside(t, start, end)
        k = problem.parameters.model.vector_field(t, y)
        move = lambda t: jtu.tree_map(lambda k: t * k, k)
        _, vjp = jax.vjp(move, jnp.ones_like(t))
        return vjp(cotangent)[0]

    zero = jnp.zeros_like(end)
    increment = jtu.tree_map(jnp.zeros_like, total)
    if total.ts is not None or total.t1 is not None:
        found = rate(end, -1, saved)
        m = len(problem.parameters.times.ts)
        if total.ts is not None:
            ts = jnp.where(jnp.arange(m) == index, found, 0)
            increment = eqx.tree_at(lambda s: s.ts, increment, ts)
        if total.t1 is not None and problem.ends_at_t1:
            t1 = jnp.where(index == m + len(problem.jumps), found, 0)
            increment = eqx.tree_at(lambda s: s.t1, increment, t1)
    if total.t0 is not None:
        first = number == 0
        found = lax.cond(
            batch.any(first), lambda: rate(start, 0, adjoint), lambda: zero
        )
        t0 = jnp.where(first, -found, 0)
        increment = eqx.tree_at(lambda s: s.t0, increment, t0)
    return Batch(batch.names, batch.summed.times).accumulate(total, increment)
