"""A loop over the coefficients of repeated updates."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree


# About what one turn of a loop costs, in operations on numbers.
_much_work = 10_000
_most_copies = 7


def _is_array(x) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _inner(eqn) -> Iterator[Any]:
    """The jaxprs in the parameters of an equation."""
    for x in jtu.tree_leaves(list(eqn.params.values())):
        if hasattr(x, "eqns"):
            yield x
        elif hasattr(x, "jaxpr"):
            yield x.jaxpr


def _work(jaxpr) -> int | float:
    """A rough count of the operations on numbers. Infinite if not known beforehand."""
    return sum(map(_work_of_equation, jaxpr.eqns))


def _work_of_equation(eqn) -> int | float:
    name = eqn.primitive.name
    if name == "while":
        return math.inf
    inner = list(map(_work, _inner(eqn)))
    if len(inner) > 0:
        return eqn.params.get("length", 1) * sum(inner)
    each = 1
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        each = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif name == "conv_general_dilated":
        _, *rest = eqn.params["dimension_numbers"].rhs_spec
        each = math.prod(eqn.invars[1].aval.shape[i] for i in rest)
    return each * sum(getattr(x.aval, "size", 1) for x in eqn.outvars)


def is_small(fn: Callable, *args: Any) -> bool:
    """Whether a loop costs `fn(*args)` more than it does itself."""
    return _work(jax.make_jaxpr(fn)(*args).jaxpr) < _much_work


def repeat(
    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    reverse: bool = False,
) -> tuple[PyTree, PyTree, PyTree]:
    """`body(carry, x) -> carry, y, contribution` over the leading axis of the arrays in
    `xs`, traced once. Returns the last carry, every `y` along a leading axis, and the
    sum of the contributions.

    A loop costs small vector fields more than they do themselves, so that several turns
    of it become one; copies of large ones would take more memory, and long to compile.
    """
    xs, static = eqx.partition(xs, _is_array)
    number = len(jtu.tree_leaves(xs)[0])
    first = jtu.tree_map(lambda x: x[0], xs)
    jaxpr, shapes = jax.make_jaxpr(
        lambda carry, x: body(carry, eqx.combine(x, static)), return_shape=True
    )(carry, first)
    structure = jtu.tree_structure(shapes)
    _, _, zeros = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def turn(carry_and_total, x):
        carry, total = carry_and_total
        leaves = jtu.tree_leaves((carry, x))
        outputs = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves)
        carry, y, contribution = jtu.tree_unflatten(structure, outputs)
        return (carry, jtu.tree_map(jnp.add, total, contribution)), y

    unroll = 1
    if number > 1 and _work(jaxpr.jaxpr) < _much_work:
        unroll = max(n for n in range(1, _most_copies + 1) if number % n == 0)
    (carry, total), ys = lax.scan(
        turn, (carry, zeros), xs, reverse=reverse, unroll=unroll
    )
    return carry, ys, total
