"""A long solve with a small network: what an adjoint costs beside the evaluations."""

import diffrax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Scalar


num_steps = 10_000
sizes = (2, 10, 10, 2)


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
