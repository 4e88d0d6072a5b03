"""The named compositions of asynchronous-leapfrog steps, by order."""

import equinox as eqx
from diffrax import AbstractStratonovichSolver, AbstractTerm
from jaxtyping import PyTree

from .base import AbstractALFComposition, fixed, options
from .coefficients import (
    ALF2,
    ALF4,
    BLANES_MOAN6,
    KAHAN_LI8,
    SOFRONIOU_SPALETTA8,
    YOSHIDA4,
    YOSHIDA6,
)
from .composition import Composition


class ReversibleALF2(AbstractALFComposition, AbstractStratonovichSolver):
    """Two asynchronous-leapfrog half steps: reversible, of order 2.

    For low accuracy, rough vector fields and noisy training, where its short step
    costs least. For a small error use [`diffrax_reversible.ReversibleALF4`][], which
    needs many times fewer evaluations for an error of 1e-7.

    ```python
    diffrax.diffeqsolve(
        terms, ReversibleALF2(), 0.0, 1.0, 0.1, y0, args, adjoint=ReversibleAdjoint()
    )
    ```

    - Order: 2; the error estimate is of order 2 in the step. When used to solve SDEs, it
        converges to the Stratonovich solution.
    - Cost: 2 evaluations of the vector field per step, forwards and in reverse.
    - Memory: two copies of the state.
    - Dense output: cubic Hermite interpolation.
    - Restarts: as the other compositions; the default of `restart` is smaller, as the
        error estimate is larger. At a tolerance of 1e-3 there were 53 restarts in 2046
        steps of van der Pol's oscillator with mu = 5 to T = 40.
    - Source: theorem 3.1 of the reference of
        [`diffrax_reversible.AbstractALFComposition`][].
    """

    composition: Composition = fixed(ALF2)
    restart: float | None = eqx.field(default=0.05, static=True)

    def strong_order(self, terms: PyTree[AbstractTerm]) -> float:
        """One half; with additive or commutative noise the order is one."""
        del terms
        return 0.5


class ReversibleALF4(AbstractALFComposition):
    """A composition of five asynchronous-leapfrog steps: reversible, of order 4.

    The solver to start with. All its stages lie inside the step. For an error below
    about 1e-7 use [`diffrax_reversible.ReversibleALF6`][].

    ```python
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    options = dict(stepsize_controller=controller, adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, ReversibleALF4(), 0.0, 1.0, None, y0, args, **options)
    ```

    - Order: 4; the error estimate is of order 4 in the step. The solver state, a second
        copy of the vector field, is of order 4 where the steps vary smoothly and of
        order 3 where they do not.
    - Cost: 5 evaluations of the vector field per step, forwards and in reverse.
    - Memory: two copies of the state, and three more where there is dense output.
    - Dense output: a polynomial of the stage values, of local order 4. Its error was 0.5
        to 3 times the largest error of the nodes on our test problems.
    - Source: the fractions were derived for this package.
    """

    composition: Composition = fixed(ALF4)


class ReversibleALF6(AbstractALFComposition):
    r"""A composition of twenty asynchronous-leapfrog steps: reversible, of order 6.

    For errors from about 1e-6 to 1e-10 on smooth problems, where it needs about as many
    evaluations as `diffrax.Tsit5`. Its steps are long: for low accuracy and rough
    vector fields use [`diffrax_reversible.ReversibleALF4`][].

    ```python
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-8)
    options = dict(stepsize_controller=controller, adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, ReversibleALF6(), 0.0, 1.0, None, y0, args, **options)
    ```

    - Order: 6; the error estimate is of order 6 in the step.
    - Cost: 20 evaluations of the vector field per step, forwards and in reverse.
    - Memory: two copies of the state, and five more where there is dense output.
    - Dense output: a polynomial of the stage values, of local order 5. Its error was 1
        to 17 times the largest error of the nodes on our test problems. Where that is
        too much, land on the save times with
        `diffrax.ClipStepSizeController(..., step_ts=ts)`.

    ??? cite "Reference"

        The fractions are S10 of table 2 of

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
    """

    composition: Composition = fixed(BLANES_MOAN6)


class ReversibleALF8(AbstractALFComposition):
    """A composition of 42 asynchronous-leapfrog steps: reversible, of order 8.

    For errors below about 1e-10 on smooth problems, in float64. Otherwise use
    [`diffrax_reversible.ReversibleALF6`][].

    ```python
    controller = diffrax.PIDController(rtol=1e-12, atol=1e-12)
    options = dict(stepsize_controller=controller, adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, ReversibleALF8(), 0.0, 1.0, None, y0, args, **options)
    ```

    - Order: 8; the error estimate is of order 8 in the step.
    - Cost: 42 evaluations of the vector field per step, forwards and in reverse.
    - Memory: two copies of the state, and six more where there is dense output.
    - Dense output: a polynomial of the stage values, of local order 7. Its error was 1
        to 26 times the largest error of the nodes on our test problems. Where that is
        too much, land on the save times with
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
        ```
    """

    composition: Composition = fixed(SOFRONIOU_SPALETTA8)


class ReversibleYoshida4(AbstractALFComposition):
    """Yoshida's triple jump, each jump two asynchronous-leapfrog half steps:
    reversible, of order 4.

    To compare with the literature. [`diffrax_reversible.ReversibleALF4`][] needs about
    four times fewer evaluations for the same error.

    ```python
    diffrax.diffeqsolve(
        terms, ReversibleYoshida4(), 0.0, 1.0, 0.1, y0, args, adjoint=ReversibleAdjoint()
    )
    ```

    - Order: 4; the error estimate is of order 4 in the step.
    - Cost: 6 evaluations of the vector field per step, forwards and in reverse. Some are
        outside of the step, by 1.4% of its length.
    - Memory: two copies of the state.
    - Dense output: cubic Hermite interpolation.

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
        ```
    """

    composition: Composition = fixed(YOSHIDA4)


class ReversibleYoshida6(AbstractALFComposition):
    """Yoshida's composition of seven factors, each two asynchronous-leapfrog half
    steps: reversible, of order 6.

    To compare with the literature. [`diffrax_reversible.ReversibleALF6`][] needs two to
    four times fewer evaluations for the same error.

    ```python
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-8, atol=1e-8), step_ts=ts
    )
    diffrax.diffeqsolve(..., solver=ReversibleYoshida6(), stepsize_controller=controller)
    ```

    - Order: 6; the error estimate is of order 6 in the step.
    - Cost: 14 evaluations of the vector field per step, forwards and in reverse.
    - Memory: two copies of the state.
    - Dense output: cubic Hermite interpolation, whose local order is 4 only. Land on the
        save times with `diffrax.ClipStepSizeController(..., step_ts=ts)` instead.
    - Source: solution A of the reference of
        [`diffrax_reversible.ReversibleYoshida4`][].
    """

    composition: Composition = fixed(YOSHIDA6)


class ReversibleYoshida8(AbstractALFComposition):
    """A composition of 17 factors of Yoshida's symmetric kind, found by Kahan and Li,
    each two asynchronous-leapfrog half steps: reversible, of order 8.

    For steps that are given only: it has no error estimate. For adaptive steps use
    [`diffrax_reversible.ReversibleALF8`][].

    ```python
    controller = diffrax.StepTo(ts)
    options = dict(stepsize_controller=controller, adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, ReversibleYoshida8(), ts[0], ts[-1], None, y0, **options)
    ```

    - Order: 8; no error estimate.
    - Cost: 34 evaluations of the vector field per step, forwards and in reverse.
    - Memory: two copies of the state.
    - Dense output: cubic Hermite interpolation, whose local order is 4 only. Land on the
        save times, with `diffrax.StepTo` for example.

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
        ```
    """

    composition: Composition = fixed(KAHAN_LI8)


for _cls in (
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
):
    _cls.__init__.__doc__ = f"**Arguments:**\n{options}"
