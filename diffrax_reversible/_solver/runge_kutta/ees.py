"""Explicit Runge-Kutta schemes that a step of -h nearly undoes."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractAdaptiveSolver,
    AbstractStratonovichSolver,
    AbstractTerm,
    RESULTS,
    ThirdOrderHermitePolynomialInterpolation,
)

from ..._compat import is_sde, ω
from ..._tree import combine
from ..._types import (
    DenseInfo,
)
from ..base import AbstractReversibleSolver
from .tableau import evaluate_stages, Tableau


def _dense_info(y0, y1, k0) -> DenseInfo:
    # The cubic with this slope at the end is the parabola through the other three.
    k1 = (2 * (y1**ω - y0**ω) - k0**ω).ω
    return dict(y0=y0, y1=y1, k0=k0, k1=k1)


class AbstractEES(
    AbstractReversibleSolver, AbstractAdaptiveSolver, AbstractStratonovichSolver
):
    """Base class of the explicit and effectively symmetric Runge-Kutta schemes."""

    tableau: eqx.AbstractClassVar[Tableau]
    reversal_rtol: ClassVar[float | None] = 1e-3

    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., ThirdOrderHermitePolynomialInterpolation]
    ] = ThirdOrderHermitePolynomialInterpolation

    def order(self, terms):
        """Two."""
        del terms
        return 2

    def strong_order(self, terms):
        """One half; with additive or commutative noise the order is one."""
        del terms
        return 0.5

    def error_order(self, terms):
        """Three, and for an SDE one."""
        return 1.0 if is_sde(terms) else 3

    def init(self, terms, t0, t1, y0, args):
        """As [`diffrax.AbstractSolver.init`][]."""
        del terms, t0, t1, y0, args

    def func(self, terms, t0, y0, args):
        """As [`diffrax.AbstractSolver.func`][]."""
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """As [`diffrax.AbstractSolver.step`][]."""
        del solver_state, made_jump
        tableau = self.tableau
        assert tableau.error is not None
        stages = evaluate_stages(
            tableau, terms, t0, t1 - t0, y0, args, terms.contr(t0, t1)
        )
        y1 = (y0**ω + combine(tableau.b, stages) ** ω).ω
        y_error = combine(tableau.error, stages)
        k0 = jtu.tree_map(lambda x: x[0], stages)
        return y1, y_error, _dense_info(y0, y1, k0), None, RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        """Almost the inverse of `step`: a step from `t1` to `t0`.

        Arguments and results as for
        [`diffrax_reversible.AbstractReversibleSolver.backward_step`][].
        """
        del ts_state, solver_state, made_jump
        control = terms.contr(t0, t1)
        stages = evaluate_stages(
            self.tableau, terms, t1, t0 - t1, y1, args, (-(control**ω)).ω
        )
        y0 = (y1**ω + combine(self.tableau.b, stages) ** ω).ω
        k0 = terms.vf_prod(t0, y0, args, control)
        return y0, _dense_info(y0, y1, k0), None, RESULTS.successful


class EES25(AbstractEES):
    """An explicit and effectively symmetric Runge-Kutta scheme: of order 2, with
    three stages, and nearly reversible.

    A step of `-h` undoes a step of `h` up to an error of order `h^6`, so the reverse
    sweep follows the solve with an error of order `h^5`, and so does the gradient; the
    solution itself has one of order `h^2`. Use it for SDEs, and for low accuracy where a
    gradient with three digits will do. Do not use it where the gradient must be exact,
    with large steps, or for long solves of problems that contract.

    ```python
    diffrax.diffeqsolve(
        terms, EES25(), 0.0, 1.0, 0.01, y0, args, adjoint=ReversibleAdjoint()
    )
    ```

    - Order: 2; the error estimate is of order 3 in the step. When used to solve SDEs, it
        converges to the Stratonovich solution.
    - Cost: 3 evaluations of the vector field per step, 6 in the reverse sweep (a step
        back, and the step again), and 3 vector-Jacobian products.
    - Memory: that of one step, and 32 states.
    - Reversal: there is one copy of the solution, and nothing that restarts. What a step
        back does not undo grows where the flow contracts, so that
        [`diffrax_reversible.ReversibleAdjoint`][] keeps 32 states on the way, and accepts
        a relative loss of 1e-3 between them. On seven textbook problems gradients were
        off by at most 4e-4 at a tolerance of 1e-3, where one was refused, and by 1e-7 at
        1e-6.
    - Dense output: a parabola.

    ??? cite "Reference"

        ```bibtex
        @misc{shmelev2025explicit,
            title={Explicit and Effectively Symmetric Schemes for Neural {SDE}s},
            author={Shmelev, Daniil and Salvi, Cristopher},
            year={2025},
            eprint={2509.20599},
            archivePrefix={arXiv}
        }
        ```
    """

    tableau: ClassVar[Tableau] = Tableau(
        a=np.array([[0, 0, 0], [1 / 2, 0, 0], [0, 1, 0]]),
        b=np.array([1 / 4, 1 / 2, 1 / 4]),
        c=np.array([0, 1 / 2, 1]),
        # As large as the error of the step, for every tree of order three.
        error=np.array([1, -2, 1]) / 12,
    )


_r = 1 / np.sqrt(2)


class EES27(AbstractEES):
    """An explicit and effectively symmetric Runge-Kutta scheme: of order 2, with
    four stages, and nearly reversible.

    A step of `-h` undoes a step of `h` up to an error of order `h^8`, so the reverse
    sweep follows the solve with an error of order `h^7`, and so does the gradient; the
    solution itself has one of order `h^2`. Use it as [`diffrax_reversible.EES25`][],
    which costs one evaluation less, where the gradient needs more digits.

    ```python
    diffrax.diffeqsolve(
        terms, EES27(), 0.0, 1.0, 0.01, y0, args, adjoint=ReversibleAdjoint()
    )
    ```

    - Order: 2; the error estimate is of order 3 in the step. When used to solve SDEs, it
        converges to the Stratonovich solution.
    - Cost: 4 evaluations of the vector field per step, 8 in the reverse sweep (a step
        back, and the step again), and 4 vector-Jacobian products.
    - Memory: that of one step, and 32 states.
    - Reversal: as for [`diffrax_reversible.EES25`][]. On seven textbook problems gradients
        were off by at most 2e-3 at a tolerance of 1e-3, where one was refused, and by 5e-9
        at 1e-6.
    - Dense output: a parabola.

    The reference is that of [`diffrax_reversible.EES25`][].
    """

    tableau: ClassVar[Tableau] = Tableau(
        a=np.array(
            [[0, 0, 0, 0], [1 - _r, 0, 0, 0], [0, _r, 0, 0], [1 - _r, 0, _r, 0]]
        ),
        b=np.array([1 - _r, _r, _r, 1 - _r]) / 2,
        c=np.array([0, 1 - _r, _r, 1]),
        # Of the size of the error of the step.
        error=np.array([1, -1, -1, 1]) / 16,
    )


EES25.__init__.__doc__ = """**Arguments:** None"""
EES27.__init__.__doc__ = """**Arguments:** None"""
