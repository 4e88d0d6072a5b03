"""The table of diffrax's examples in the documentation, measured. Run it to make the table
anew, or those of its rows whose name holds one of the words given:

    python -m tests.benchmarks.diffrax_examples_table [WORD ...]
"""

import functools as ft
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from diffrax_reversible._compare.measure import in_turn, temp_bytes

from .diffrax_examples import Example, EXAMPLES


TABLE = Path(__file__).parents[2] / "docs" / "_tables" / "diffrax_examples.md"
DTYPES = jnp.float32, jnp.float64


class Measured(NamedTuple):
    """What a derivative takes with our adjoint method and, second, with diffrax's.

    - `seconds`: medians.
    - `time_ratio`: the median of the ratios of what was timed one after the other.
    - `temp_bytes`: temporary memory.
    - `difference`: of the two derivatives, relative, in the Euclidean norm.
    """

    seconds: tuple[float, float]
    time_ratio: float
    temp_bytes: tuple[int, int]
    difference: float

    @property
    def memory_ratio(self):
        ours, theirs = self.temp_bytes
        return ours / theirs


def measure(example: Example, dtype) -> Measured:
    function, parameters = example.make(example.solver, dtype)

    def compiled(adjoint):
        f = example.derivative(lambda parameters: function(parameters, adjoint))
        return jax.jit(f).lower(parameters).compile()

    programs = [
        compiled(example.adjoint),
        compiled(diffrax.RecursiveCheckpointAdjoint()),
    ]
    ours, theirs = (ravel_pytree(program(parameters))[0] for program in programs)
    difference = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
    runs = [ft.partial(program, parameters) for program in programs]
    # The first two for their time, of which there is to be about a second in all.
    ((seconds,), _) = in_turn(runs, 1)
    repeats = min(max(9, round(0.5 / seconds)), 99)
    times = in_turn(runs, repeats)
    ratios = [x / y for x, y in zip(*times)]
    memory = [temp_bytes(program) for program in programs]
    return Measured(
        tuple(map(statistics.median, times)),
        statistics.median(ratios),
        tuple(memory),
        float(difference),
    )


_columns = (
    "example",
    "solver",
    "dtype",
    "time (ms)",
    "of diffrax's",
    "temp memory (kB)",
    "of diffrax's",
    "difference",
)
_heading = [f"| {' | '.join(_columns)} |", "|---" * len(_columns) + "|"]


def _start_of(example: Example, dtype) -> str:
    solver = type(example.solver).__name__
    return f"| {example.name} | `{solver}` | {dtype.__name__} "


def row(example: Example, dtype) -> str:
    found = measure(example, dtype)
    ms = " / ".join(f"{1e3 * x:.3g}" for x in found.seconds)
    kb = " / ".join(f"{x / 1e3:,.0f}" for x in found.temp_bytes)
    return (
        f"{_start_of(example, dtype)}| {ms} | {found.time_ratio:.2f} | {kb} "
        f"| {found.memory_ratio:.2f} | {found.difference:.0e} |"
    )


def main(words) -> None:
    old = TABLE.read_text().splitlines() if TABLE.exists() else []
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    starts = {
        _start_of(example, dtype): (example, dtype)
        for example in EXAMPLES
        for dtype in DTYPES
    }
    rows = {start: line for start in starts for line in old if line.startswith(start)}
    for start, case in starts.items():
        if not words or any(word in start for word in words):
            rows[start] = row(*case)
            print(rows[start], flush=True)
            lines = [rows[start] for start in starts if start in rows]
            TABLE.write_text("\n".join([*_heading, *lines]) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1:])
