"""The documentation's table of solvers, made from the classes. Run it to bring the page
up to date: `python -m tests.solver_table`."""

import re
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp

import diffrax_reversible
from diffrax_reversible import (
    AbstractALFComposition,
    AbstractReversibleSolver,
    ALF,
    ALFComposition,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
)

from .measure import Counter


PAGE = Path(__file__).parents[1] / "docs" / "which_solver.md"
SOLVERS = (
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleALF2,
    ALF,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
)
_block = re.compile(r"(<!-- solvers -->\n).*?(<!-- end of solvers -->)", re.S)


def evaluations(solver: AbstractReversibleSolver) -> int:
    """Of the vector field, in one step, counted."""
    counter = Counter()
    term = diffrax.ODETerm(counter.field())
    y0, v0 = jnp.array(1.0), jnp.array(-1.0)
    jax.jit(lambda: solver.step(term, 0.0, 0.1, y0, y0, v0, False)[0])()
    jax.effects_barrier()
    return counter.evaluations


def _estimate(solver) -> str:
    if isinstance(solver, AbstractALFComposition):
        order = solver.composition.error_order
        return "none: given steps only" if order is None else f"order {order}"
    return f"order {solver.error_order(None)}"


def _dense(solver) -> str:
    if isinstance(solver, AbstractALFComposition):
        order = solver.composition.interpolant_order
        if order is not None:
            return f"stages, local order {order}"
    return "Hermite, local order 4" if solver.order(None) > 2 else "Hermite"


def _when(cls) -> str:
    """The first sentence of the second paragraph of the docstring that is prose."""
    paragraphs = [" ".join(p.split()) for p in cls.__doc__.split("\n\n")]
    prose = re.compile(r"(For|To|The solver to|Use it) ")
    (first, *_) = [p for p in paragraphs[1:] if prose.match(p)]
    sentence = re.split(r"(?<=[a-z0-9`])\. ", first)[0].rstrip(".")
    return sentence[0].lower() + sentence[1:]


def table() -> str:
    rows = [
        "| solver | order | evaluations per step | error estimate | dense output "
        "| when |",
        "|---|---|---|---|---|---|",
    ]
    for cls in SOLVERS:
        solver = cls()
        assert getattr(diffrax_reversible, cls.__name__) is cls
        rows.append(
            f"| `{cls.__name__}` | {solver.order(None)} | {evaluations(solver)} "
            f"| {_estimate(solver)} | {_dense(solver)} | {_when(cls)} |"
        )
    rows.append(
        "| `ALFComposition` | yours | one per fraction | yours | yours, or Hermite "
        f"| {_when(ALFComposition)} |"
    )
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    assert len(_block.findall(text)) == 1
    return _block.sub(lambda m: m[1] + table() + m[2], text)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
