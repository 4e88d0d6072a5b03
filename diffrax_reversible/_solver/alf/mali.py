"""The asynchronous leapfrog method, as the integrator of MALI."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractTerm, ThirdOrderHermitePolynomialInterpolation
from jaxtyping import Array, PyTree

from ..._compat import ω
from ..._types import Args, RealScalarLike, VF, Y
from ..updates.solver import AbstractReversibleSolver
from ..updates.update import AbstractUpdate, State
from .base import Drift, shares
from .jump import Jump


class _Substep(eqx.Module):
    drift: PyTree
    t: Array


class _Pull(AbstractUpdate):
    eta: float = eqx.field(static=True)

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point, substep):
        return terms.vf(substep.t, point, args)

    def write(self, state, k, substep):
        del substep
        v = state.solver_state
        new_v = (v**ω + 2 * self.eta * (k**ω - v**ω)).ω
        sums = [(s**ω + k**ω - v**ω).ω for s in state.sums]
        return State(state.y, new_v, sums)

    def unwrite(self, state, k, substep):
        del substep
        new_v = state.solver_state
        v = ((new_v**ω - 2 * self.eta * k**ω) / (1 - 2 * self.eta)).ω
        sums = [(s**ω - k**ω + v**ω).ω for s in state.sums]
        return State(state.y, v, sums)


class ALF(AbstractReversibleSolver):
    r"""The asynchronous leapfrog method, the integrator of MALI: one evaluation of the
    vector field per step.

    $z \leftarrow z + \frac{h}{2} v, \quad
     v \leftarrow v + 2 \eta (f(t, z) - v), \quad
     z \leftarrow z + \frac{h}{2} v$

    with $t$ in the middle of the step.

    To reproduce MALI, or for the cheapest step of
    all. [`diffrax_reversible.ReversibleALF2`][] has the same cost per unit of time and
    a solver state that does not alternate; [`diffrax_reversible.ReversibleALF4`][] is
    far more efficient.

    - Order: 2 with `eta=1`. **Damping, `eta` below 1, costs the order**: it is 1 then.
        It also costs digits of the reversal, for every step divides by $1 - 2 \eta$:
        after $n$ steps rounding errors have grown by up to $|1 - 2 \eta|^{-n}$. For
        damping that keeps the order see `ReversibleALF4(damping=...)`.
    - Error estimate: $4 h (f(t, z) - v_0)$, of order 2 in the step; four times MALI's,
        so that the tolerance means what it means for other solvers.
    - Cost: 1 evaluation per step, and 1 per step in the reverse sweep of
        [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state.
    - Dense output (`SaveAt(ts=...)`): cubic Hermite interpolation.

    **Raises:** `ValueError` unless `0.5 < eta <= 1`.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{zhuang2021mali,
            title={{MALI}: A memory efficient and reverse accurate integrator for Neural
                   {ODE}s},
            author={Zhuang, Juntang and Dvornek, Nicha C. and Tatikonda, Sekhar and
                    Duncan, James S.},
            booktitle={International Conference on Learning Representations},
            year={2021},
            url={https://openreview.net/forum?id=blfSjHeFM_e}
        }
        @misc{mutze2013asynchronous,
            title={An asynchronous leapfrog method {II}},
            author={Mutze, Ulrich},
            year={2013},
            eprint={1311.6602},
            archivePrefix={arXiv}
        }
        ```
    """

    eta: float = eqx.field(default=1.0, static=True)

    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar = ThirdOrderHermitePolynomialInterpolation

    def __check_init__(self):
        if not 0.5 < self.eta <= 1:
            raise ValueError(
                f"`ALF(eta={self.eta!r})` must be above 0.5, where a step cannot be "
                "undone, and at most 1, which means no damping."
            )

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        del terms
        return 2 if self.eta == 1 else 1

    def error_order(self, terms: PyTree[AbstractTerm]) -> int:
        del terms
        return 2

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
        drift = shares(terms.contr(t0, t1), np.array([0.5]))
        substep = _Substep(drift, jnp.asarray(t0 + (t1 - t0) / 2)[None])
        return [((Drift(), _Pull(self.eta), Drift()), substep)]

    def jump(self):
        return Jump(None)

    def zero_sums(self, y, solver_state):
        del y
        return [jtu.tree_map(jnp.zeros_like, solver_state)]

    def error(self, terms, t0, t1, state0, state1):
        del state0
        # The estimate itself is $h (f - v_0)$. Four times that holds the tolerance as
        # the other solvers do.
        return terms.prod((4 * state1.sums[0] ** ω).ω, terms.contr(t0, t1))

    def dense_info_start(self, terms, t0, t1, state0):
        k0 = terms.prod(state0.solver_state, terms.contr(t0, t1))
        return dict(y0=state0.y, k0=k0)

    def dense_info_end(self, terms, t0, t1, state1):
        k1 = terms.prod(state1.solver_state, terms.contr(t0, t1))
        return dict(y1=state1.y, k1=k1)


ALF.__init__.__doc__ = """**Arguments:**

- `eta`: the damping, above 0.5 and at most 1, which means none.
"""
