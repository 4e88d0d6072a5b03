"""A differentiation rule that knows its batch: a function with a reverse sweep.

`with_reverse_sweep` evaluates a function whose cotangents are found by a loop that
walks from its outputs back to its inputs. It knows nothing of differential equations.

Two primitives. `reversible_solve` is the function; its jvp rule binds it and
`reversible_tangent`, which is linear in the tangents. Transposing that is the reverse
sweep; evaluating it, in forward mode, is `jax.jvp` of the function.

Each `jax.vmap` appends one `Level` to both: which inputs carry its axis. That is what
ordinary batching forgets. The sweep of a batched function is *one* unbatched loop over
a vmapped body, in which the cotangent of a parameter is summed over the axes that the
parameter does not carry: so it never grows those axes, and outer products become matrix
products.

Inside of `jax.shard_map` no array that comes here has a type that tells along which axes
of the mesh it varies (`varying.py`), and none is given one.
"""

import functools as ft

import jax
import jax.core
import jax.extend.core as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import no_varying_types, with_leading_axes
from .mesh import Devices
from .refuse import refuse_derivative
from .sweep import AbstractSweep, Inputs
from .transpose import transpose
from .vmaps import axes, new_level, to_front, unmapped, vmapped


class _Static:
    """What the primitives need besides arrays; compared by identity."""

    def __init__(self, sweep: AbstractSweep, inputs: Inputs):
        leaves, self.inputs_tree = jtu.tree_flatten(inputs)
        self.sweep = sweep
        indices = jtu.tree_unflatten(self.inputs_tree, range(len(leaves)))
        self.state = jtu.tree_leaves(indices.state)
        self.parameters = jtu.tree_leaves(indices.parameters)
        self.differentiable = sorted(self.state + self.parameters)
        self.state_tree = jtu.tree_structure(inputs.state)
        self.parameters_tree = jtu.tree_structure(inputs.parameters)

        jaxpr, shapes = jax.make_jaxpr(sweep.evaluate, return_shape=True)(inputs)
        self.jaxpr = jaxpr.jaxpr
        self.outputs_tree = jtu.tree_structure(shapes)
        self.outputs_avals = jaxpr.out_avals
        self.outputs_float = [_is_float(a) for a in jaxpr.out_avals]
        # What the function closes over becomes an input, so that it, too, is batched.
        self.captured = refuse_derivative(jaxpr.consts, sweep.refusal)
        self.num_inputs = len(leaves) + len(self.captured)

        def call(*operands):
            inputs, consts = operands[: len(leaves)], operands[len(leaves) :]
            return jax.core.eval_jaxpr(jaxpr.jaxpr, consts, *inputs)

        self.call = call


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _evaluate(*leaves, static, levels):
    in_axes = lambda level: axes(level.mapped)
    with no_varying_types():
        return vmapped(static.call, levels, in_axes, lambda _: 0)(*leaves)


def _outputs_avals(static, levels):
    sizes = tuple(level.size for level in reversed(levels))
    return [with_leading_axes(a, sizes) for a in static.outputs_avals]


#
# reversible_solve: inputs -> outputs
#

reversible_solve = jex.Primitive("reversible_solve")
reversible_solve.multiple_results = True
reversible_solve.def_impl(_evaluate)
mlir.register_lowering(
    reversible_solve, mlir.lower_fun(_evaluate, multiple_results=True)
)


@reversible_solve.def_abstract_eval
def _(*leaves, static, levels):
    del leaves
    return _outputs_avals(static, levels)


def _solve_batch(axis_data, leaves, dims, *, static, levels):
    if unmapped(axis_data, dims):
        outputs = reversible_solve.bind(*leaves, static=static, levels=levels)
        return outputs, [None] * len(outputs)
    leaves = [to_front(x, dim) for x, dim in zip(leaves, dims)]
    level = new_level(axis_data, [dim is not None for dim in dims])
    outputs = reversible_solve.bind(*leaves, static=static, levels=(*levels, level))
    return outputs, [0] * len(outputs)


batching.fancy_primitive_batchers[reversible_solve] = _solve_batch


def _solve_jvp(primals, tangents, *, static, levels):
    outputs = reversible_solve.bind(*primals, static=static, levels=levels)
    perturbed = tuple(
        i for i in static.differentiable if type(tangents[i]) is not ad.Zero
    )
    zeros = [
        ad.Zero(jax.core.ShapedArray(x.shape, x.dtype if f else jax.dtypes.float0))
        for x, f in zip(outputs, static.outputs_float)
    ]
    if len(perturbed) == 0:
        return outputs, zeros
    tangents_out = iter(
        reversible_tangent.bind(
            *primals,
            *outputs,
            *[tangents[i] for i in perturbed],
            static=static,
            levels=levels,
            perturbed=perturbed,
        )
    )
    return outputs, [
        next(tangents_out) if f else zero
        for zero, f in zip(zeros, static.outputs_float)
    ]


ad.primitive_jvps[reversible_solve] = _solve_jvp


#
# reversible_tangent: inputs, outputs, tangents of the perturbed inputs
#                     -> tangents of the floating-point outputs
#

reversible_tangent = jex.Primitive("reversible_tangent")
reversible_tangent.multiple_results = True


def _split(operands, static, perturbed):
    n, m = static.num_inputs, len(operands) - len(perturbed)
    return list(operands[:n]), list(operands[n:m]), list(operands[m:])


def _tangent(*operands, static, levels, perturbed):
    inputs, _, tangents = _split(operands, static, perturbed)

    def evaluate(*values):
        leaves = list(inputs)
        for i, value in zip(perturbed, values):
            leaves[i] = value
        outputs = _evaluate(*leaves, static=static, levels=levels)
        return [x for x, f in zip(outputs, static.outputs_float) if f]

    with no_varying_types():
        _, tangents_out = jax.jvp(evaluate, [inputs[i] for i in perturbed], tangents)
    return tangents_out


reversible_tangent.def_impl(_tangent)
mlir.register_lowering(
    reversible_tangent, mlir.lower_fun(_tangent, multiple_results=True)
)


@reversible_tangent.def_abstract_eval
def _(*operands, static, levels, perturbed):
    del operands, perturbed
    avals = _outputs_avals(static, levels)
    return [a for a, f in zip(avals, static.outputs_float) if f]


def _tangent_batch(axis_data, operands, dims, *, static, levels, perturbed):
    params = dict(static=static, perturbed=perturbed)
    if unmapped(axis_data, dims):
        outputs = reversible_tangent.bind(*operands, **params, levels=levels)
        return outputs, [None] * len(outputs)
    operands = [to_front(x, dim) for x, dim in zip(operands, dims)]
    inputs, outputs, tangents = _split(operands, static, perturbed)
    flags, outputs_flags, tangents_flags = _split(
        [dim is not None for dim in dims], static, perturbed
    )

    def carry(x, flag):
        return x if flag else jnp.broadcast_to(x, (axis_data.size, *jnp.shape(x)))

    # An input and its tangent carry the axis together, and all outputs carry it.
    for k, i in enumerate(perturbed):
        if flags[i] or tangents_flags[k]:
            inputs[i] = carry(inputs[i], flags[i])
            tangents[k] = carry(tangents[k], tangents_flags[k])
            flags[i] = True
    outputs = [carry(x, flag) for x, flag in zip(outputs, outputs_flags)]
    tangents_out = reversible_tangent.bind(
        *inputs,
        *outputs,
        *tangents,
        **params,
        levels=(*levels, new_level(axis_data, flags)),
    )
    return tangents_out, [0] * len(tangents_out)


batching.fancy_primitive_batchers[reversible_tangent] = _tangent_batch


def _tangent_jvp(primals, tangents, *, static, levels, perturbed):
    def instantiate(primal, tangent):
        if type(tangent) is not ad.Zero:
            return tangent
        if _is_float(primal):
            return jnp.zeros_like(primal)
        return np.zeros(primal.shape, jax.dtypes.float0)

    fn = ft.partial(_tangent, static=static, levels=levels, perturbed=perturbed)
    tangents = [instantiate(p, t) for p, t in zip(primals, tangents)]
    with no_varying_types():
        return jax.jvp(fn, primals, tangents)


ad.primitive_jvps[reversible_tangent] = _tangent_jvp


def _tangent_transpose(cotangents, *operands, static, levels, perturbed):
    inputs, outputs, tangents = _split(operands, static, perturbed)
    cotangents = iter(cotangents)
    instantiated = [
        ad.instantiate_zeros(next(cotangents)) if f else None
        for f in static.outputs_float
    ]
    shared = [i for i in static.parameters if i in perturbed]
    devices = Devices(levels, shared, [*inputs, *outputs])
    inputs = [devices.spread(x, i) for i, x in enumerate(inputs)]
    outputs = [devices.spread(x) for x in outputs]
    instantiated = [None if x is None else devices.spread(x) for x in instantiated]
    with no_varying_types():
        result = transpose(
            inputs, outputs, instantiated, static, devices.levels, perturbed
        )
    result = [devices.collect(x, i) for x, i in zip(result, perturbed)]
    unknown = [ad.is_undefined_primal(t) for t in tangents]
    nones = [None] * (len(operands) - len(perturbed))
    return nones + [ct if u else None for ct, u in zip(result, unknown)]


ad.primitive_transposes[reversible_tangent] = _tangent_transpose


def with_reverse_sweep(sweep: AbstractSweep, inputs: Inputs) -> PyTree[Array]:
    """`sweep.evaluate(inputs)`, differentiated by the sweep.

    Reverse mode, forward mode, and forward mode of either; `jax.vmap` in every order
    with them.
    """
    static = _Static(sweep, inputs)
    operands = [*jtu.tree_leaves(inputs), *static.captured]
    outputs = reversible_solve.bind(*operands, static=static, levels=())
    return jtu.tree_unflatten(static.outputs_tree, outputs)
