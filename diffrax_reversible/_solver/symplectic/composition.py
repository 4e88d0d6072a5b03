"""Symplectic solvers for separable Hamiltonian systems."""

from typing import ClassVar

import equinox as eqx
import numpy as np

from ..alf.coefficients import BLANES_MOAN4, BLANES_MOAN6, KAHAN_LI8
from ..alf.composition import Composition
from .base import AbstractSplitting, Moves


class AbstractSymplecticComposition(AbstractSplitting):
    """Base class of the compositions of moves of `q` and `p`: symplectic,
    time-symmetric and reversible.

    They are for Hamiltonian systems over long times, like n-body problems, where their
    energy error stays bounded. Terms are a pair `(f, g)` and the state is a pair
    `(q, p)`, as for [`diffrax.SemiImplicitEuler`][]; put the expensive term, the forces,
    second. Do not use them where the steps must adapt: they have no error estimate, and
    steps that vary with the state spoil the long-time behaviour of any symplectic method.

    `SaveAt(ts=...)` and dense output are linear between the steps, of second order. Let
    the steps land on the times, with `StepTo` or `SaveAt(steps=...)`, where that is not
    enough. Memory is that of one evaluation.

    The fractions are those of a composition of asynchronous-leapfrog steps, of which
    there must be an even number: such a composition is a splitting, too. The time at
    which a term is evaluated moves with the variable that it is a function of, so that
    the solver has its order also where the terms depend on time.
    """

    composition: eqx.AbstractClassVar[Composition]

    def order(self, terms):
        """The order of the composition."""
        del terms
        return self.composition.order

    def moves(self):
        g = np.array(self.composition.fractions)
        shares = np.append(g, 0.0) + np.append(0.0, g)
        q, p = shares[::2], shares[1::2]
        return Moves(q, np.append(0.0, np.cumsum(p))), Moves(p, np.cumsum(q)[:-1])


class SymplecticComposition4(AbstractSymplecticComposition):
    """The composition S6 of Blanes and Moan: symplectic and reversible, of order 4.

    The one to try first for Hamiltonian systems that take more accuracy than
    [`diffrax_reversible.StormerVerlet`][] gives. Some of its moves go backwards, so it
    is not for stochastic differential equations.

    ```python
    terms = diffrax.ODETerm(velocity), diffrax.ODETerm(force)
    options = dict(adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, SymplecticComposition4(), 0.0, 9.0, 0.1, (q, p), **options)
    ```

    **Cost** per step: 7 evaluations of `f` and 6 of `g`; again in the reverse sweep, with
    one vector-Jacobian product each.

    The reference is that of [`diffrax_reversible.ReversibleALF6`][].
    """

    composition: ClassVar[Composition] = BLANES_MOAN4


class SymplecticComposition6(AbstractSymplecticComposition):
    """The composition S10 of Blanes and Moan: symplectic and reversible, of order 6.

    For a smaller energy error than that of
    [`diffrax_reversible.SymplecticComposition4`][]. Some of its moves go backwards, so it
    is not for stochastic differential equations.

    ```python
    terms = diffrax.ODETerm(velocity), diffrax.ODETerm(force)
    options = dict(adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, SymplecticComposition6(), 0.0, 9.0, 0.2, (q, p), **options)
    ```

    **Cost** per step: 11 evaluations of `f` and 10 of `g`; again in the reverse sweep,
    with one vector-Jacobian product each.

    The reference is that of [`diffrax_reversible.ReversibleALF6`][].
    """

    composition: ClassVar[Composition] = BLANES_MOAN6


class SymplecticComposition8(AbstractSymplecticComposition):
    """Kahan and Li's composition of 17 factors: symplectic and reversible, of order 8.

    For energy errors that must be tiny, in float64; otherwise use
    [`diffrax_reversible.SymplecticComposition4`][] or its relative of order 6. Some of
    its moves go backwards, so it is not for stochastic differential equations.

    ```python
    terms = diffrax.ODETerm(velocity), diffrax.ODETerm(force)
    options = dict(adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, SymplecticComposition8(), 0.0, 9.0, 0.3, (q, p), **options)
    ```

    **Cost** per step: 18 evaluations of `f` and 17 of `g`; again in the reverse sweep,
    with one vector-Jacobian product each.

    The reference is that of [`diffrax_reversible.ReversibleYoshida8`][].
    """

    composition: ClassVar[Composition] = KAHAN_LI8


for _cls in (SymplecticComposition4, SymplecticComposition6, SymplecticComposition8):
    _cls.__init__.__doc__ = "**Arguments:** None"
