"""The Stormer-Verlet method."""

from typing import ClassVar

from ..alf.coefficients import ALF2
from ..alf.composition import Composition
from .composition import AbstractSymplecticComposition


class StormerVerlet(AbstractSymplecticComposition):
    r"""The Stormer-Verlet method in its position form ("drift, kick, drift"), also known
    as the leapfrog method of molecular dynamics: symplectic and reversible, of order 2.

    For a pair of terms `(f, g)` and a state `(q, p)`, as
    [`diffrax.SemiImplicitEuler`][] takes them, a step is

    $q \leftarrow q + \tfrac{h}{2} f(p), \quad p \leftarrow p + h g(q), \quad
     q \leftarrow q + \tfrac{h}{2} f(p)$

    Use it for Hamiltonian systems over long times, like n-body problems. For higher
    accuracy see [`diffrax_reversible.SymplecticComposition4`][]. Do not use it where the
    steps must adapt: it has no error estimate.

    ```python
    terms = diffrax.ODETerm(velocity), diffrax.ODETerm(force)
    options = dict(adjoint=ReversibleAdjoint())
    diffrax.diffeqsolve(terms, StormerVerlet(), 0.0, 100.0, 0.01, (q, p), args, **options)
    ```

    `SaveAt(ts=...)` and dense output are linear between the steps, of second order. Let
    the steps land on the times, with `StepTo` or `SaveAt(steps=...)`, where that is not
    enough.

    **Cost** per step: two evaluations of `f` and one of `g`; again in the reverse sweep,
    with one vector-Jacobian product each. Memory: that of one evaluation.

    ??? cite "Reference"

        ```bibtex
        @article{hairer2003geometric,
            author={Hairer, Ernst and Lubich, Christian and Wanner, Gerhard},
            title={Geometric numerical integration illustrated by the
                   {S}t{\"o}rmer--{V}erlet method},
            journal={Acta Numerica},
            volume={12},
            pages={399--450},
            year={2003}
        }
        ```
    """

    composition: ClassVar[Composition] = ALF2


StormerVerlet.__init__.__doc__ = """**Arguments:** None"""
