"""Steps that move with the interval over which a solve is made."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, AbstractTerm, RESULTS
from jaxtyping import PyTree

from .._types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, VF, Y


@jax.custom_jvp
def follow(value, leader):
    """`value`, which is differentiated as if it were `leader`."""
    del leader
    return value


@follow.defjvp
def _(primals, tangents):
    value, leader = primals
    _, tangent = tangents
    return follow(value, leader), jnp.asarray(tangent, jnp.result_type(value))


def moving_node(
    node: RealScalarLike, t0: RealScalarLike, t1: RealScalarLike
) -> RealScalarLike:
    """`node`, which keeps its place relative to `t0` and `t1` when these move."""
    length = t1 - t0
    proper = jnp.isfinite(length) & (length != 0)
    place = jnp.where(proper, (node - t0) / jnp.where(proper, length, 1), 0)
    place = lax.stop_gradient(place)
    return follow(lax.stop_gradient(node), (1 - place) * t0 + place * t1)


class MovingSteps(AbstractStepSizeController[PyTree, Any]):
    """Wraps a step-size controller so that its steps are differentiated as if they kept
    their places relative to `t0` and `t1`; not in how it chose them."""

    controller: AbstractStepSizeController
    t0: RealScalarLike
    t1: RealScalarLike

    def wrap(self, direction: IntScalarLike) -> "MovingSteps":
        raise NotImplementedError("Only for use inside of an adjoint method.")

    def init(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        dt0: RealScalarLike | None,
        args: Args,
        func: Callable[[PyTree[AbstractTerm], RealScalarLike, Y, Args], VF],
        error_order: RealScalarLike | None,
    ) -> tuple[RealScalarLike, PyTree]:
        raise NotImplementedError("Only for use inside of an adjoint method.")

    def adapt_step_size(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        y1_candidate: Y,
        args: Args,
        y_error: Y | None,
        error_order: RealScalarLike,
        controller_state: PyTree,
    ) -> tuple[
        BoolScalarLike,
        RealScalarLike,
        RealScalarLike,
        BoolScalarLike,
        PyTree,
        RESULTS,
    ]:
        stopped = lax.stop_gradient((t0, t1, y0, y1_candidate))
        y_error = eqx.combine(
            lax.stop_gradient(eqx.filter(y_error, eqx.is_array)), y_error
        )
        keep_step, tprev, tnext, made_jump, controller_state, result = (
            self.controller.adapt_step_size(
                *stopped, args, y_error, error_order, controller_state
            )
        )
        tprev = moving_node(tprev, self.t0, self.t1)
        tnext = moving_node(tnext, self.t0, self.t1)
        return keep_step, tprev, tnext, made_jump, controller_state, result
