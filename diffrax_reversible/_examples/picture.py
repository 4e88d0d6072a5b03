"""The picture that the main job saves."""

from pathlib import Path

import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import Comparison
from .data import Pelts
from .training import NeuralODE


# A colour, a line style and a marker for each candidate of a comparison.
styles = ("C0o-", "C2s--", "C1v-.", "C3^-.", "kD:")


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
    *names, reference = first.figures
    panels = (
        (time_axes, "time of a gradient", "milliseconds", "seconds", 1e3),
        (memory_axes, "temporary memory of a gradient", "KiB", "temp_bytes", 1 / 1024),
    )
    for panel, title, label, field, unit in panels:
        for name, style in zip(
            [*names, reference], [*styles[: len(names)], styles[-1]]
        ):
            ys = [getattr(x.figures[name], field) for x in comparisons.values()]
            if None not in ys:
                ys = [unit * y for y in ys]
                panel.loglog(list(comparisons), ys, style, label=name)
        panel.set_title(title)
        panel.set_xlabel("number of steps")
        panel.set_ylabel(label)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    # A decade for the legend, and one below what hardly grows.
    time_axes.set_ylim(top=30 * time_axes.get_ylim()[1])
    memory_axes.set_ylim(bottom=1)
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
    axes.set_ylim(0, 1.4 * float(jnp.max(pelts.counts)))
    axes.legend(ncols=2, loc="upper center")
