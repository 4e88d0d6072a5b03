"""Damping at the end of a step, which keeps the order."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ..._compat import ω
from ..._tree import add, scale
from ..._types import RealScalarLike
from ..updates.update import AbstractUpdate, State


class Relax(AbstractUpdate):
    r"""$v \leftarrow f + e^{-\gamma h} (v - f), \quad f = f(t, z)$.

    - `t`: the end of the step.
    - `exponent`: the damping times the step.
    - `name`: of the solver, for errors.
    """

    t: RealScalarLike
    exponent: RealScalarLike
    name: str = eqx.field(static=True)

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point):
        return terms.vf(self.t, point, args)

    def write(self, state, k):
        return State(state.y, _relaxed(state.solver_state, k, -self.exponent)), None

    def unwrite(self, state, k):
        digits = min(jnp.finfo(x.dtype).nmant for x in jtu.tree_leaves(k))
        exponent = jnp.asarray(self.exponent)
        exponent = eqx.error_if(
            exponent,
            exponent > digits * jnp.log(2.0).astype(exponent.dtype),
            f"`{self.name}(damping=...)` times a step is so large that nothing is left "
            "of what was damped, and the step cannot be undone. Use less damping, or "
            "smaller steps (`PIDController(dtmax=...)`); or "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`.",
        )
        return State(state.y, _relaxed(state.solver_state, k, exponent))


def _relaxed(v, k, exponent):
    return add(k, scale(jnp.exp(exponent), (v**ω - k**ω).ω))
