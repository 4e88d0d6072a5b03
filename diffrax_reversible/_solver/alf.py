"""The asynchronous leapfrog method and its compositions."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractStratonovichSolver,
    AbstractTerm,
    ThirdOrderHermitePolynomialInterpolation,
)
from jaxtyping import Array, PyTree

from .._compat import unvmap_any, ω
from .._types import Args, RealScalarLike, VF, Y
from .base import AbstractReversibleSolver
from .composition import ALF2, ALF4, Composition, YOSHIDA4
from .update import AbstractShift, AbstractUpdate, State


class _Substep(eqx.Module):
    """`drift`: the share of the control that moves `z`; `t`: the time at which the
    vector field is evaluated after it; `weights`: of that value in the sums."""

    drift: PyTree
    t: Array
    weights: PyTree


class _Drift(AbstractShift):
    def write(self, terms, state, substep):
        z, v = state.y, state.solver_state
        z = (z**ω + terms.prod(v, substep.drift) ** ω).ω
        return State(z, v, state.sums)

    def unwrite(self, terms, state, substep):
        z, v = state.y, state.solver_state
        z = (z**ω - terms.prod(v, substep.drift) ** ω).ω
        return State(z, v, state.sums)


class _Reflect(AbstractUpdate):
    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point, substep):
        return terms.vf(substep.t, point, args)

    def write(self, state, k, substep):
        v = (2 * k**ω - state.solver_state**ω).ω
        sums = [(s**ω + w * k**ω).ω for s, w in zip(state.sums, substep.weights)]
        return State(state.y, v, sums)

    def unwrite(self, state, k, substep):
        v = (2 * k**ω - state.solver_state**ω).ω
        sums = [(s**ω - w * k**ω).ω for s, w in zip(state.sums, substep.weights)]
        return State(state.y, v, sums)


class _Jump(AbstractUpdate):
    """Keeps `v - f(z)`, the distance of `v` from the vector field, across a jump."""

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point, substep):
        def change():
            after = terms.vf(substep.t_after, point, args)
            before = terms.vf(substep.t_before, point, args)
            return (after**ω - before**ω).ω

        def nothing():
            struct = eqx.filter_eval_shape(change)
            return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)

        # Under `jax.vmap` evaluate only if any element jumps.
        k = lax.cond(unvmap_any(substep.made_jump), change, nothing)
        return jtu.tree_map(lambda x: jnp.where(substep.made_jump, x, 0), k)

    def write(self, state, k, substep):
        return State(state.y, (state.solver_state**ω + k**ω).ω, state.sums)

    def unwrite(self, state, k, substep):
        return State(state.y, (state.solver_state**ω - k**ω).ω, state.sums)


class AbstractALFComposition(AbstractReversibleSolver):
    r"""Base class of the compositions of asynchronous-leapfrog steps.

    One asynchronous-leapfrog step of a fraction $g$ of the step $h$ is

    $z \leftarrow z + \frac{g h}{2} v, \quad
     v \leftarrow 2 f(t, z) - v, \quad
     z \leftarrow z + \frac{g h}{2} v$

    with $t$ in the middle of the fraction. `y` is $z$ and the solver state is $v$, a
    second copy of the vector field, started at $v = f(t_0, z)$. Adjacent half drifts
    are done as one.
    """

    composition: eqx.AbstractVar[Composition]

    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., ThirdOrderHermitePolynomialInterpolation]
    ] = ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        return self.composition.order

    def error_order(self, terms: PyTree[AbstractTerm]) -> int | None:
        return self.composition.error_order

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        del t1
        return terms.vf(t0, y0, args)

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return terms.vf(t0, y0, args)

    def updates(self, terms, t0, t1):
        g = np.array(self.composition.fractions)
        drifts = (np.append(g, 0.0) + np.append(0.0, g)) / 2
        middles = np.cumsum(g) - g / 2
        control = terms.contr(t0, t1)

        def share(part):
            return jtu.tree_map(
                lambda c: jnp.tensordot(part.astype(jnp.result_type(c)), c, axes=0),
                control,
            )

        h = t1 - t0
        t = t0 + jnp.asarray(middles, jnp.result_type(h)) * h
        weights = self.composition.error_weights
        weights = () if weights is None else (jnp.asarray(weights, t.dtype),)
        return [
            ((_Drift(), _Reflect()), _Substep(share(drifts[:-1]), t, weights)),
            ((_Drift(),), _Substep(share(drifts[-1:]), t[-1:], ())),
        ]

    def jump(self):
        return _Jump()

    def zero_sums(self, y, solver_state):
        if self.composition.error_weights is None:
            return []
        return [jtu.tree_map(jnp.zeros_like, solver_state)]

    def error(self, terms, t0, t1, state0, state1):
        if self.composition.error_weights is None:
            return None
        return terms.prod(state1.sums[0], terms.contr(t0, t1))

    def dense_info_start(self, terms, t0, t1, state0):
        k0 = terms.prod(state0.solver_state, terms.contr(t0, t1))
        return dict(y0=state0.y, k0=k0)

    def dense_info_end(self, terms, t0, t1, state1):
        k1 = terms.prod(state1.solver_state, terms.contr(t0, t1))
        return dict(y1=state1.y, k1=k1)


class ReversibleALF2(AbstractALFComposition, AbstractStratonovichSolver):
    composition: ClassVar[Composition] = ALF2

    def strong_order(self, terms: PyTree[AbstractTerm]) -> float:
        return 0.5


class ReversibleALF4(AbstractALFComposition):
    composition: ClassVar[Composition] = ALF4


class ReversibleYoshida4(AbstractALFComposition):
    composition: ClassVar[Composition] = YOSHIDA4


class ALFComposition(AbstractALFComposition):
    composition: Composition = eqx.field(static=True)

    def __init__(self, fractions, order, error_weights=None, error_order=None):
        self.composition = Composition(
            order=order,
            fractions=tuple(fractions),
            error_weights=None if error_weights is None else tuple(error_weights),
            error_order=error_order,
            source="",
        )
