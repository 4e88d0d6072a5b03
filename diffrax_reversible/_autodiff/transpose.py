"""The transpose of a function with a reverse sweep: the sweep itself."""

from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import nondifferentiable_backward
from .sweep import Batch
from .vmaps import axes, vmapped


def transpose(inputs, outputs, cotangents, static, levels, perturbed):
    """The cotangents of the perturbed inputs."""
    sweep = static.sweep
    n, m = len(inputs), len(outputs)
    num_leaves = static.inputs_tree.num_leaves
    operands = [*inputs, *outputs, *[ct for ct in cotangents if ct is not None]]
    parameters = [i for i in static.parameters if i in perturbed]

    def in_axes(level, carried=0):
        rest = len(operands) - n
        return (*[0] * carried, *axes(level.mapped), *[0] * rest)

    def unpack(operands):
        given = iter(operands[n + m :])
        cts = [next(given) if f else None for f in static.outputs_float]
        return (
            jtu.tree_unflatten(static.inputs_tree, operands[:num_leaves]),
            jtu.tree_unflatten(static.outputs_tree, operands[n : n + m]),
            jtu.tree_unflatten(static.outputs_tree, cts),
        )

    def for_parameters(values):
        """A pytree like the parameters, with `None` for those not perturbed."""
        values = dict(zip(parameters, values))
        leaves = [values.get(i) for i in static.parameters]
        return jtu.tree_unflatten(static.parameters_tree, leaves)

    summed = [
        tuple(level.name for level in levels if not level.mapped[i]) for i in parameters
    ]
    batch = Batch(tuple(level.name for level in levels), for_parameters(summed))

    carry_tree: Any = None

    def start(*operands):
        nonlocal carry_tree
        leaves, carry_tree = jtu.tree_flatten(sweep.start(*unpack(operands)))
        return leaves

    def step(carry, totals, *operands):
        carry = jtu.tree_unflatten(carry_tree, carry)
        totals = for_parameters(totals)
        carry, totals = sweep.step(*unpack(operands), carry, totals, batch)
        return jtu.tree_leaves(carry), jtu.tree_leaves(totals)

    def totals_axes(level):
        return [0 if level.mapped[i] else None for i in parameters]

    carry = vmapped(start, levels, in_axes, lambda _: 0)(*operands)
    vmapped_step = vmapped(
        step,
        levels,
        lambda level: (0, totals_axes(level), *in_axes(level)),
        lambda level: (0, totals_axes(level)),
    )

    def walk(loop):
        remaining, carry, totals = loop
        return remaining - 1, *vmapped_step(carry, totals, *operands)

    # The longest way of any element, found once: looking at all of them before each step
    # would make devices that have some each wait for one another.
    length = jnp.max(sweep.length(jtu.tree_unflatten(carry_tree, carry)))
    totals = [jnp.zeros_like(inputs[i]) for i in parameters]
    loop = (length, carry, totals)
    _, carry, totals = lax.while_loop(lambda loop: loop[0] > 0, walk, loop)

    def finish(carry, *operands):
        carry = jtu.tree_unflatten(carry_tree, carry)
        state, trusted = sweep.finish(*unpack(operands), carry)
        return jtu.tree_leaves(state), trusted

    finish = vmapped(finish, levels, lambda level: (0, *in_axes(level)), lambda _: 0)
    state, trusted = finish(carry, *operands)
    found = dict(zip(static.state, state)) | dict(zip(parameters, totals))

    def collect(i):
        """The cotangent of an input: it collects from all elements along each axis that
        it does not carry, and is NaN if one of them is not to be trusted."""
        value, all_trusted = found[i], trusted
        for axis, level in zip(reversed(range(len(levels))), levels):
            if not level.mapped[i]:
                all_trusted = jnp.all(all_trusted, axis)
                value = jnp.sum(value, axis) if i in static.state else value
        shape = all_trusted.shape + (1,) * (value.ndim - all_trusted.ndim)
        return jnp.where(all_trusted.reshape(shape), value, jnp.nan)

    return nondifferentiable_backward(
        [collect(i) for i in perturbed], msg=sweep.refusal_twice, symbolic=True
    )
