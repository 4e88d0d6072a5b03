"""Compositions of asynchronous-leapfrog steps: what they are and must satisfy."""

import dataclasses
import math

from .order import error_order_of, order_of


@dataclasses.dataclass(frozen=True)
class Composition:
    """A list of fractions `g` of the step `h`, each taken by one asynchronous-leapfrog
    step, and the weights of the quantities that come with it for free.

    - `order`: the order of `z`.
    - `fractions`: `g`; sum to one; palindromic.
    - `error_weights`: `e`; the estimate of the local error is
        `error_scale h sum e_i f_i`. The weights are antisymmetric, so that a drift of
        `v` away from the vector field cancels. `None`: no estimate.
    - `error_order`: the estimate is of this order in `h`.
    - `error_scale`: what makes the tolerance of a controller mean what it means for
        other solvers.
    - `interpolant`: `P`; with `theta` in [0, 1],

        `u = z0 + theta (z1 - z0)
             + h theta (1 - theta) sum_j (2 theta - 1)^j sum_i P[j][i] f_i`

        uses no `v` either. `None`: no such interpolant.
    - `interpolant_order`: the order of its local error.
    """

    order: int
    fractions: tuple[float, ...]
    error_weights: tuple[float, ...] | None = None
    error_order: int | None = None
    interpolant: tuple[tuple[float, ...], ...] | None = None
    interpolant_order: int | None = None
    error_scale: float = 1.0


def _check_finite(name: str, values: tuple[float, ...]) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(
            f"`ALFComposition({name}=...)` must be finite, and they are {values}."
        )


def check_composition(composition: Composition) -> None:
    """Raises `ValueError` for a composition that is not what it says."""
    order, g = composition.order, composition.fractions
    e, error_order = composition.error_weights, composition.error_order
    P = composition.interpolant
    if len(g) == 0:
        raise ValueError("`ALFComposition(fractions=...)` needs at least one fraction.")
    _check_finite("fractions", g)
    if abs(math.fsum(g) - 1) > 1e-12:
        raise ValueError(
            "`ALFComposition(fractions=...)` must sum to one, to within 1e-12, and "
            f"they sum to {math.fsum(g)!r}. Give them to double precision; the last "
            "one may be computed as one minus the others."
        )
    if any(abs(a - b) > 1e-12 for a, b in zip(g, reversed(g))):
        raise ValueError(
            "`ALFComposition(fractions=...)` must read the same backwards, and "
            f"`{g}` do not. Only a palindromic composition is symmetric in time, and "
            "so of even order."
        )
    if order < 2 or order % 2 != 0:
        raise ValueError(
            "`ALFComposition(order=...)` must be a positive even number, as the order "
            f"of every palindromic composition is, and it is {order}."
        )
    if (found := order_of(g, order)) < order:
        raise ValueError(
            f"`ALFComposition(fractions, order={order})`: the order of these fractions "
            f"is {found}. Say `order={found}`, or give the fractions to double "
            "precision, if that is what they lack."
        )
    if (e is None) != (error_order is None):
        raise ValueError(
            "`ALFComposition(error_weights=..., error_order=...)`: give both, for "
            "adaptive steps, or neither, for steps that are given."
        )
    if e is not None and error_order is not None:
        _check_finite("error_weights", e)
        if len(e) != len(g):
            raise ValueError(
                "`ALFComposition(error_weights=...)` must have one weight for each of "
                f"the {len(g)} fractions, and has {len(e)}."
            )
        if abs(math.fsum(e)) > 1e-10 * math.fsum(map(abs, e)):
            raise ValueError(
                "`ALFComposition(error_weights=...)` must sum to zero, so that the "
                "estimate vanishes where the vector field is constant, and they sum to "
                f"{math.fsum(e)!r}."
            )
        if error_order < 1:
            raise ValueError(
                "`ALFComposition(error_order=...)` must be a positive number, the "
                f"power of the step that the estimate goes with; it is {error_order}."
            )
        if (found := error_order_of(g, e, error_order)) < error_order:
            raise ValueError(
                f"`ALFComposition(error_weights=..., error_order={error_order})`: this "
                f"estimate goes with the power {found} of the step. Say "
                f"`error_order={found}`."
            )
    if P is not None:
        for row in P:
            _check_finite("interpolant", row)
        if len(P) == 0 or any(len(row) != len(g) for row in P):
            raise ValueError(
                "`ALFComposition(interpolant=...)` must have one or more rows, each "
                f"with one weight for each of the {len(g)} fractions."
            )
