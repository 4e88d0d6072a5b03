"""The batch that a reverse sweep is part of."""

import dataclasses
from collections.abc import Callable, Hashable

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import dce_jaxpr, filter_primitive_bind
from .._types import BoolScalarLike, IntScalarLike
from .batched_vjp import Function, shared_vjp_p, vjp


@dataclasses.dataclass(frozen=True)
class Batch:
    """The axes over which a reverse sweep is vmapped.

    - `names`: of these axes.
    - `summed`: like the parameters; for each that is differentiated, the names of the
        axes that it does not carry, over which its cotangent is summed.
    """

    names: tuple[Hashable, ...]
    summed: PyTree

    def any(self, pred: BoolScalarLike) -> BoolScalarLike:
        """Whether `pred` holds for any element of the batch; not batched itself."""
        if len(self.names) == 0:
            return pred
        return lax.pmax(jnp.asarray(pred, jnp.int32), self.names) > 0

    def max(self, x: IntScalarLike) -> IntScalarLike:
        """The largest `x` of all elements of the batch; not batched itself."""
        if len(self.names) == 0:
            return x
        return lax.pmax(jnp.asarray(x), self.names)

    def select(self, where: Callable[[PyTree], PyTree]) -> "Batch":
        """The batch for a part of the parameters, or for several in a pytree."""
        return dataclasses.replace(self, summed=where(self.summed))

    def add(self, total: PyTree, increment: PyTree) -> PyTree:
        """`total` with a cotangent of the parameters added, which is that of a single
        element of the batch."""

        def one(total, increment, names):
            return total + (lax.psum(increment, names) if names else increment)

        return jtu.tree_map(one, total, increment, self.summed)

    def vjp(
        self,
        fn: Callable[[PyTree, PyTree], PyTree],
        point: PyTree,
        parameters: PyTree,
        cotangent: PyTree,
        total: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """`fn(point, parameters)`, the cotangent of the point, and `total` with the
        cotangent of the parameters added: that of each summed over the elements that
        share it.

        Outputs whose `cotangent` is `None` are not differentiated, nor are parameters
        whose `total` is `None`, nor those that the differentiated outputs do not depend
        on. The cotangent of whatever in `point` is not floating-point is `None`.
        """
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(point, parameters)
        outputs_tree, point_tree = map(jtu.tree_structure, (shapes, point))
        parameters_tree = jtu.tree_structure(parameters)
        cotangents = outputs_tree.flatten_up_to(cotangent)
        totals = parameters_tree.flatten_up_to(total)
        names = parameters_tree.flatten_up_to(self.summed)
        is_output = [ct is not None for ct in cotangents]
        _, used = dce_jaxpr(closed.jaxpr, is_output)
        consts, num_points = closed.consts, point_tree.num_leaves
        is_parameter = [t is not None for t in totals]
        is_parameter = [x and u for x, u in zip(is_parameter, used[num_points:])]
        is_point = [
            jnp.issubdtype(v.aval.dtype, jnp.inexact)
            for v in closed.jaxpr.invars[:num_points]
        ]
        none = [False] * len(consts)
        function = Function(
            closed.jaxpr,
            self.names,
            (*none, *is_point, *[False] * len(totals)),
            (*none, *[False] * num_points, *is_parameter),
        )
        leaves = [*consts, *jtu.tree_leaves((point, parameters))]
        operands = function, (), list(map(jnp.asarray, leaves)), cotangents
        if any(x and name for x, name in zip(is_parameter, names)):
            outputs, found = filter_primitive_bind(shared_vjp_p, *operands)
        else:
            outputs, found = vjp(*operands)
        found = found[len(consts) :]
        totals = [
            t if ct is None else t + ct for t, ct in zip(totals, found[num_points:])
        ]
        return (
            jtu.tree_unflatten(outputs_tree, outputs),
            jtu.tree_unflatten(point_tree, found[:num_points]),
            jtu.tree_unflatten(parameters_tree, totals),
        )
