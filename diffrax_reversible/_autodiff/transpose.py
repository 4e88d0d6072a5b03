"""The transpose of a function with a reverse sweep: the sweep itself."""

import functools as ft

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._compat import nondifferentiable_backward
from .batch import Batch
from .sweep import Inputs, Residuals
from .vmaps import vmapped


def transpose(
    sweep, inputs_tree, trees, axes, given, result, cotangents, perturbed
) -> list[Array | None]:
    """The cotangents of the perturbed inputs.

    - `inputs_tree`, `trees`: the structures of the inputs; of the outputs and the memory.
    - `given`, `result`, `cotangents`: the leaves of the inputs, with further ones behind
        them; of outputs and memory; of the cotangents of the outputs.
    """
    given = _without_masked(axes, given, cotangents)
    operands = given, *result, cotangents
    n = inputs_tree.num_leaves
    # In the structure of the inputs, where each of them is in `given`.
    where: Inputs = jtu.tree_unflatten(inputs_tree, range(n))

    def unpack(given, outputs, memory, cotangents):
        inputs = jtu.tree_unflatten(inputs_tree, given[:n])
        outputs_tree, memory_tree = trees
        outputs = jtu.tree_unflatten(outputs_tree, outputs)
        memory = jtu.tree_unflatten(memory_tree, memory)
        cotangents = jtu.tree_unflatten(outputs_tree, cotangents)
        return Residuals(inputs, outputs, memory), cotangents

    def for_parameters(fn):
        """A pytree like the parameters, with `None` for those not perturbed."""
        return jtu.tree_map(lambda i: fn(i) if perturbed[i] else None, where.parameters)

    def summed(i):
        return tuple(axis.name for axis in axes if not axis.mapped[i])

    batch = Batch(tuple(axis.name for axis in axes), for_parameters(summed))

    def start(*operands):
        carry = sweep.start(*unpack(*operands), batch)
        return carry, sweep.length(carry)

    def step(carry, total, *operands):
        return sweep.step(*unpack(*operands), carry, total, batch)

    def finish(carry, *operands):
        return sweep.finish(*unpack(*operands), carry)

    in_axes = lambda axis: (axis.in_axes, 0, 0, 0)
    totals_axes = lambda axis: for_parameters(lambda i: axis.in_axes[i])
    start = vmapped(start, axes, in_axes, lambda _: 0)
    step = vmapped(
        step,
        axes,
        lambda axis: (0, totals_axes(axis), *in_axes(axis)),
        lambda axis: (0, totals_axes(axis)),
    )
    finish = vmapped(finish, axes, lambda axis: (0, *in_axes(axis)), lambda _: 0)

    carry, length = start(*operands)

    def body(loop):
        remaining, carry, total = loop
        return remaining - 1, *step(carry, total, *operands)

    # The largest number of steps of any element, found once: to look at all of them
    # before each step would make devices that have some each wait for one another.
    total = for_parameters(lambda i: jnp.zeros_like(given[i]))
    loop = (jnp.max(jnp.asarray(length)), carry, total)
    _, carry, total = lax.while_loop(lambda loop: loop[0] > 0, body, loop)
    state, doubt = finish(carry, *operands)
    found: list[Array | None] = [None] * len(given)

    def collect(i, cotangent, is_total):
        """The cotangent of an input: it collects from all elements along each axis that
        it does not carry."""
        if not perturbed[i]:
            return
        all_doubts = jnp.asarray(doubt)
        for k, axis in zip(reversed(range(len(axes))), axes):
            if not axis.mapped[i]:
                all_doubts = jnp.sum(all_doubts, k)
                cotangent = cotangent if is_total else jnp.sum(cotangent, k)
        shape = all_doubts.shape + (1,) * (cotangent.ndim - all_doubts.ndim)
        found[i] = cotangent + all_doubts.reshape(shape).astype(cotangent.dtype)

    jtu.tree_map(lambda i, ct: collect(i, ct, False), where.state, state)
    jtu.tree_map(lambda i, ct: collect(i, ct, True), where.parameters, total)
    return nondifferentiable_backward(found, msg=sweep.refusal_twice)


def _without_masked(axes, given, cotangents):
    """The inputs, without what is not finite in elements of the batch whose cotangents
    are all zero: these add zero to the cotangents of inputs that they share with others,
    and zero times NaN would not be zero."""
    if len(axes) == 0:
        return given
    ndim = len(axes)
    zeros = [
        jnp.all(ct == 0, axis=tuple(range(ndim, ct.ndim)))
        for ct in jtu.tree_leaves(cotangents)
    ]
    masked = ft.reduce(jnp.logical_and, zeros, jnp.array(True))

    def one(i, x):
        shared = [
            k for k, axis in zip(reversed(range(ndim)), axes) if not axis.mapped[i]
        ]
        if len(shared) == ndim or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        drop = jnp.all(masked, axis=tuple(shared))
        drop = jnp.expand_dims(drop, range(drop.ndim, x.ndim)) & ~jnp.isfinite(x)
        return jnp.where(drop, jnp.ones_like(x), x)

    return [one(i, x) for i, x in enumerate(given)]
