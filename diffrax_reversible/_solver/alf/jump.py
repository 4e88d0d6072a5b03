"""A jump of the vector field, for the asynchronous leapfrog method."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..._compat import prevbefore, unvmap_any, ω
from ..._tree import zeros_of
from ..._types import BoolScalarLike, RealScalarLike
from ..updates.update import AbstractUpdate, State
from .grid import snap


class Jump(AbstractUpdate):
    """Keeps `v - f(z)`, the distance of `v` from the vector field, across a jump of the
    vector field at the start of a step, `t`. (To set `v = f(z)` could not be undone.)
    """

    t: RealScalarLike
    made_jump: BoolScalarLike
    grid: float | None = eqx.field(static=True, default=None)

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point):
        def change():
            # diffrax steps to the number before a jump, and on from the one after it.
            before = terms.vf(prevbefore(prevbefore(self.t)), point, args)
            return (terms.vf(self.t, point, args) ** ω - before**ω).ω

        # Under `jax.vmap` evaluate only if any element jumps.
        any_jump = unvmap_any(self.made_jump)
        k = lax.cond(any_jump, change, lambda: zeros_of(change))
        return jtu.tree_map(lambda x: jnp.where(self.made_jump, x, 0), k)

    def write(self, state, k):
        v = (state.solver_state**ω + snap(k, self.grid) ** ω).ω
        return State(state.y, v), None

    def unwrite(self, state, k):
        v = (state.solver_state**ω - snap(k, self.grid) ** ω).ω
        return State(state.y, v)


def jumps(
    t: RealScalarLike, made_jump: BoolScalarLike, grid: float | None = None
) -> list[PyTree]:
    """The update for a jump at `t`; none if there never is one."""
    return [] if made_jump is False else [Jump(t, made_jump, grid)]
