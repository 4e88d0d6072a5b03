"""A jump of the vector field, for the asynchronous leapfrog method."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ..._compat import unvmap_any, ω
from ..._tree import zeros_of
from ..updates.update import AbstractUpdate, State
from .grid import snap


class Jump(AbstractUpdate):
    """Keeps `v - f(z)`, the distance of `v` from the vector field, across a jump
    of the vector field at the start of a step. (To set `v = f(z)` could not be undone.)
    """

    grid: float | None = eqx.field(static=True)

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point, substep):
        def change():
            after = terms.vf(substep.t_after, point, args)
            before = terms.vf(substep.t_before, point, args)
            return (after**ω - before**ω).ω

        # Under `jax.vmap` evaluate only if any element jumps.
        any_jump = unvmap_any(substep.made_jump)
        k = lax.cond(any_jump, change, lambda: zeros_of(change))
        return jtu.tree_map(lambda x: jnp.where(substep.made_jump, x, 0), k)

    def write(self, state, k, substep):
        v = (state.solver_state**ω + snap(k, self.grid) ** ω).ω
        return State(state.y, v, state.sums)

    def unwrite(self, state, k, substep):
        v = (state.solver_state**ω - snap(k, self.grid) ** ω).ω
        return State(state.y, v, state.sums)
