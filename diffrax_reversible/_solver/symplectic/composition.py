"""Symplectic solvers for separable Hamiltonian systems."""

import equinox as eqx
import numpy as np
from diffrax import AbstractTerm
from jaxtyping import PyTree

from ..alf.coefficients_high import BLANES_MOAN6, KAHAN_LI8
from ..alf.coefficients_low import ALF2, BLANES_MOAN4
from ..alf.composition import Composition
from .base import AbstractSplitting, Moves


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
    r"""The most efficient known symplectic compositions of moves of `q` and `p`, of order
    2, 4, 6 or 8. Time-symmetric, and reversible.

    Terms `(f, g)`, state `(q, p)`, and what they are for as for
    [`diffrax_reversible.StormerVerlet`][], which is the composition of order 2. Order 4
    is the one to try first; the higher ones pay where the energy error must be tiny.
    `SaveAt(ts=...)` and dense output are linear between the steps, of second order: let
    the steps land on the times, with `StepTo` or `SaveAt(steps=...)`. Some of the moves
    go backwards, so these are not for stochastic differential equations.

    **Cost** per step: 1, 6, 10 or 17 evaluations of `g`, and one more of `f`; again in
    the reverse sweep, with one vector-Jacobian product each. Memory: that of one
    evaluation.

    **Raises:** `ValueError` for another order.

    ??? cite "Reference"

        Orders 4 and 6:

        ```bibtex
        @article{blanes2002practical,
            title={Practical symplectic partitioned {R}unge--{K}utta and
                   {R}unge--{K}utta--{N}ystr{\"o}m methods},
            author={Blanes, Sergio and Moan, Per Christian},
            journal={Journal of Computational and Applied Mathematics},
            volume={142},
            number={2},
            pages={313--330},
            year={2002}
        }
        ```

        Order 8:

        ```bibtex
        @article{kahan1997composition,
            title={Composition constants for raising the orders of unconventional
                   schemes for ordinary differential equations},
            author={Kahan, William and Li, Ren-Cang},
            journal={Mathematics of Computation},
            volume={66},
            number={219},
            pages={1089--1099},
            year={1997}
        }
        ```
    """

    composition: Composition = eqx.field(static=True)

    def __init__(self, order: int = 4):
        if order not in _compositions:
            raise ValueError(
                "`SymplecticComposition(order=...)` must be one of "
                f"{sorted(_compositions)}; got {order}."
            )
        self.composition = _compositions[order]


SymplecticComposition.__init__.__doc__ = """**Arguments:**

- `order`: 2, 4, 6 or 8.
"""
