"""Solvers for pairs of terms, each of which moves one half of the state."""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractTerm, LocalLinearInterpolation
from jaxtyping import Array, PyTree

from ..._compat import ω
from ..._types import Args, RealScalarLike, VF, Y
from ..updates.solver import AbstractReversibleSolver
from ..updates.update import AbstractUpdate, State


class Moves(NamedTuple):
    """The moves of `q`, or of `p`, in one step.

    - `shares`: of the step.
    - `nodes`: where in the step, which is [0, 1], the term is evaluated.
    """

    shares: np.ndarray
    nodes: np.ndarray


class _Substep(eqx.Module):
    """For each of the two terms: the time at which it is evaluated, and its share of the
    control; `None` for one that is not."""

    t: PyTree[Array]
    control: PyTree[Array]


class _Move(AbstractUpdate):
    """`y[i] += f_i(t, y[1 - i]) dX_i`"""

    component: int = eqx.field(static=True)

    def read(self, state):
        return state.y[1 - self.component]

    def evaluate(self, terms, args, point, substep):
        i = self.component
        return terms[i].vf_prod(substep.t[i], point, args, substep.control[i])

    def write(self, state, k, substep):
        return self._moved(state, k)

    def unwrite(self, state, k, substep):
        return self._moved(state, (-(k**ω)).ω)

    def _moved(self, state, k):
        q, p = state.y
        y = ((q**ω + k**ω).ω, p) if self.component == 0 else (q, (p**ω + k**ω).ω)
        return State(y, state.solver_state, state.sums)


class AbstractSplitting(AbstractReversibleSolver):
    r"""Base class of the solvers for a pair of terms `(f, g)` and a state `(q, p)`,

    $\mathrm{d}q = f(t, p) \,\mathrm{d}t, \quad \mathrm{d}p = g(t, q) \,\mathrm{d}t$

    that move `q` and `p` in turn.
    """

    term_structure: ClassVar = (AbstractTerm, AbstractTerm)
    interpolation_cls: ClassVar[Callable[..., LocalLinearInterpolation]] = (
        LocalLinearInterpolation
    )

    @abc.abstractmethod
    def moves(self) -> tuple[Moves, Moves]:
        """The moves of `q` and of `p`, which are made in turn, `q` first."""

    def init(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> None:
        """As [`diffrax.AbstractSolver.init`][]."""
        del terms, t0, t1, y0, args

    def func(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        """As [`diffrax.AbstractSolver.func`][]."""
        f, g = terms
        q, p = y0
        return f.vf(t0, p, args), g.vf(t0, q, args)

    def updates(self, terms, t0, t1):
        h = t1 - t0

        def share(shares, control):
            product = lambda x: jnp.tensordot(
                jnp.asarray(shares, jnp.result_type(x)), x, axes=0
            )
            return jtu.tree_map(product, control)

        def substeps(moves):
            dtype = jnp.result_type(h)
            return _Substep(
                [
                    None if m is None else t0 + jnp.asarray(m.nodes, dtype) * h
                    for m in moves
                ],
                [
                    None if m is None else share(m.shares, term.contr(t0, t1))
                    for m, term in zip(moves, terms)
                ],
            )

        q, p = self.moves()
        pairs = len(p.shares)
        first = Moves(*[x[:pairs] for x in q]), p
        updates: list = [((_Move(0), _Move(1)), substeps(first))]
        if len(q.shares) > pairs:
            last = Moves(*[x[pairs:] for x in q]), None
            updates.append(((_Move(0),), substeps(last)))
        return updates

    def jump(self):
        return None

    def zero_sums(self, y, solver_state):
        del y, solver_state
        return ()

    def error(self, terms, t0, t1, state0, state1):
        del terms, t0, t1, state0, state1

    def dense_info_start(self, terms, t0, t1, state0):
        del terms, t0, t1
        return dict(y0=state0.y)

    def dense_info_end(self, terms, t0, t1, state1):
        del terms, t0, t1
        return dict(y1=state1.y)
