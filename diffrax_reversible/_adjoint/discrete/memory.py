"""Keeping the states of a solve."""

from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._compat import buffer_at_set, MaybeBuffer
from ..._types import BoolScalarLike, IntScalarLike


class Everything(eqx.Module):
    """One entry for every step.

    - `entries`: with a leading axis of steps.
    """

    entries: PyTree[MaybeBuffer[Array]]

    @property
    def buffers(self) -> list:
        return [self.entries]

    @staticmethod
    def empty(capacity: int, entry: PyTree[Array]) -> "Everything":
        zeros = lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x))
        return Everything(jtu.tree_map(zeros, entry))

    def keep(
        self, index: IntScalarLike, entry: PyTree[Array], pred: BoolScalarLike
    ) -> "Everything":
        """The same, with `entry` at `index` if `pred`."""
        write = lambda x, xs: buffer_at_set(xs, index, x, pred=cast(Any, pred))
        return Everything(jtu.tree_map(write, entry, self.entries))

    def find(self, index: IntScalarLike) -> PyTree[Array]:
        return jtu.tree_map(lambda xs: xs[index], self.entries)
