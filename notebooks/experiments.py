"""What the notebooks that redo the papers' experiments have in common: a switch for
short runs, data files, training, timing, memory, tables, and the style of the pictures.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import optax
from cycler import cycler


_folder = Path(__file__).resolve().parent


def full_run(default: bool = True) -> bool:
    """Whether a notebook runs in full. `NOTEBOOKS_FULL=0` in the environment makes it
    short, as the tests do, and `NOTEBOOKS_FULL=1` full, whatever `default` is."""
    setting = os.environ.get("NOTEBOOKS_FULL", "1" if default else "0")
    if setting not in ("0", "1"):
        raise ValueError(f"`NOTEBOOKS_FULL` must be 0 or 1; got {setting!r}.")
    return setting == "1"


def data_file(name: str) -> Path:
    """A file of `notebooks/data`, wherever the notebook is run."""
    return _folder / "data" / name


class Trained(NamedTuple):
    """Parameters after training, the loss before every epoch, and the seconds that
    compiling and running took. With several seeds the first axis is that of the seeds.
    """

    parameters: Any
    losses: jax.Array
    compile_seconds: float
    seconds: float


def train(
    loss: Callable[[Any], jax.Array],
    parameters: Any,
    optimiser: optax.GradientTransformation,
    epochs: int,
    *,
    seeds: bool = False,
) -> Trained:
    """Minimises `loss(parameters)` in `epochs` updates, as one compiled program.

    With `seeds=True` the leaves of `parameters` have a leading axis, one element for
    each seed, and all seeds are trained at once; use one seed where time is measured.
    """

    def epoch(carry, _):
        parameters, state = carry
        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, state = optimiser.update(gradient, state, parameters)
        return (optax.apply_updates(parameters, updates), state), value

    def run(parameters):
        carry = parameters, optimiser.init(parameters)
        (parameters, _), losses = jax.lax.scan(epoch, carry, length=epochs)
        return parameters, losses

    start = time.perf_counter()
    program = jax.jit(jax.vmap(run) if seeds else run).lower(parameters).compile()
    compiled = time.perf_counter()
    trained, losses = jax.block_until_ready(program(parameters))
    end = time.perf_counter()
    return Trained(trained, losses, compiled - start, end - compiled)


def compiled_gradient(loss: Callable[..., jax.Array], *arguments: Any) -> Any:
    """The value of `loss` and its gradient with respect to the first argument, compiled
    for `arguments`."""
    return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()


def memory(compiled: Any) -> int:
    """The temporary memory of a compiled function, in bytes."""
    return compiled.memory_analysis().temp_size_in_bytes


def in_turn(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 11,
    seconds_each: float = 5.0,
) -> dict[str, float]:
    """Median seconds of a call of each function.

    After a first call of each they are called in turn, so that whatever else the
    machine does befalls all alike. A function that has used up its `seconds_each`
    takes no part in further rounds, but is called twice at least, the first call
    included.
    """
    first = {}
    for name, function in functions.items():
        start = time.perf_counter()
        jax.block_until_ready(function())
        first[name] = time.perf_counter() - start
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if times[name] and first[name] + sum(times[name]) > seconds_each:
                continue
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows below the names of their columns: the first column to the left, the
    others to the right. Numbers are rounded to three digits, `None` is a dash."""

    def text(entry):
        if entry is None:
            return "-"
        if isinstance(entry, (bool, int, str)):
            return str(entry)
        return f"{float(entry):.3g}"

    cells = [list(columns)] + [[text(entry) for entry in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            entry.rjust(width) if i else entry.ljust(width)
            for i, (entry, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    print("\n".join(lines))


def use_style() -> None:
    """Pictures in which series are told apart by colour, line and marker, so also in
    print."""
    # Okabe and Ito's colours, which the colour-blind can tell apart.
    colours = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
    lines = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]
    markers = ["o", "s", "^", "D", "v", "x"]
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=colours, linestyle=lines, marker=markers),
            "axes.grid": True,
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "grid.alpha": 0.3,
            "legend.fontsize": "small",
            "lines.markersize": 4,
        }
    )
