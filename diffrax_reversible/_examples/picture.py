"""The picture that the main job saves."""

from pathlib import Path

import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import Comparison
from .data import Pelts
from .training import NeuralODE


# A colour, a line style and a marker for each candidate of a comparison.
styles = ("C0o-", "C2s--", "kD:")


def save_picture(
    model: NeuralODE, pelts: Pelts, comparisons: dict[int, Comparison], path: Path
) -> None:
    """Draw what gradients cost, and the data, the fit and the accepted steps, into a PNG
    file."""
    # A Figure by itself draws with Agg: no display, no global state of pyplot.
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplot_mosaic([["time", "memory"], ["fit", "fit"]])
    draw_costs(axes["time"], axes["memory"], comparisons)
    _draw_fit(axes["fit"], model, pelts)
    figure.savefig(path, format="png", dpi=150)


def draw_costs(
    time_axes: Axes, memory_axes: Axes, comparisons: dict[int, Comparison]
) -> None:
    """Time and memory of a gradient against the number of steps."""
    first, *_ = comparisons.values()
    panels = (
        (time_axes, "time of a gradient", "seconds", "seconds"),
        (memory_axes, "temporary memory of a gradient", "bytes", "temp_bytes"),
    )
    for panel, title, label, field in panels:
        for name, style in zip(first.figures, styles):
            ys = [getattr(x.figures[name], field) for x in comparisons.values()]
            if None not in ys:
                panel.loglog(list(comparisons), ys, style, label=name)
        panel.set_title(title)
        panel.set_xlabel("number of steps")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    time_axes.legend()


def _draw_fit(axes: Axes, model: NeuralODE, pelts: Pelts) -> None:
    t1 = pelts.ts[-1]
    fine = jnp.linspace(0.0, t1, 500)
    fit = pelts.unstandardise(model.states(fine))
    step_ts, step_states = model.accepted_steps(t1)
    step_counts = pelts.unstandardise(step_states)
    for column, (animal, style) in enumerate((("hare", "C0-"), ("lynx", "C1--"))):
        colour, marker = style[:2], "os"[column]
        axes.plot(
            pelts.first_year + pelts.ts,
            pelts.counts[:, column],
            marker,
            color=colour,
            label=f"{animal}: data",
        )
        axes.plot(
            pelts.first_year + fine, fit[:, column], style, label=f"{animal}: fit"
        )
        axes.plot(
            pelts.first_year + step_ts,
            step_counts[:, column],
            "|",
            markersize=12,
            color=colour,
            label=f"{animal}: accepted steps",
        )
    axes.set_title("a neural ODE on the lynx and hare pelts of Hudson Bay")
    axes.set_xlabel("year")
    axes.set_ylabel("pelts (thousands)")
    axes.set_xticks(range(pelts.first_year, pelts.first_year + len(pelts.ts), 4))
    axes.set_ylim(bottom=0)
    axes.legend(ncols=2)
