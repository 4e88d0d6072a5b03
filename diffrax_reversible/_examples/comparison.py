"""A gradient with one adjoint against that with another."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar


class Measurement(NamedTuple):
    """The gradient with one adjoint, and what it cost.

    - `seconds`: the median of several runs, compilation excluded.
    - `temp_bytes`: temporary memory of the compiled program, `None` where the
        backend does not tell.
    """

    name: str
    gradient: Float[Array, " parameters"]
    seconds: float
    temp_bytes: int | None


def measure(
    loss: Callable[[PyTree, diffrax.AbstractAdjoint], Scalar],
    parameters: PyTree[Array],
    adjoints: Sequence[diffrax.AbstractAdjoint],
    *,
    runs: int = 21,
) -> list[Measurement]:
    """Measure the gradient of `loss(parameters, adjoint)` with each of the adjoints.

    The runs are taken in turn, so that a disturbance meets all adjoints alike.
    """

    def compile_gradient(adjoint: diffrax.AbstractAdjoint) -> Callable:
        value = lambda parameters: loss(parameters, adjoint)
        return jax.jit(jax.grad(value)).lower(parameters).compile()

    compiled = [compile_gradient(adjoint) for adjoint in adjoints]
    gradients = [ravel_pytree(gradient(parameters))[0] for gradient in compiled]
    seconds = [[] for _ in adjoints]
    for _ in range(runs):
        for gradient, times in zip(compiled, seconds):
            start = time.perf_counter()
            jax.block_until_ready(gradient(parameters))
            times.append(time.perf_counter() - start)

    return [
        Measurement(
            type(adjoint).__name__,
            gradient,
            statistics.median(times),
            _temp_bytes(program),
        )
        for adjoint, gradient, times, program in zip(
            adjoints, gradients, seconds, compiled
        )
    ]


def _temp_bytes(program) -> int | None:
    # A backend that does not know gives None, or an object without this figure.
    return getattr(program.memory_analysis(), "temp_size_in_bytes", None)


def table(measurements: Sequence[Measurement], reference: Measurement) -> str:
    """The measurements as text, with differences relative to the reference."""
    rows = [("adjoint", "time", "temp memory", "relative difference")]
    for row in measurements:
        difference = jnp.linalg.norm(row.gradient - reference.gradient)
        relative = float(difference / jnp.linalg.norm(reference.gradient))
        rows.append(
            (
                row.name,
                f"{1e3 * row.seconds:.3f} ms",
                "not available"
                if row.temp_bytes is None
                else f"{row.temp_bytes / 1024:.1f} KiB",
                "(reference)" if row is reference else f"{relative:.1e}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])])
        for name, *figures in rows
    )
