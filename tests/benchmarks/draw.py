"""Tables and pictures of what the benchmarks measured.

    python -m tests.benchmarks.draw results.json --output FOLDER

prints a table in Markdown, one row per case, and saves pictures for each problem: error
against time, and time and memory against the number of steps where there are several.
"""

import argparse
import json
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D


_solvers = (
    "ReversibleALF2",
    "ReversibleALF4",
    "ReversibleALF6",
    "Reversible(Tsit5)",
    "Tsit5",
    "Dopri5",
    "Midpoint",
)
# A line style and a marker for each.
_adjoints = {
    "ReversibleAdjoint": ("-", "o"),
    "SymplecticAdjoint": ("-", "s"),
    "RecursiveCheckpointAdjoint": ("--", "^"),
    "RecursiveCheckpointAdjoint(2)": (":", "2"),
    "RecursiveCheckpointAdjoint(8)": (":", "x"),
    "RecursiveCheckpointAdjoint(32)": (":", "+"),
    "RecursiveCheckpointAdjoint(all)": (":", "*"),
    "BacksolveAdjoint": ("-.", "v"),
    "DirectAdjoint": ("-.", "D"),
}


def read(path):
    """One dictionary for each case: what is in `extra_info`."""
    results = json.loads(Path(path).read_text())
    return [benchmark["extra_info"] for benchmark in results["benchmarks"]]


#
# Tables
#


def _seconds(x):
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if x * factor >= 1:
            break
    return f"{x * factor:.3g} {unit}"


def _bytes(x):
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")):
        if x >= factor:
            break
    return f"{x / factor:.3g} {unit}"


_columns = {
    "problem": ("problem", str),
    "steps": ("num_steps", "{:,}".format),
    "solver": ("solver", str),
    "adjoint": ("adjoint", str),
    "gradient": ("gradient_seconds", _seconds),
    "forward": ("forward_seconds", _seconds),
    "compilation": ("compile_seconds", _seconds),
    "temp memory": ("temp_bytes", _bytes),
    "error": ("gradient_error", "{:.1e}".format),
    "evaluations": ("evaluations", "{:,}".format),
    "vjps": ("vjps", "{:,}".format),
    "over n s (2F + B)": ("ratio", "{:.2f}".format),
}


def table(rows):
    """As Markdown. Steps are constant, the batch in one state, unless it says "PID":
    then each element of a vmapped batch has its own, and the number is the largest."""
    lines = ["| " + " | ".join(_columns) + " |", "|---" * len(_columns) + "|"]
    order = lambda row: (row["problem"], row["vmapped"])
    for row in sorted(rows, key=order):
        cells = []
        for key, show in _columns.values():
            cell = "n/a" if row[key] is None else show(row[key])
            cells.append(
                f"PID, {cell}" if key == "num_steps" and row["vmapped"] else cell
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


#
# Pictures
#


def _line(row):
    style, marker = _adjoints[row["adjoint"]]
    colour = f"C{_solvers.index(row['solver'])}"
    return dict(color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1)


def _draw_lines(axes, rows, x, y, factor=1):
    """One line for each solver and adjoint, from the fewest steps to the most."""
    for method in dict.fromkeys((row["solver"], row["adjoint"]) for row in rows):
        line = [row for row in rows if (row["solver"], row["adjoint"]) == method]
        line = sorted(line, key=lambda row: row["num_steps"])
        line = [row for row in line if row[y] is not None]
        if line:
            ys = [row[y] * factor for row in line]
            axes.plot([row[x] for row in line], ys, **_line(line[0]))
    # Whole decades, so that small differences look small.
    decades = lambda low, high: (
        10 ** math.floor(math.log10(low)) / 1.5,
        10 ** math.ceil(math.log10(high)) * 1.5,
    )
    axes.set(xscale="log", yscale="log")
    if axes.lines:
        axes.set_xlim(decades(*axes.dataLim.intervalx))
        axes.set_ylim(decades(*axes.dataLim.intervaly))
    axes.grid(color="0.9")


def _add_legend(figure, rows):
    """Colours are solvers; line styles and markers are adjoints."""
    solvers = [x for x in _solvers if any(row["solver"] == x for row in rows)]
    adjoints = [x for x in _adjoints if any(row["adjoint"] == x for row in rows)]
    heading = lambda label: Line2D([], [], linestyle="", label=label)
    handles = [heading("Solver")]
    for x in solvers:
        colour = f"C{_solvers.index(x)}"
        handles.append(Line2D([], [], color=colour, linewidth=3, label=x))
    handles.append(heading("Adjoint"))
    for x in adjoints:
        style, marker = _adjoints[x]
        line = Line2D([], [], color="0.3", linestyle=style, marker=marker, label=x)
        handles.append(line)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def draw_steps(rows, path):
    """Gradient time and temporary memory against the number of steps."""
    # Of diffrax's solvers one is enough: the others differ by their stages.
    rows = [row for row in rows if row["solver"] not in ("Dopri5", "Midpoint")]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_lines(left, rows, "num_steps", "gradient_seconds")
    _draw_lines(right, rows, "num_steps", "temp_bytes", 1e-6)
    for axes in (left, right):
        axes.set_xlabel("steps")
    left.set_ylabel("time of a gradient (s)")
    right.set_ylabel("temporary memory (MB)")
    figure.suptitle(rows[0]["problem"])
    _add_legend(figure, rows)
    figure.savefig(path, dpi=150)


def draw_accuracy(rows, path):
    """Error of a gradient against its time, for the number of steps along a line."""
    # With checkpoints of a given number, errors are the same and times are longer.
    rows = [row for row in rows if not row["adjoint"].endswith(")")]
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_lines(axes, rows, "gradient_seconds", "gradient_error")
    axes.set_xlabel("time of a gradient (s)")
    axes.set_ylabel("relative error of the gradient")
    figure.suptitle(rows[0]["problem"])
    _add_legend(figure, rows)
    figure.savefig(path, dpi=150)


def draw(rows, folder):
    """Returns the paths of the pictures. Steps of vmapped elements are their own, so
    that these cases are in the table only."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if not row["vmapped"]]
    paths = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        some = [row for row in rows if row["problem"] == problem]
        pictures = {"accuracy": draw_accuracy}
        if len({row["num_steps"] for row in some}) > 1:
            pictures["steps"] = draw_steps
        for name, draw_one in pictures.items():
            paths.append(folder / f"{problem}_{name}.png")
            draw_one(some, paths[-1])
    return paths


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Tables and pictures of benchmarks.")
    parser.add_argument("results", type=Path, help="the file of --benchmark-json")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    options = parser.parse_args(arguments)
    rows = read(options.results)
    print(table(rows))
    for path in draw(rows, options.output):
        print(f"Picture: {path}")


if __name__ == "__main__":
    main()
