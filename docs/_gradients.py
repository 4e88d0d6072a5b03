"""Draws the picture of README and of the documentation's first page, in about two
minutes: `python docs/_gradients.py`, on a machine that does nothing else."""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    ReversibleALF4,
    SymplecticAdjoint,
)
from diffrax_reversible._examples import long_solve, picture


def _contracting(t, y, args):
    slow = args[0] * jnp.cos(t) * y[2]
    return jnp.stack(
        [-4 * y[0] + slow, -4 * y[1] + args[1] * y[0] * y[2], 0.1 * args[1] * y[0]]
    )


def _gradient(solver, adjoint):
    @jax.jit
    def run(t1):
        def loss(y0, args):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(_contracting),
                solver,
                0.0,
                t1,
                0.02,
                y0,
                args,
                stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
                adjoint=adjoint,
                max_steps=8192,
                throw=False,
            )
            return jnp.sum(solution.ys**2)

        y0, args = jnp.array([1.0, 0.5, 1.0]), jnp.array([1.0, 1.5])
        return jnp.concatenate(jax.grad(loss, (0, 1))(y0, args))

    return run


def _draw_contraction(axes):
    tsit5 = diffrax.Tsit5()
    methods = {
        "ReversibleALF4, ReversibleAdjoint": (ReversibleALF4(), ReversibleAdjoint()),
        "Tsit5, SymplecticAdjoint": (tsit5, SymplecticAdjoint()),
        "Reversible(Tsit5, restart=None)": (
            Reversible(tsit5, restart=None),
            ReversibleAdjoint(on_failure="nan"),
        ),
        "Tsit5, BacksolveAdjoint": (tsit5, diffrax.BacksolveAdjoint()),
    }
    lengths = jnp.array([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0])
    reference = _gradient(diffrax.Dopri8(), diffrax.RecursiveCheckpointAdjoint())
    right = [reference(t1) for t1 in lengths]
    styles = picture.styles[:2] + ("C4P:",) + picture.styles[3:]
    for (name, method), style in zip(methods.items(), styles):
        run = _gradient(*method)
        errors = [
            float(jnp.linalg.norm(run(t1) - y) / jnp.linalg.norm(y))
            for t1, y in zip(lengths, right)
        ]
        print(name, errors)
        axes.semilogy(4 * lengths, errors, style, label=name)
        refused = [4 * t1 for t1, error in zip(lengths, errors) if error != error]
        if refused:
            axes.semilogy(refused, [1e-6] * len(refused), style[:2] + "x")
            axes.annotate("refused", (refused[0], 3e-6), color=style[:2])
    axes.set_title("error of a gradient, tolerance 1e-8")
    axes.set_xlabel("rate of contraction times length of the solve")
    axes.set_ylabel("relative error")
    axes.set_ylim(1e-11, 1e12)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def main():
    jax.config.update("jax_enable_x64", True)
    *ours, default = long_solve.candidates.items()
    others = {
        "Tsit5, DirectAdjoint": (diffrax.Tsit5(), diffrax.DirectAdjoint()),
        "Tsit5, BacksolveAdjoint": (diffrax.Tsit5(), diffrax.BacksolveAdjoint()),
    }
    comparisons = long_solve.compare({**dict(ours), **others, **dict([default])})
    for comparison in comparisons.values():
        print(comparison)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    time_axes, memory_axes, contraction_axes = figure.subplots(1, 3)
    picture.draw_costs(time_axes, memory_axes, comparisons)
    _draw_contraction(contraction_axes)
    path = Path(__file__).parent / "static" / "gradients.png"
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    main()
