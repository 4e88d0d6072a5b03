"""The vector-Jacobian product of a batch whose elements share parameters.

To sum the cotangents of the elements leaves it to the compiler to find out that a sum of
outer products is a matrix product, which XLA does not do for every dtype and device. So
here the vector-Jacobian product is taken of the vmapped function, and JAX itself writes
the matrix product. That takes a primitive, to know about the vmap.
"""

import dataclasses
import functools as ft
from collections.abc import Hashable

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import filter_primitive_bind, no_varying_types, with_leading_axes
from .primitive import filter_jvp, new_primitive
from .vmaps import is_named, new_axis, sizes, vmapped, with_axis


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A traced function of which the vector-Jacobian product is taken.

    - `names`: of the axes over which the cotangents of the parameters that do not carry
        them are summed.
    - `point`, `parameters`: which inputs are differentiated: with a cotangent for each
        element, or with one for all.
    """

    jaxpr: jex.Jaxpr
    names: tuple[Hashable, ...]
    point: tuple[bool, ...]
    parameters: tuple[bool, ...]

    def __call__(self, inputs: list) -> list:
        n = len(self.jaxpr.constvars)
        outputs = jax.core.eval_jaxpr(self.jaxpr, inputs[:n], *inputs[n:])
        # Some may be literals.
        return list(map(jnp.asarray, outputs))

    @property
    def differentiated(self) -> list[bool]:
        return [x or p for x, p in zip(self.point, self.parameters)]


def vjp(function: Function, axes, inputs, cotangents):
    """The outputs, and the cotangents of the inputs; of outputs without a cotangent that
    is `None`, as it is in the end for inputs that are not differentiated."""
    in_axes = lambda axis: (axis.in_axes,)
    batched = vmapped(function, axes, in_axes, lambda _: 0)
    perturbed, rest = eqx.partition(inputs, function.differentiated)

    def evaluate(perturbed):
        outputs = batched(eqx.combine(perturbed, rest))
        return [x for x, ct in zip(outputs, cotangents) if ct is not None], outputs

    with no_varying_types():
        _, pull_back, outputs = jax.vjp(evaluate, perturbed, has_aux=True)
        (found,) = pull_back([ct for ct in cotangents if ct is not None])
    return outputs, found


def _abstract_eval(function, axes, inputs, cotangents):
    del cotangents
    leading = sizes(axes)
    outputs = [with_leading_axes(v.aval, leading) for v in function.jaxpr.outvars]
    perturbed = eqx.filter(inputs, function.differentiated)
    return outputs, jtu.tree_map(lambda x: with_leading_axes(x, ()), perturbed)


def _batch(axis_data, operands, dims):
    function, axes, inputs, cotangents = operands
    *_, inputs_dims, cotangents_dims = dims
    if axis_data.name not in function.names:
        # Somebody else's: each element has a gradient of its own.
        batched = jax.vmap(
            ft.partial(vjp, function, axes),
            in_axes=(inputs_dims, cotangents_dims),
            axis_size=axis_data.size,
            axis_name=axis_data.name if is_named(axis_data) else None,
            spmd_axis_name=axis_data.spmd_name,
        )
        out = batched(inputs, cotangents)
        return out, jtu.tree_map(lambda _: 0, out)
    mapped = [x or dim is not None for x, dim in zip(function.point, inputs_dims)]
    put = ft.partial(with_axis, axis_data)
    inputs = list(map(put, mapped, inputs, inputs_dims))
    cotangents = [put(True, ct, dim) for ct, dim in zip(cotangents, cotangents_dims)]
    axis = new_axis(axis_data, mapped)
    out = filter_primitive_bind(
        shared_vjp_p, function, (*axes, axis), inputs, cotangents
    )
    found_dims = eqx.filter(axis.in_axes, function.differentiated)
    return out, ([0] * len(out[0]), found_dims)


def _jvp(primals, tangents):
    function, axes, *arrays = primals
    return filter_jvp(ft.partial(vjp, function, axes), arrays, tangents[2:])


shared_vjp_p = new_primitive("shared_vjp", vjp, _abstract_eval, _batch, _jvp)
