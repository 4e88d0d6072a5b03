"""A long solve with a small network: what a gradient costs beside its evaluations."""

import statistics
import time
from typing import TypeAlias

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Scalar
from tqdm import tqdm

from .. import (
    AdjointFigures,
    Comparison,
    ReversibleAdjoint,
    ReversibleALF4,
    SymplecticAdjoint,
)
from .._compare.measure import in_turn, temp_bytes


sizes = (2, 10, 10, 2)
counts = (100, 1_000, 10_000)
Candidates: TypeAlias = dict[
    str, tuple[diffrax.AbstractSolver, diffrax.AbstractAdjoint]
]
candidates: Candidates = {
    "ReversibleALF4, ReversibleAdjoint": (ReversibleALF4(), ReversibleAdjoint()),
    "Tsit5, SymplecticAdjoint": (diffrax.Tsit5(), SymplecticAdjoint()),
    "Tsit5, diffrax's default": (
        diffrax.Tsit5(),
        diffrax.RecursiveCheckpointAdjoint(),
    ),
}


def weights() -> list[Float[Array, "_ _"]]:
    """Of a network without biases."""
    keys = jr.split(jr.PRNGKey(0), len(sizes))
    return [
        jr.normal(key, (m, n)) / n**0.5 for key, m, n in zip(keys, sizes[1:], sizes)
    ]


def _field(t, y, weights):
    del t
    *hidden, last = weights
    for w in hidden:
        y = jnp.tanh(w @ y)
    return last @ y


def loss(
    weights: list[Float[Array, "_ _"]],
    solver: diffrax.AbstractSolver,
    adjoint: diffrax.AbstractAdjoint,
    num_steps: int,
) -> Scalar:
    """Of the end of a neural ODE after `num_steps` constant steps."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver=solver,
        t0=0.0,
        t1=10.0,
        dt0=10.0 / num_steps,
        y0=jnp.array([1.0, 0.5]),
        args=weights,
        adjoint=adjoint,
        # Rounding may leave a last step of next to nothing.
        max_steps=num_steps + 1,
    )
    assert solution.ys is not None
    return jnp.sum(solution.ys**2)


def compare(candidates: Candidates, repeats: int = 7) -> dict[int, Comparison]:
    """The gradients of the candidates, for each number of steps, with a progress bar.
    The last one is the reference.

    As `compare_adjoints` does, but without a second program that counts steps.
    """
    x = weights()
    found = {}
    with tqdm(total=len(counts) * len(candidates), desc="measuring") as progress:
        for num_steps in counts:
            programs, compile_seconds = {}, {}
            for name, (solver, adjoint) in candidates.items():
                progress.set_postfix_str(f"{num_steps:,} steps, {name}")
                start = time.perf_counter()
                gradient = jax.jit(
                    jax.grad(lambda x: loss(x, solver, adjoint, num_steps))
                )
                programs[name] = gradient.lower(x).compile()
                compile_seconds[name] = time.perf_counter() - start
                progress.update()
            times = in_turn([lambda f=f: f(x) for f in programs.values()], repeats)
            gradients = {name: ravel_pytree(f(x))[0] for name, f in programs.items()}
            *_, reference = candidates
            right = gradients[reference]
            figures = {
                name: AdjointFigures(
                    gradient=gradients[name],
                    seconds=statistics.median(seconds),
                    compile_seconds=compile_seconds[name],
                    temp_bytes=temp_bytes(programs[name]),
                    num_steps=num_steps,
                    difference=float(
                        jnp.linalg.norm(gradients[name] - right)
                        / jnp.linalg.norm(right)
                    ),
                )
                for name, seconds in zip(programs, times)
            }
            found[num_steps] = Comparison(figures, reference)
    return found
