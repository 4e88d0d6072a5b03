"""Steps that move with the interval over which a solve is made."""

import jax
import jax.lax as lax
import jax.numpy as jnp

from .._types import RealScalarLike


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
    # A row of a record that is not filled is infinite.
    proper = jnp.isfinite(length) & (length != 0) & jnp.isfinite(node)
    place = jnp.where(proper, (node - t0) / jnp.where(proper, length, 1), 0)
    place = lax.stop_gradient(place)
    return follow(lax.stop_gradient(node), (1 - place) * t0 + place * t1)
