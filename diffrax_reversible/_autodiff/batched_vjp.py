"""A vector-Jacobian product of a batch whose elements share parameters.

Summing the cotangents of the elements leaves it to the compiler to find out that a sum of
outer products is a matrix product, which XLA does not do for every dtype and device. So
here the vector-Jacobian product is taken of the vmapped function, and JAX itself writes
the matrix product. That takes a primitive, to know about the vmap.
"""

import functools as ft
from collections.abc import Callable, Hashable

import jax
import jax.core
import jax.extend.core as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._compat import no_varying_types, with_leading_axes
from .vmaps import axes, new_level, to_front, vmapped


shared_vjp_p = jex.Primitive("shared_vjp")
shared_vjp_p.multiple_results = True


class _Static:
    """What the primitive needs besides arrays; compared by identity.

    - `names`: of the axes over which the cotangents of parameters that do not carry them
        are to be summed.
    - `sizes`: how many operands are constants, the point, parameters, cotangents.
    """

    def __init__(self, jaxpr, names: tuple[Hashable, ...], sizes: tuple[int, ...]):
        self.jaxpr = jaxpr
        self.names = names
        self.sizes = sizes

    def split(self, operands) -> list[list]:
        ends = np.cumsum((0, *self.sizes))
        return [list(operands[i:j]) for i, j in zip(ends, ends[1:])]


def _vjp(*operands, static, levels):
    """The outputs, and the cotangents of the point and of the parameters."""
    consts, point, parameters, cotangents = static.split(operands)
    n, m = len(consts), len(point)

    def call(*inputs):
        return jax.core.eval_jaxpr(static.jaxpr, inputs[:n], *inputs[n:])

    in_axes = lambda level: axes(level.mapped)
    batched = vmapped(call, levels, in_axes, lambda _: 0)
    with no_varying_types():
        outputs, vjp = jax.vjp(lambda *x: batched(*consts, *x), *point, *parameters)
        found = vjp(cotangents)
    return [*outputs, *found[:m], *found[m:]]


shared_vjp_p.def_impl(_vjp)
mlir.register_lowering(shared_vjp_p, mlir.lower_fun(_vjp, multiple_results=True))


@shared_vjp_p.def_abstract_eval
def _(*operands, static, levels):
    del levels
    _, point, parameters, cotangents = static.split(operands)
    return [with_leading_axes(a, ()) for a in (*cotangents, *point, *parameters)]


def _batch(axis_data, operands, dims, *, static, levels):
    if axis_data.name not in static.names:
        # Somebody else's: each element has a gradient of its own.
        named = type(axis_data.name) is not object
        fn = jax.vmap(
            ft.partial(_vjp, static=static, levels=levels),
            in_axes=tuple(dims),
            axis_size=axis_data.size,
            axis_name=axis_data.name if named else None,
            spmd_axis_name=axis_data.spmd_name,
        )
        outputs = fn(*operands)
        return outputs, [0] * len(outputs)
    operands = [to_front(x, dim) for x, dim in zip(operands, dims)]
    flags = [dim is not None for dim in dims]
    consts, point, parameters, cotangents = static.split(flags)
    # All but constants and parameters is different for every element.
    flags = [*consts, *[True] * len(point), *parameters, *[True] * len(cotangents)]
    operands = [
        jnp.broadcast_to(x, (axis_data.size, *jnp.shape(x)))
        if flag and dim is None
        else x
        for x, dim, flag in zip(operands, dims, flags)
    ]
    mapped = flags[: len(flags) - len(cotangents)]
    level = new_level(axis_data, mapped)
    outputs = shared_vjp_p.bind(*operands, static=static, levels=(*levels, level))
    out_dims = [0] * (len(cotangents) + len(point)) + list(axes(parameters))
    return outputs, out_dims


batching.fancy_primitive_batchers[shared_vjp_p] = _batch


def _jvp(primals, tangents, *, static, levels):
    def instantiate(primal, tangent):
        if type(tangent) is not ad.Zero:
            return tangent
        if jnp.issubdtype(primal.dtype, jnp.inexact):
            return jnp.zeros_like(primal)
        return np.zeros(primal.shape, jax.dtypes.float0)

    fn = ft.partial(_vjp, static=static, levels=levels)
    return jax.jvp(
        fn, list(primals), [instantiate(p, t) for p, t in zip(primals, tangents)]
    )


ad.primitive_jvps[shared_vjp_p] = _jvp


def shared_vjp(
    fn: Callable[[PyTree, PyTree], PyTree],
    point: PyTree,
    parameters: PyTree,
    cotangent: PyTree,
    names: tuple[Hashable, ...],
) -> tuple[PyTree, PyTree, PyTree]:
    """`fn(point, parameters)`, and the cotangents of both, of which those of parameters
    are summed over the axes `names` that they do not carry."""
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(point, parameters)
    trees = (shapes, point, parameters)
    groups = [jaxpr.consts, *map(jtu.tree_leaves, (point, parameters, cotangent))]
    static = _Static(jaxpr.jaxpr, names, tuple(map(len, groups)))
    operands = [x for group in groups for x in group]
    found = iter(shared_vjp_p.bind(*operands, static=static, levels=()))
    return tuple(jtu.tree_map(lambda _: next(found), tree) for tree in trees)
