"""Solvers for pairs of terms, each of which moves one half of the state."""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from diffrax import AbstractTerm, LocalLinearInterpolation

from ..._tree import outer
from ..updates.solver import AbstractUpdateSolver
from ..updates.update import Add, Repeat, Step


class Moves(NamedTuple):
    """The moves of `q`, or of `p`, in one step.

    - `shares`: of the step.
    - `nodes`: where in the step, which is [0, 1], the term is evaluated.
    """

    shares: np.ndarray
    nodes: np.ndarray


class AbstractSplitting(AbstractUpdateSolver):
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

    def init(self, terms, t0, t1, y0, args):
        """As [`diffrax.AbstractSolver.init`][]."""
        del terms, t0, t1, y0, args

    def func(self, terms, t0, y0, args):
        """As [`diffrax.AbstractSolver.func`][]."""
        f, g = terms
        q, p = y0
        return f.vf(t0, p, args), g.vf(t0, q, args)

    def updates(self, terms, t0, t1, made_jump):
        del made_jump
        h = t1 - t0
        places = (lambda s: s.y[0], lambda s: s.y[1])

        def move(i, shares, nodes):
            nodes = jnp.asarray(nodes, jnp.result_type(h))
            dX = outer(shares, terms[i].contr(t0, t1))
            term = lambda terms: terms[i]
            return Add(places[i], places[1 - i], t0 + nodes * h, dX, term)

        q, p = self.moves()
        pairs = len(p.shares)
        first = [x[:pairs] for x in q]
        updates = [Repeat((move(0, *first), move(1, *p)))]
        if len(q.shares) > pairs:
            updates.append(Repeat((move(0, *[x[pairs:] for x in q]),)))
        return Step(updates)
