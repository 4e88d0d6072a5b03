"""A differentiation rule that knows its batch: a function with a reverse sweep.

`with_reverse_sweep` evaluates a function whose cotangents are found by a loop from its
outputs back to its inputs. It knows nothing of differential equations.

Two primitives. `swept` is the function; its jvp rule binds the function with memory and
`swept_tangent`, which is linear in the tangents. Transposing that is the reverse sweep;
evaluating it, in forward mode, is `jax.jvp` of the function.

Which inputs are perturbed is known where the memory is made, so that nothing need be kept
for others.

Each `jax.vmap` appends one `VmappedAxis` to both: which inputs carry its axis. That is
what ordinary batching forgets. The sweep of a batched function is *one* unbatched loop
over a vmapped body, in which the cotangent of a parameter is summed over the axes that
the parameter does not carry: so it never grows those axes, and outer products become
matrix products.

Inside of `jax.shard_map` no array that comes here has a type that tells along which axes
of the mesh it varies (`shard_map.py`), and none is given one.
"""

import functools as ft
from typing import TypeAlias

import equinox as eqx
import jax
import jax.core
import jax.interpreters.ad as ad
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import (
    filter_primitive_bind,
    no_varying_types,
    nondifferentiable,
    nondifferentiable_backward,
    with_leading_axes,
)
from .mesh import Devices
from .primitive import filter_jvp, has_leaves, new_primitive, refuse_ordered_effects
from .sweep import AbstractSweep, Inputs
from .transpose import transpose
from .vmaps import is_named, new_axis, sizes, vmapped, with_axis


# Which of `_Function.given` are perturbed, where there is a memory for them.
_Memory: TypeAlias = tuple[bool, ...] | None


class _Function:
    """The function of a sweep, with and without memory, of and to lists of arrays;
    compared by identity. Each is traced when it is first wanted.

    - `given`: the leaves of the inputs; behind them what the function closes over, so
        that this, too, is batched.
    """

    def __init__(self, sweep: AbstractSweep, inputs: Inputs):
        leaves, self.inputs_tree = jtu.tree_flatten(inputs)
        self.sweep = sweep
        self._avals = [jax.typeof(x) for x in leaves]
        self._traced = {}
        consts = self.trace(None)[0].consts
        self._captured = [x for x in consts if isinstance(x, jax.core.Tracer)]
        self.given = [*leaves, *nondifferentiable(self._captured, msg=sweep.refusal)]

    def trace(self, memory: _Memory):
        """The jaxpr, and the structures of the outputs and of the memory."""
        if memory not in self._traced:
            inputs = jtu.tree_unflatten(self.inputs_tree, self._avals)
            if memory is None:
                fn = lambda inputs: (self.sweep.evaluate(inputs), None)
            else:
                perturbed = memory[: self.inputs_tree.num_leaves]
                perturbed = jtu.tree_unflatten(self.inputs_tree, perturbed)
                fn = lambda inputs: self.sweep.evaluate_with_memory(inputs, perturbed)
            with no_varying_types():
                closed, shapes = jax.make_jaxpr(fn, return_shape=True)(inputs)
            refuse_ordered_effects(closed)
            self._traced[memory] = closed, tuple(map(jtu.tree_structure, shapes))
        return self._traced[memory]

    def split(self, memory: _Memory, leaves: list) -> tuple[list, list]:
        """The leaves of the outputs and those of the memory."""
        n = self.trace(memory)[1][0].num_leaves
        return leaves[:n], leaves[n:]

    def __call__(self, memory: _Memory, given: list) -> tuple[list, list]:
        closed, _ = self.trace(memory)
        n = self.inputs_tree.num_leaves
        # By then the trace of which these are tracers may have ended.
        captured = dict(zip(map(id, self._captured), given[n:]))
        consts = [captured.get(id(x), x) for x in closed.consts]
        outputs = jax.core.eval_jaxpr(closed.jaxpr, consts, *given[:n])
        # Some may be literals.
        return self.split(memory, list(map(jnp.asarray, outputs)))


def _none(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda _: None, tree)


def _bind_without_axis(primitive, axis_data, operands, dims):
    """Binds `primitive` for a `jax.vmap` that does not matter to it: no operand carries
    the axis, and nothing inside can refer to it."""
    if is_named(axis_data) or has_leaves(dims):
        return None
    out = filter_primitive_bind(primitive, *operands)
    return out, _none(out)


#
# swept: inputs -> outputs, memory
#


def _evaluate(function, memory, axes, given):
    in_axes = lambda axis: (axis.in_axes,)
    with no_varying_types():
        return vmapped(ft.partial(function, memory), axes, in_axes, lambda _: 0)(given)


def _evaluate_avals(function, memory, axes, given):
    del given
    avals = function.trace(memory)[0].out_avals
    return function.split(memory, [with_leading_axes(a, sizes(axes)) for a in avals])


def _evaluate_batch(axis_data, operands, dims):
    if (out := _bind_without_axis(swept_p, axis_data, operands, dims)) is not None:
        return out
    function, memory, axes, given = operands
    mapped = [dim is not None for dim in dims[-1]]
    given = list(map(ft.partial(with_axis, axis_data), mapped, given, dims[-1]))
    axes = (*axes, new_axis(axis_data, mapped))
    out = filter_primitive_bind(swept_p, function, memory, axes, given)
    return out, jtu.tree_map(lambda _: 0, out)


def _evaluate_jvp(primals, tangents):
    function, memory, axes, given = primals
    tangent = eqx.filter(tangents[-1], eqx.is_inexact_array)
    perturbed = tuple(t is not None for t in tangent)
    evaluated = filter_primitive_bind(
        swept_p, function, perturbed if memory is None else memory, axes, given
    )
    outputs, kept = evaluated
    if memory is None:
        out, kept_for = (outputs, []), perturbed
    else:
        out, kept_for = evaluated, memory
        if any(p and not m for p, m in zip(perturbed, memory)):
            # Nothing was kept for these.
            kept_for = perturbed
            evaluated = filter_primitive_bind(swept_p, function, kept_for, axes, given)
    tangent_out = filter_primitive_bind(
        swept_tangent_p, function, memory, kept_for, axes, given, evaluated, tangent
    )
    return out, tangent_out


swept_p = new_primitive(
    "swept", _evaluate, _evaluate_avals, _evaluate_batch, _evaluate_jvp
)


#
# swept_tangent: inputs, (outputs, memory), tangents of the perturbed inputs
#                -> tangents of floating-point outputs and memory
#
# The memory that goes in is `kept_for` the perturbed inputs; it need not be that of which
# the tangents come out.
#


def _tangent(function, memory, kept_for, axes, given, result, tangent):
    del kept_for, result
    evaluate = ft.partial(_evaluate, function, memory, axes)
    _, tangent_out = filter_jvp(evaluate, (given,), (tangent,))
    return tangent_out


def _tangent_avals(function, memory, kept_for, axes, given, result, tangent):
    del kept_for, result, tangent
    avals = _evaluate_avals(function, memory, axes, given)
    floating = lambda aval: aval if jnp.issubdtype(aval.dtype, jnp.inexact) else None
    return jtu.tree_map(floating, avals)


def _tangent_batch(axis_data, operands, dims):
    out = _bind_without_axis(swept_tangent_p, axis_data, operands, dims)
    if out is not None:
        return out
    function, memory, kept_for, axes, given, result, tangent = operands
    *_, given_dims, result_dims, tangent_dims = dims
    # An input and its tangent carry the axis together, and all outputs carry it.
    mapped = [any(d is not None for d in ds) for ds in zip(given_dims, tangent_dims)]
    put = ft.partial(with_axis, axis_data)
    given = list(map(put, mapped, given, given_dims))
    tangent = list(map(put, mapped, tangent, tangent_dims))
    result = jtu.tree_map(ft.partial(put, True), result, result_dims)
    axes = (*axes, new_axis(axis_data, mapped))
    operands = function, memory, kept_for, axes, given, result, tangent
    out = filter_primitive_bind(swept_tangent_p, *operands)
    return out, jtu.tree_map(lambda _: 0, out)


def _tangent_jvp(primals, tangents):
    function, memory, kept_for, axes, given, result, tangent = primals
    *_, tangent_given, _, tangent_tangent = tangents
    parts = []
    if has_leaves(tangent_tangent):
        part = filter_primitive_bind(swept_tangent_p, *primals[:-1], tangent_tangent)
        parts.append(part)
    if has_leaves(tangent_given):
        fn = lambda given: _tangent(
            function, memory, kept_for, axes, given, result, tangent
        )
        with no_varying_types():
            _, part = filter_jvp(fn, (given,), (tangent_given,))
        msg = function.sweep.refusal_twice
        parts.append(nondifferentiable_backward(part, msg=msg))
    out = filter_primitive_bind(swept_tangent_p, *primals)
    tangent_out = jtu.tree_map(lambda *x: sum(x[1:], x[0]), *parts)
    return out, tangent_out if parts else _none(out)


def _tangent_transpose(operands, cotangents):
    function, _, kept_for, axes, given, result, tangent = operands
    perturbed = [t is not None for t in tangent]
    outputs_cotangents, _ = cotangents
    tree = function.inputs_tree
    parameters = tree.unflatten(range(tree.num_leaves)).parameters
    shared = [i for i in jtu.tree_leaves(parameters) if perturbed[i]]
    devices = Devices(axes, shared, jtu.tree_leaves((given, result)))
    with no_varying_types():
        found = transpose(
            function.sweep,
            tree,
            function.trace(kept_for)[1],
            devices.axes,
            [devices.spread(x, i) for i, x in enumerate(given)],
            jtu.tree_map(devices.spread, result),
            jtu.tree_map(devices.spread, outputs_cotangents),
            perturbed,
        )
    found = [
        devices.collect(x, i) if ad.is_undefined_primal(t) else None
        for i, (x, t) in enumerate(zip(found, tangent))
    ]
    return (*_none(operands[:-1]), found)


swept_tangent_p = new_primitive(
    "swept_tangent",
    _tangent,
    _tangent_avals,
    _tangent_batch,
    _tangent_jvp,
    _tangent_transpose,
)


def with_reverse_sweep(sweep: AbstractSweep, inputs: Inputs) -> PyTree[Array]:
    """`sweep.evaluate(inputs)`, differentiated by the sweep.

    Reverse mode, forward mode any number of times, and forward mode of either; `jax.vmap`
    in every order with them.
    """
    function = _Function(sweep, inputs)
    outputs, _ = filter_primitive_bind(swept_p, function, None, (), function.given)
    return jtu.tree_unflatten(function.trace(None)[1][0], outputs)
