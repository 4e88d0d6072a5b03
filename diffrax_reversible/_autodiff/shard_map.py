"""Solves inside of `jax.shard_map(..., check_vma=True)`.

There the type of an array says along which axes of the device mesh it varies, and the
carry of a loop has to keep its type. The loops of diffrax begin with zeros, which vary
along no axis, and so do not type-check. Here the arrays are made to vary along every
axis that any of them varies along, these axes are taken out of their types for as long
as diffrax runs, and put back at the end.
"""

import functools as ft
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import no_varying_types, varying_axes, with_varying_axes


def _identity(x, **params):
    del params
    return x


def _linear_primitive(name: str, abstract_eval, transpose) -> jex.Primitive:
    """An identity on arrays, that changes types."""
    primitive = jex.Primitive(name)
    primitive.def_impl(_identity)
    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(_identity, multiple_results=False))
    ad.deflinear2(primitive, transpose)
    batching.defvectorized(primitive)
    return primitive


def _forget_transpose(cotangent, x, *, axes):
    # What does not vary collects from everywhere.
    same = tuple(axis for axis in axes if axis not in varying_axes(x.aval))
    cotangent = _remember.bind(cotangent, axes=axes)
    return [lax.psum(cotangent, same) if same else cotangent]


def _remember_transpose(cotangent, x, *, axes):
    del x
    return [_forget.bind(cotangent, axes=axes)]


_forget = _linear_primitive(
    "forget_varying_axes",
    lambda x, *, axes: with_varying_axes(x, ()),
    _forget_transpose,
)
_remember = _linear_primitive(
    "remember_varying_axes",
    lambda x, *, axes: with_varying_axes(x, axes),
    _remember_transpose,
)


def _ordered(axes: frozenset[Hashable]) -> tuple[Hashable, ...]:
    # The same on every host.
    return tuple(sorted(axes, key=str))


def _map_arrays(fn, tree):
    return jtu.tree_map(lambda x: fn(x) if eqx.is_array(x) else x, tree)


def without_varying_axes(
    solve: Callable[..., PyTree],
    raised: Callable[[PyTree], PyTree],
    options: dict[str, Any],
) -> PyTree:
    """`solve(forget, **options)`, with types that say nothing of varying axes.

    What `solve` comes across that is not in `options`, such as what a vector field closes
    over, it has to pass through `forget`.

    `raised(outputs)` raises, at run time, what would otherwise be raised where types say
    which axes vary, and equinox's errors do not type-check.
    """
    arrays = [x for x in jtu.tree_leaves(options) if eqx.is_array(x)]
    axes = frozenset().union(*[varying_axes(jax.typeof(x)) for x in arrays])

    def forget_one(x):
        more = varying_axes(jax.typeof(x)) - axes
        if len(more) > 0:
            raise NotImplementedError(
                "Inside of `jax.shard_map(..., check_vma=True)` a vector field, or another "
                "function given to `diffeqsolve(...)`, closes over an array that varies "
                f"along {_ordered(more)}, and neither the state nor `args` do. Pass it as "
                "part of `args`, or use `check_vma=False`."
            )
        return _forget.bind(x, axes=_ordered(axes)) if axes else x

    def remember(x):
        # A constant is the same everywhere.
        traced = isinstance(x, jax.core.Tracer)
        return _remember.bind(x, axes=_ordered(axes)) if traced else x

    forget = ft.partial(_map_arrays, forget_one)
    if len(axes) == 0:
        with no_varying_types():
            return solve(forget, **options)
    options = forget(options)
    with no_varying_types():
        outputs = solve(forget, **options)
        if options["throw"]:
            outputs = raised(outputs)
    return _map_arrays(remember, outputs)
