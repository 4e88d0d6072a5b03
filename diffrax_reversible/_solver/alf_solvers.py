"""The named compositions of asynchronous-leapfrog steps, and those of users."""

from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx

from .alf import AbstractALFComposition, Interpolation
from .coefficients_high import (
    BLANES_MOAN6,
    KAHAN_LI8,
    SOFRONIOU_SPALETTA8,
    YOSHIDA6,
)
from .coefficients_low import ALF2, ALF4, YOSHIDA4
from .composition import check_composition, Composition


class ReversibleALF2(AbstractALFComposition):
    r"""Two asynchronous-leapfrog half steps: reversible, of order 2.

    For low accuracy, rough vector fields and noisy training, where its short step
    costs least. For a small error use [`diffrax_reversible.ReversibleALF4`][], which
    needs many times fewer evaluations for an error of 1e-7.

    - Order: 2; the error estimate is of order 2 in the step.
    - Cost: 2 evaluations of the vector field per step, and 2 per step in the reverse
        sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state.
    - Dense output (`SaveAt(ts=...)`): cubic Hermite interpolation.

    ??? cite "Reference"

        ```bibtex
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: ClassVar[Composition] = ALF2


class ReversibleALF4(AbstractALFComposition):
    r"""A composition of five asynchronous-leapfrog steps: reversible, of order 4.

    The solver to start with. All its stages lie inside the step. For an error below
    about 1e-7 use [`diffrax_reversible.ReversibleALF6`][].

    - Order: 4; the error estimate is of order 4 in the step. The solver state, a second
        copy of the vector field, is of order 4 where the steps vary smoothly and of
        order 3 where they do not.
    - Cost: 5 evaluations of the vector field per step, and 5 per step in the reverse
        sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state, and three more where there is dense output.
    - Dense output (`SaveAt(ts=...)`): a polynomial of the stage values, of local order
        4. Its error was 0.5 to 3 times the largest error of the nodes on our test
        problems.

    The fractions were derived for this package.

    ??? cite "Reference"

        ```bibtex
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: ClassVar[Composition] = ALF4


class ReversibleALF6(AbstractALFComposition):
    r"""A composition of twenty asynchronous-leapfrog steps: reversible, of order 6.

    For errors from about 1e-6 to 1e-10 on smooth problems, where it needs about as many
    evaluations as `diffrax.Tsit5`. Its steps are long: for low accuracy and rough
    vector fields use [`diffrax_reversible.ReversibleALF4`][].

    - Order: 6; the error estimate is of order 6 in the step.
    - Cost: 20 evaluations of the vector field per step, and 20 per step in the reverse
        sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state, and five more where there is dense output.
    - Dense output (`SaveAt(ts=...)`): a polynomial of the stage values, of local order
        5. Its error was 1 to 17 times the largest error of the nodes on our test
        problems. Where that is too much, land on the save times with
        `diffrax.ClipStepSizeController(..., step_ts=ts)`.

    ??? cite "Reference"

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
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: ClassVar[Composition] = BLANES_MOAN6


class ReversibleALF8(AbstractALFComposition):
    r"""A composition of 42 asynchronous-leapfrog steps: reversible, of order 8.

    For errors below about 1e-10 on smooth problems, in float64. Otherwise use
    [`diffrax_reversible.ReversibleALF6`][].

    - Order: 8; the error estimate is of order 8 in the step.
    - Cost: 42 evaluations of the vector field per step, and 42 per step in the reverse
        sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state, and six more where there is dense output.
    - Dense output (`SaveAt(ts=...)`): a polynomial of the stage values, of local order
        7. Its error was 1 to 26 times the largest error of the nodes on our test
        problems. Where that is too much, land on the save times with
        `diffrax.ClipStepSizeController(..., step_ts=ts)`.

    ??? cite "Reference"

        ```bibtex
        @article{sofroniou2005derivation,
            title={Derivation of symmetric composition constants for symmetric
                   integrators},
            author={Sofroniou, Mark and Spaletta, Giulia},
            journal={Optimization Methods and Software},
            volume={20},
            number={4--5},
            pages={597--613},
            year={2005}
        }
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: ClassVar[Composition] = SOFRONIOU_SPALETTA8


class ReversibleYoshida4(AbstractALFComposition):
    r"""Yoshida's triple jump, each jump two asynchronous-leapfrog half steps:
    reversible, of order 4.

    To compare with the literature. [`diffrax_reversible.ReversibleALF4`][] needs about
    four times fewer evaluations for the same error.

    - Order: 4; the error estimate is of order 4 in the step.
    - Cost: 6 evaluations of the vector field per step, and 6 per step in the reverse
        sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state.
    - Dense output (`SaveAt(ts=...)`): cubic Hermite interpolation.
    - The vector field is evaluated outside the step, too, by 1.4% of its length.

    ??? cite "Reference"

        ```bibtex
        @article{yoshida1990construction,
            title={Construction of higher order symplectic integrators},
            author={Yoshida, Haruo},
            journal={Physics Letters A},
            volume={150},
            number={5--7},
            pages={262--268},
            year={1990}
        }
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: ClassVar[Composition] = YOSHIDA4


class ReversibleYoshida6(AbstractALFComposition):
    r"""Yoshida's composition of seven factors, each two asynchronous-leapfrog half
    steps: reversible, of order 6.

    To compare with the literature. [`diffrax_reversible.ReversibleALF6`][] needs two to
    four times fewer evaluations for the same error.

    - Order: 6; the error estimate is of order 6 in the step.
    - Cost: 14 evaluations of the vector field per step, and 14 per step in the reverse
        sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state.
    - Dense output (`SaveAt(ts=...)`): cubic Hermite interpolation, whose local order is
        4 only. Land on the save times with
        `diffrax.ClipStepSizeController(..., step_ts=ts)` instead.

    ??? cite "Reference"

        ```bibtex
        @article{yoshida1990construction,
            title={Construction of higher order symplectic integrators},
            author={Yoshida, Haruo},
            journal={Physics Letters A},
            volume={150},
            number={5--7},
            pages={262--268},
            year={1990}
        }
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: ClassVar[Composition] = YOSHIDA6


class ReversibleYoshida8(AbstractALFComposition):
    r"""A composition of 17 factors of Yoshida's symmetric kind, found by Kahan and Li,
    each two asynchronous-leapfrog half steps: reversible, of order 8.

    For steps that are given only: it has no error estimate. For adaptive steps use
    [`diffrax_reversible.ReversibleALF8`][].

    - Order: 8; no error estimate.
    - Cost: 34 evaluations of the vector field per step, and 34 per step in the reverse
        sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state.
    - Dense output (`SaveAt(ts=...)`): cubic Hermite interpolation, whose local order is
        4 only. Land on the save times, with `diffrax.StepTo` for example.

    **Raises:** `ValueError` or `RuntimeError` with an adaptive step size controller.

    ??? cite "Reference"

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
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: ClassVar[Composition] = KAHAN_LI8


class ALFComposition(AbstractALFComposition):
    """A composition of asynchronous-leapfrog steps of your own, given by its fractions.

    Use it for a composition that is not among the named ones. The order is yours to
    know: that of the splitting method with these fractions, in which the vector field
    is one operator and the reflection of the off-manifold part the other. With an odd
    number of fractions the solver state has order 2 only, unless further conditions
    hold, as they do for those of [`diffrax_reversible.ReversibleALF4`][].

    - Cost: one evaluation of the vector field per fraction and step, and as many in the
        reverse sweep of [`diffrax_reversible.ReversibleAdjoint`][].
    - Memory: two copies of the state, and one more for each row of `interpolant` where
        there is dense output.

    **Raises:** `ValueError` if the fractions do not sum to one to within 1e-12 or do
    not read the same backwards, if the order is not even, or if the lengths of the
    arguments do not match. `ValueError` or `RuntimeError` with an adaptive step size
    controller and no `error_weights`.
    """

    composition: Composition = eqx.field(static=True)

    def __init__(
        self,
        fractions: Sequence[float],
        order: int,
        error_weights: Sequence[float] | None = None,
        error_order: int | None = None,
        interpolant: Sequence[Sequence[float]] | None = None,
        *,
        damping: float = 0.0,
        grid: float | None = None,
        interpolation: Interpolation | None = None,
    ):
        self.composition = Composition(
            order=order,
            fractions=_floats(fractions),
            error_weights=None if error_weights is None else _floats(error_weights),
            error_order=error_order,
            source="",
            interpolant=(
                None
                if interpolant is None
                else tuple(_floats(row) for row in interpolant)
            ),
        )
        check_composition(self.composition)
        self.damping = damping
        self.grid = grid
        self.interpolation = interpolation


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


_options = r"""
- `damping`: $\gamma \geq 0$. If positive, every step ends with
    $v \leftarrow f + e^{-\gamma h} (v - f)$, $f = f(t_1, z)$, which takes the parasitic
    mode of the method down and keeps its order. For vector fields that contract, like
    $e^{-a t}$: there $v - f$ grows like $e^{a t}$ without it. The forward pass needs
    $\gamma \geq a$; the reverse sweep, which has to undo the damping, wants
    $\gamma \leq 2 a$, and loses digits over a time $T$ like $e^{a T}$ all the same.
    Costs one more evaluation per step.
- `grid`: a power of two $q$. If given, all increments are rounded to multiples of $q$
    (and so is the initial state), with the derivative of the identity: then a step is
    undone bit for bit, as long as the solution and the vector field are below
    $2^{24} q$ in float32 and $2^{53} q$ in float64, which is checked when it is run.
    See [`diffrax_reversible.propose_grid`][]. Not together with `damping`.
- `interpolation`: how `SaveAt(ts=...)` and `SaveAt(dense=True)` interpolate.
    `"stages"`: a polynomial of the stage values, which does not see the drift of $v$
    away from the vector field. `"hermite"`: the cubic through both ends with the
    slopes $v$. `None`: the first where the composition has such a polynomial, else the
    second.
"""

for _cls in (
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
):
    _cls.__init__.__doc__ = f"**Arguments:**\n{_options}"

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
{_options}"""
