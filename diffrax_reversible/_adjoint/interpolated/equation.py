"""The adjoint equation of `InterpolatedAdjoint`, in which the solution is interpolated."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    diffeqsolve,
    ForwardMode,
    is_successful,
    MultiTerm,
    ODETerm,
    SaveAt,
    SubSaveAt,
)
from jaxtyping import Array, PyTree

from ..._autodiff.primitive import filter_jvp, has_leaves
from ..._compat import nextafter, prevbefore
from ..._loop.state import is_none
from ..._types import BoolScalarLike, RealScalarLike
from ..discrete.measures import norm
from .problem import InterpolatedProblem, Model, Trajectory


def inside(
    t: RealScalarLike, start: RealScalarLike, end: RealScalarLike
) -> RealScalarLike:
    """`t`, not where the vector field jumps."""
    clipped = jnp.clip(t, nextafter(start), prevbefore(end))
    return t + lax.stop_gradient(jnp.where(end > start, clipped - t, 0))


def _linear(fn: Callable[[PyTree, PyTree], tuple[PyTree, Array]]) -> Callable:
    """`fn(x, rest) -> y, okay`, of which `y` is linear in `x`. Its derivative in `x` is
    the function itself: a solve whose steps are chosen for the tangent."""

    @eqx.filter_custom_jvp
    def linear(x, rest):
        return fn(x, rest)

    @linear.def_jvp
    def _(primals, tangents):
        (x, rest), (tangent_x, tangent_rest) = primals, tangents
        (y, okay), (tangent, _) = filter_jvp(
            lambda rest: fn(x, rest), (rest,), (tangent_rest,)
        )
        if has_leaves(tangent_x):
            zeros = lambda x, t: jnp.zeros_like(x) if t is None else t
            tangent_x = jtu.tree_map(zeros, x, tangent_x, is_leaf=is_none)
            more, more_okay = linear(tangent_x, rest)
            more = jtu.tree_map(lambda x: jnp.where(more_okay, x, jnp.nan), more)
            tangent = jtu.tree_map(jnp.add, tangent, more)
        return (y, okay), (tangent, None)

    return linear


class _AdjointField(eqx.Module):
    """The right hand side of the adjoint equation, for one of the terms.

    - `rest`: of the model; what is not among the parameters that it is called with.
    """

    trajectory: Trajectory
    rest: Model
    index: int = eqx.field(static=True)

    def __call__(self, t, adjoint, parameters):
        t_inside = inside(t, self.trajectory.start, self.trajectory.end)

        def vector_field(y, parameters):
            model = eqx.combine(parameters, self.rest)
            return model.part(self.index, t_inside, y)

        _, vjp = jax.vjp(vector_field, self.trajectory(t), parameters)
        cotangent_y, _ = adjoint
        return jtu.tree_map(jnp.negative, vjp(cotangent_y))


def solve_adjoint_equation(
    problem: InterpolatedProblem,
    trajectory: Trajectory,
    adjoint: PyTree[Array],
    parameters: Model,
    ts: Array | None = None,
) -> tuple[PyTree[Array], Model, PyTree[Array], BoolScalarLike]:
    """The adjoint at the start of the trajectory, the cotangent of the parameters,
    the adjoint at `ts`, and whether this was successful."""

    def solve(adjoint, rest):
        problem, trajectory, parameters, ts = rest
        # Absolute tolerances know nothing of the size of a loss.
        size = lax.stop_gradient(norm(adjoint))
        size = jnp.where(size == 0, 1, size)
        model = problem.parameters.model
        terms = [
            ODETerm(_AdjointField(trajectory, model, i))
            for i in range(len(model.parts))
        ]
        subs = {"start": SubSaveAt(t1=True)}
        if ts is not None:
            subs["inside"] = SubSaveAt(ts=ts, fn=lambda t, y, args: y[0])
        solution = diffeqsolve(
            MultiTerm(*terms) if isinstance(model.terms, MultiTerm) else terms[0],
            t0=trajectory.end,
            t1=trajectory.start,
            y0=(
                jtu.tree_map(lambda x: x / size.astype(x.dtype), adjoint),
                jtu.tree_map(jnp.zeros_like, parameters),
            ),
            args=parameters,
            saveat=SaveAt(subs=subs),
            adjoint=ForwardMode(),
            throw=False,
            **problem.backward,
        )
        okay = is_successful(solution.result)
        known = lambda x: jnp.where(okay, size.astype(x.dtype) * x, 0)
        return jtu.tree_map(known, solution.ys), okay

    ys, okay = _linear(solve)(adjoint, (problem, trajectory, parameters, ts))
    new, increment = jtu.tree_map(lambda x: x[0], ys["start"])
    return new, increment, ys.get("inside"), okay
