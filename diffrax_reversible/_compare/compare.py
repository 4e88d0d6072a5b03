"""Gradients with several solvers and adjoint methods, side by side."""

import dataclasses
import logging
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from diffrax import AbstractAdjoint, AbstractSolver
from jaxtyping import Array, PyTree, Scalar

from .._adjoint import ReversibleAdjoint
from .._checks import check_integer
from .._loop.state import num_accepted
from .figures import AdjointFigures, Comparison
from .measure import in_turn, temp_bytes


class _Watched(AbstractAdjoint):
    """An adjoint method, of whose solves the accepted steps are counted."""

    adjoint: AbstractAdjoint
    numbers: Callable[[Any], Any] = eqx.field(static=True)

    def loop(self, **options):
        final_state, stats = self.adjoint.loop(**options)
        jax.debug.callback(self.numbers, num_accepted(final_state))
        return final_state, stats


def compare_adjoints(
    loss: Callable[[PyTree, AbstractSolver, AbstractAdjoint], Scalar],
    parameters: PyTree,
    candidates: Mapping[str, tuple[AbstractSolver, AbstractAdjoint]],
    *,
    reference: str | None = None,
    repeats: int = 11,
    verbose: bool = True,
) -> Comparison:
    """Measures gradients of a loss with several solvers and adjoint methods: on your
    problem, and on your device.

    ```python
    def loss(parameters, solver, adjoint):
        solution = diffrax.diffeqsolve(terms, solver, ..., adjoint=adjoint)
        return jnp.sum(solution.ys**2)

    compare_adjoints(
        loss,
        parameters,
        {
            "checkpoints": (diffrax.Tsit5(), diffrax.RecursiveCheckpointAdjoint()),
            "symplectic": (diffrax.Tsit5(), SymplecticAdjoint()),
            "reversible": (ReversibleALF4(), ReversibleAdjoint()),
        },
    )
    ```

    Use it before a long training, to choose. What is measured is a gradient as a whole,
    solve and all, with compiled programs: the median time of several runs, that are
    taken in turn, so that what disturbs one candidate disturbs all; the time to compile;
    and temporary memory. Times of compiling are those of this process: what one
    candidate compiles another one may find done, and a persistent cache of JAX has them
    all. On a machine that does something else at the same time, do not look at small
    differences.

    Candidates with the same solver have the same solution, and the differences of their
    gradients are those of the adjoint methods: of rounding, with an exact one. With
    different solvers they are differences of the solutions, too.

    A candidate that fails, when it is traced or when it is run, does not end the
    comparison, but has a row that says why. Neither does one whose gradient is not
    finite, which is measured as others are.

    **Arguments:**

    - `loss`: A function of `(parameters, solver, adjoint)` that returns a real scalar.
        It is compiled: it must be a pure function, with static shapes.
    - `parameters`: A pytree. Its floating-point arrays are differentiated; what is not an
        array, as in an `equinox.Module`, is handed on as it is.
    - `candidates`: A dictionary from names to pairs `(solver, adjoint)`.
    - `reference`: The name of the candidate with whose gradient the others are compared.
        `None`: the first.
    - `repeats`: How often to run each gradient.
    - `verbose`: Whether to print the table.

    **Returns:** a [`diffrax_reversible.Comparison`][], which has the figures, and is the
    table if it is printed.

    **Cost:** for each candidate the gradient is compiled, and run `repeats + 2` times.
    Besides, the loss is compiled and run once, to count the steps; or instead, with
    `ReversibleAdjoint`, the gradient, to see how well it undoes them.

    **Raises:** `ValueError` if there are no candidates, if `reference` is not one of them,
    and if `repeats` is not a positive integer.
    """
    check_integer("compare_adjoints", "repeats", repeats)
    if len(candidates) == 0:
        raise ValueError("`compare_adjoints(candidates=...)` must not be empty.")
    reference = next(iter(candidates)) if reference is None else reference
    if reference not in candidates:
        raise ValueError(
            f"`compare_adjoints(reference={reference!r})` must be one of the candidates: "
            f"{', '.join(map(repr, candidates))}."
        )
    differentiated, rest = eqx.partition(parameters, eqx.is_inexact_array)

    def value_of(solver, adjoint):
        return lambda x: loss(eqx.combine(x, rest), solver, adjoint)

    figures, compiled = {}, {}
    for name, (solver, adjoint) in candidates.items():
        try:
            found, run = _gradient(value_of(solver, adjoint), differentiated)
        except Exception as error:
            figures[name] = AdjointFigures(failure=_why(error))
            continue
        if isinstance(adjoint, ReversibleAdjoint):
            more = _reversal(value_of, solver, adjoint, differentiated)
        else:
            more = _count_steps(value_of, solver, adjoint, differentiated)
        figures[name], compiled[name] = dataclasses.replace(found, **more), run
    times = in_turn([lambda f=f: f(differentiated) for f in compiled.values()], repeats)
    true = figures[reference].gradient
    for name, seconds in zip(compiled, times):
        gradient = figures[name].gradient
        difference = None if true is None else _difference(gradient, true)
        more = dict(seconds=statistics.median(seconds), difference=difference)
        figures[name] = dataclasses.replace(figures[name], **more)
    comparison = Comparison(figures, reference)
    if verbose:
        print(comparison)
    return comparison


def _gradient(value: Callable, x: PyTree) -> tuple[AdjointFigures, Callable]:
    """The gradient and what it takes to compile it; and the compiled function."""
    start = time.perf_counter()
    compiled = jax.jit(jax.grad(value)).lower(x).compile()
    seconds = time.perf_counter() - start
    figures = AdjointFigures(
        gradient=_quietly(compiled, x),
        compile_seconds=seconds,
        temp_bytes=temp_bytes(compiled),
    )
    return figures, compiled


def _quietly(fn: Callable, x: PyTree) -> PyTree:
    """`fn(x)`. JAX logs errors of callbacks; here they are found in the table."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        return jax.block_until_ready(fn(x))
    finally:
        logging.disable(level)


def _count_steps(value_of, solver, adjoint, x) -> dict[str, Any]:
    numbers = []
    watched = _Watched(adjoint, lambda n: numbers.append(int(n)))
    jax.block_until_ready(jax.jit(value_of(solver, watched))(x))
    jax.effects_barrier()
    return dict(num_steps=max(numbers, default=None))


def _reversal(value_of, solver, adjoint, x) -> dict[str, Any]:
    reports = []
    watched = dataclasses.replace(adjoint, monitor=reports.append)
    jax.block_until_ready(jax.jit(jax.grad(value_of(solver, watched)))(x))
    worst = max(reports, key=lambda report: report.loss.max(), default=None)
    numbers = [int(report.num_steps.max()) for report in reports]
    return dict(reversal=worst, num_steps=max(numbers, default=None))


def _difference(gradient: PyTree[Array], true: PyTree[Array]) -> float:
    flat = lambda tree: np.concatenate(
        [np.zeros(0), *[np.ravel(x).astype(_wide(x)) for x in jax.tree.leaves(tree)]]
    )
    gradient, true = flat(gradient), flat(true)
    size = np.linalg.norm(true)
    return float(np.linalg.norm(gradient - true) / (1 if size == 0 else size))


def _wide(x: Array) -> type:
    return np.complex128 if np.iscomplexobj(x) else np.float64


def _why(error: Exception) -> str:
    """The first paragraph of an error, without the frames around it."""
    text = str(error)
    inside = re.search(r"(?s)EquinoxRuntimeError: (.*)", text)
    kind = "RuntimeError" if inside else type(error).__name__
    text = inside[1] if inside else text
    paragraph = re.split(r"\n\s*\n|\n-----", text.strip(), maxsplit=1)[0]
    return f"{kind}: {' '.join(paragraph.split())}"
