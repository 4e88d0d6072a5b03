"""Primitives whose rules are functions of pytrees, in which `None` is a zero."""

import functools as ft
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import (
    filter_primitive_batching,
    filter_primitive_def,
    filter_primitive_jvp,
    filter_primitive_transpose,
)


def new_primitive(
    name: str,
    impl: Callable,
    abstract_eval: Callable,
    batch: Callable,
    jvp: Callable,
    transpose: Callable | None = None,
) -> jex.Primitive:
    """A primitive for `filter_primitive_bind`. Its batching rule is called with the data
    of the axis, the operands, and which of their axes that is."""
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    flat_impl = filter_primitive_def(impl)
    flat_jvp = filter_primitive_jvp(jvp)

    def lower(ctx, *operands, **params):
        jaxpr = jax.make_jaxpr(ft.partial(flat_impl, **params))(*ctx.avals_in)
        refuse_ordered_effects(jaxpr)
        flat = mlir.lower_fun(jex.jaxpr_as_fun(jaxpr), multiple_results=True)
        return flat(ctx, *operands)

    def batch_rule(axis_data, operands, dims, **params):
        rule = filter_primitive_batching(lambda *inputs: batch(axis_data, *inputs))
        return rule(_as_arrays(operands), dims, **params)

    def jvp_rule(primals, tangents, **params):
        return flat_jvp(_as_arrays(primals), tangents, **params)

    primitive.def_impl(flat_impl)
    primitive.def_abstract_eval(filter_primitive_def(abstract_eval))
    mlir.register_lowering(primitive, lower)
    batching.fancy_primitive_batchers[primitive] = batch_rule
    ad.primitive_jvps[primitive] = jvp_rule
    if transpose is not None:
        flat_transpose = filter_primitive_transpose(transpose, materialise_zeros=True)

        def transpose_rule(cotangents, *operands, **params):
            return flat_transpose(cotangents, *_as_arrays(operands), **params)

        ad.primitive_transposes[primitive] = transpose_rule
    return primitive


def refuse_ordered_effects(jaxpr: jex.ClosedJaxpr) -> None:
    # JAX has a list of them, which is private.
    if any("Ordered" in type(effect).__name__ for effect in jaxpr.effects):
        raise NotImplementedError(
            "`diffeqsolve` with this adjoint method does not support ordered effects in "
            "the vector field, such as `jax.debug.print(..., ordered=True)` or "
            "`equinox.debug.backward_nan`. Use unordered ones, or "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )


def _as_arrays(operands) -> list:
    # JAX also has literals, which are not arrays.
    is_operand = lambda x: eqx.is_array(x) or ad.is_undefined_primal(x)
    return [x if is_operand(x) else jnp.asarray(x) for x in operands]


def filter_jvp(
    fn: Callable[..., PyTree], primals: Sequence[PyTree], tangents: Sequence[PyTree]
) -> tuple[PyTree, PyTree]:
    """`fn(*primals)`, and the tangents of its floating-point arrays: of all of them, also
    of those that do not depend on what is perturbed."""
    tangents = eqx.filter(tuple(tangents), eqx.is_inexact_array)
    is_perturbed = jtu.tree_map(
        lambda t: t is not None, tangents, is_leaf=lambda t: t is None
    )
    perturbed, rest = eqx.partition(tuple(primals), is_perturbed)

    def evaluate(perturbed):
        out = fn(*eqx.combine(perturbed, rest))
        return eqx.filter(out, eqx.is_inexact_array), out

    _, tangent_out, out = jax.jvp(evaluate, (perturbed,), (tangents,), has_aux=True)
    return out, tangent_out


def has_leaves(tree: PyTree) -> bool:
    return len(jtu.tree_leaves(tree)) > 0
