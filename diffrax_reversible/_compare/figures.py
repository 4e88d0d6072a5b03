"""What a comparison of adjoint methods has found."""

import dataclasses
import textwrap

from jaxtyping import Array, PyTree

from .._adjoint.reversible.monitor import ReversalReport


@dataclasses.dataclass(frozen=True)
class AdjointFigures:
    """What [`diffrax_reversible.compare_adjoints`][] has found of one candidate. Whatever
    could not be found is `None`.

    - `failure`: why there is no gradient; `None` if there is one.
    - `gradient`: like the parameters.
    - `seconds`: of one gradient, compiled; the median of several runs.
    - `compile_seconds`: of tracing and compiling the gradient.
    - `temp_bytes`: temporary memory of the compiled gradient.
    - `num_steps`: how many steps the solve has accepted; the most of all, if the loss
        makes several solves or a batch of them.
    - `difference`: of the gradient from that of the reference, relative to the latter, in
        the Euclidean norm over all parameters.
    - `reversal`: a [`diffrax_reversible.ReversalReport`][], with
        [`diffrax_reversible.ReversibleAdjoint`][] only: of the solve, or of the batch,
        with the largest loss.

    ```python
    figures = compare_adjoints(loss, parameters, candidates).figures["reversible"]
    print(figures.seconds, figures.temp_bytes)
    ```
    """

    failure: str | None = None
    gradient: PyTree[Array] | None = None
    seconds: float | None = None
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    num_steps: int | None = None
    difference: float | None = None
    reversal: ReversalReport | None = None


_columns = (
    "candidate",
    "time",
    "compile time",
    "temp memory",
    "steps",
    "gradient difference",
    "loss of reversal",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What [`diffrax_reversible.compare_adjoints`][] has found. As a string it is a table.

    - `figures`: an [`diffrax_reversible.AdjointFigures`][] for each candidate, by name.
    - `reference`: the name of that with whose gradient the others are compared.

    ```python
    comparison = compare_adjoints(loss, parameters, candidates, verbose=False)
    times = {name: found.seconds for name, found in comparison.figures.items()}
    print(comparison)
    ```
    """

    figures: dict[str, AdjointFigures]
    reference: str

    def __str__(self):
        rows: list[tuple[str, ...]] = [_columns]
        failures = []
        for name, found in self.figures.items():
            if found.failure is None:
                is_reference = name == self.reference
                difference = "(reference)" if is_reference else _small(found.difference)
                rows.append((name, *_costs(found), difference, _reversal(found)))
            else:
                rows.append((name, "failed"))
                text = textwrap.fill(f"{name}: {found.failure}", 88)
                failures.append(textwrap.indent(text, "  ").strip())
        count = len(_columns)
        rows = [row + ("",) * (count - len(row)) for row in rows]
        # A column of which nothing is known says nothing.
        known = [
            j for j in range(count) if any(row[j] not in ("", "-") for row in rows[1:])
        ]
        cells = [[row[j] for j in known] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = [
            "  ".join(
                [name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
            ).rstrip()
            for name, *rest in cells
        ]
        return "\n".join([*lines, *failures])


def _small(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"


def _costs(found: AdjointFigures) -> tuple[str, str, str, str]:
    return (
        "-" if found.seconds is None else _time(found.seconds),
        "-" if found.compile_seconds is None else _time(found.compile_seconds),
        "not available" if found.temp_bytes is None else _size(found.temp_bytes),
        "-" if found.num_steps is None else f"{found.num_steps:,}",
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms"


def _size(number: int) -> str:
    power = min(max(number.bit_length() - 1, 10) // 10, 3)
    return f"{number / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def _reversal(found: AdjointFigures) -> str:
    report = found.reversal
    if report is None:
        return "-"
    return f"{report.loss.max():.1e} of {report.rtol.max():.1e}"
