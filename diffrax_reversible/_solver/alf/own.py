"""Compositions of asynchronous-leapfrog steps of the user's own."""

from collections.abc import Sequence
from typing import Literal

import equinox as eqx

from .base import AbstractALFComposition, options
from .composition import check_composition, Composition


class ALFComposition(AbstractALFComposition):
    """A composition of asynchronous-leapfrog steps of your own, given by its fractions.

    Use it for a composition that is not among the named ones.

    ```python
    a = 1 / (2 - 2 ** (1 / 3))  # Yoshida's triple jump
    b = 1 - 2 * a
    solver = ALFComposition([a / 2, a / 2, b / 2, b / 2, a / 2, a / 2], order=4)
    ```

    - Order: the one that you say, if the fractions have it, which is checked. It is that
        of the solution. With an odd number of fractions the solver state has order 2
        only, unless a further condition holds, as it does for
        [`diffrax_reversible.ReversibleALF4`][].
    - Cost: one evaluation of the vector field per fraction and step, and as many in the
        reverse sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state, and one more for each row of `interpolant` where
        there is dense output.
    - Dense output (`SaveAt(ts=...)`): by `interpolant`, or cubic Hermite interpolation.

    **Raises:** `ValueError` if the fractions do not sum to one to within 1e-12 or do
    not read the same backwards, if they or the error estimate have a lower order than
    they are said to have, or if the lengths of the arguments do not match. `ValueError`
    or `RuntimeError` with an adaptive step size controller and no `error_weights`.
    """

    composition: Composition = eqx.field(static=True)

    def __init__(
        self,
        fractions: Sequence[int | float],
        order: int,
        *,
        error_weights: Sequence[int | float] | None = None,
        error_order: int | None = None,
        interpolant: Sequence[Sequence[int | float]] | None = None,
        restart: float | None = 0.2,
        grid: float | None = None,
        interpolation: Literal["stages", "hermite"] | None = None,
    ):
        floats = lambda values: tuple(map(float, values))
        self.composition = Composition(
            order=order,
            fractions=floats(fractions),
            error_weights=None if error_weights is None else floats(error_weights),
            error_order=error_order,
            interpolant=None
            if interpolant is None
            else tuple(map(floats, interpolant)),
        )
        check_composition(self.composition)
        self.restart = restart
        self.grid = grid
        self.interpolation = interpolation


ALFComposition.__init__.__doc__ = rf"""**Arguments:**

- `fractions`: $g$, of the step; a sequence of numbers that sum to one and read the same
    backwards.
- `order`: of the composition. Even.
- `error_weights`: $e$, one for each fraction, with sum zero; the error estimate is
    $h \sum_i e_i f_i$, $f_i$ the values of the vector field. Choose them antisymmetric,
    so that the drift of $v$ away from the vector field cancels. Without them, only
    steps that are given.
- `error_order`: the power of the step that the estimate goes with. Together with
    `error_weights`.
- `interpolant`: $P$, a list of rows with one weight for each fraction; dense output is
    $z_0 + \theta (z_1 - z_0)
    + h \theta (1 - \theta) \sum_j (2 \theta - 1)^j \sum_i P_{{ji}} f_i$.
{options}"""
