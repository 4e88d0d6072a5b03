"""Damping at the end of a step, which keeps the order."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ..._types import RealScalarLike
from ..updates.update import AbstractUpdate, State


class Relaxation(eqx.Module):
    """`t`: the end of the step; `exponent`: the damping times the step."""

    t: Array
    exponent: Array


def relaxation(damping: float, t0: RealScalarLike, t1: RealScalarLike) -> Relaxation:
    h = jnp.asarray(t1 - t0)
    return Relaxation(jnp.asarray(t1)[None], (damping * jnp.abs(h))[None])


class Relax(AbstractUpdate):
    r"""$v \leftarrow f + e^{-\gamma h} (v - f), \quad f = f(t_1, z)$."""

    name: str = eqx.field(static=True)

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point, substep):
        return terms.vf(substep.t, point, args)

    def write(self, state, k, substep):
        v = _relaxed(state.solver_state, k, -substep.exponent)
        return State(state.y, v, state.sums)

    def unwrite(self, state, k, substep):
        digits = min(jnp.finfo(x.dtype).nmant for x in jtu.tree_leaves(k))
        exponent = eqx.error_if(
            substep.exponent,
            substep.exponent > digits * jnp.log(2.0).astype(substep.exponent.dtype),
            f"`{self.name}(damping=...)` times a step is so large that nothing is left "
            "of what was damped, and the step cannot be undone. Use less damping, or "
            "smaller steps (`PIDController(dtmax=...)`); or "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`.",
        )
        v = _relaxed(state.solver_state, k, exponent)
        return State(state.y, v, state.sums)


def _relaxed(v, k, exponent):
    factor = jnp.exp(exponent)
    return jtu.tree_map(lambda v, k: k + factor.astype(k.real.dtype) * (v - k), v, k)
