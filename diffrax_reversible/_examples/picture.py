"""The picture that the main job saves."""

from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure

from .data import Pelts
from .training import NeuralODE


def save_picture(model: NeuralODE, pelts: Pelts, path: Path) -> None:
    """Draw the data, the fit and the accepted steps into a PNG file."""
    t1 = pelts.ts[-1]
    fine = jnp.linspace(0.0, t1, 500)
    fit = pelts.unstandardise(model.states(fine))
    step_ts, step_states = model.accepted_steps(t1)
    step_counts = pelts.unstandardise(step_states)

    # A Figure by itself draws with Agg: no display, no global state of pyplot.
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for column, (animal, colour) in enumerate((("hare", "C0"), ("lynx", "C1"))):
        axes.plot(
            pelts.first_year + pelts.ts,
            pelts.counts[:, column],
            "o",
            color=colour,
            label=f"{animal}: data",
        )
        axes.plot(
            pelts.first_year + fine,
            fit[:, column],
            color=colour,
            label=f"{animal}: fit",
        )
        axes.plot(
            pelts.first_year + step_ts,
            step_counts[:, column],
            "|",
            markersize=12,
            color=colour,
            label=f"{animal}: accepted steps",
        )
    axes.set_xlabel("year")
    axes.set_ylabel("pelts (thousands)")
    axes.set_xticks(range(pelts.first_year, pelts.first_year + len(pelts.ts), 4))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, format="png", dpi=150)
