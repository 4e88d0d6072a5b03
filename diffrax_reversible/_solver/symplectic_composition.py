"""Symplectic solvers for separable Hamiltonian systems."""

import equinox as eqx
import numpy as np
from diffrax import AbstractTerm
from jaxtyping import PyTree

from .coefficients_high import BLANES_MOAN6, KAHAN_LI8
from .coefficients_low import ALF2, BLANES_MOAN4
from .composition import Composition
from .splitting import AbstractSplitting, Moves


_compositions = {2: ALF2, 4: BLANES_MOAN4, 6: BLANES_MOAN6, 8: KAHAN_LI8}


class AbstractSymplecticComposition(AbstractSplitting):
    """Base class of the compositions of moves of `q` and `p`.

    The fractions are those of a composition of asynchronous-leapfrog steps, of which
    there must be an even number: such a composition is a splitting, too. The time at
    which a term is evaluated moves with the variable that it is a function of, so that
    the solver has its order also where the terms depend on time.
    """

    composition: eqx.AbstractVar[Composition]

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        """The order of the composition."""
        del terms
        return self.composition.order

    def moves(self):
        g = np.array(self.composition.fractions)
        shares = np.append(g, 0.0) + np.append(0.0, g)
        q, p = shares[::2], shares[1::2]
        return Moves(q, np.append(0.0, np.cumsum(p))), Moves(p, np.cumsum(q)[:-1])


class SymplecticComposition(AbstractSymplecticComposition):
    composition: Composition = eqx.field(static=True)

    def __init__(self, order: int = 4):
        if order not in _compositions:
            raise ValueError(
                "`SymplecticComposition(order=...)` must be one of "
                f"{sorted(_compositions)}; got {order}."
            )
        self.composition = _compositions[order]
