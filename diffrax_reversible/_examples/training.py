"""A neural ODE for two animals, and its training."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Scalar
from tqdm import tqdm

from .. import ReversibleAdjoint, ReversibleALF4
from .data import Pelts


class NeuralODE(eqx.Module):
    """An autonomous neural ODE in the plane, with a start that is learnt too."""

    start: Float[Array, " 2"]
    network: eqx.nn.MLP

    def __init__(self, pelts: Pelts, *, seed: int = 2):
        self.start = pelts.standardise(pelts.counts[:1])[0]
        self.network = eqx.nn.MLP(
            in_size=2,
            out_size=2,
            width_size=32,
            depth=2,
            activation=jax.nn.tanh,
            key=jr.PRNGKey(seed),
        )

    def states(
        self,
        ts: Float[Array, " n"],
        solver: diffrax.AbstractSolver = ReversibleALF4(),
        adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
    ) -> Float[Array, "n 2"]:
        """The solution from time 0 to the last of `ts`, at the times `ts`."""
        states = self._solve(ts[-1], diffrax.SaveAt(ts=ts), solver, adjoint).ys
        assert states is not None
        return states

    def accepted_steps(
        self, t1: Scalar
    ) -> tuple[Float[Array, " nodes"], Float[Array, "nodes 2"]]:
        """Where the accepted steps from time 0 to `t1` begin and end, and the states
        there. Not for use inside a `jax.jit`."""
        saveat = diffrax.SaveAt(t0=True, steps=True)
        solution = self._solve(t1, saveat, ReversibleALF4(), ReversibleAdjoint())
        assert solution.ts is not None and solution.ys is not None
        accepted = jnp.isfinite(solution.ts)
        return solution.ts[accepted], solution.ys[accepted]

    def _solve(
        self,
        t1: Scalar,
        saveat: diffrax.SaveAt,
        solver: diffrax.AbstractSolver,
        adjoint: diffrax.AbstractAdjoint,
    ) -> diffrax.Solution:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: self.network(y)),
            solver=solver,
            t0=0.0,
            t1=t1,
            dt0=None,
            y0=self.start,
            saveat=saveat,
            stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
            adjoint=adjoint,
            # Several times the steps that the training needs: both adjoints of the
            # comparison reserve memory for this many.
            max_steps=1024,
        )


def weighted_loss(
    model: NeuralODE,
    pelts: Pelts,
    weights: Float[Array, " years"],
    solver: diffrax.AbstractSolver = ReversibleALF4(),
    adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
) -> Scalar:
    """Mean squared error of the standardised logarithms, weighted by year."""
    errors = (
        model.states(pelts.ts, solver, adjoint) - pelts.standardise(pelts.counts)
    ) ** 2
    return jnp.average(jnp.mean(errors, axis=1), weights=weights)


@eqx.filter_jit
def loss(
    model: NeuralODE,
    pelts: Pelts,
    solver: diffrax.AbstractSolver = ReversibleALF4(),
    adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
) -> Scalar:
    """Mean squared error of the standardised logarithms over all years."""
    return weighted_loss(model, pelts, jnp.ones_like(pelts.ts), solver, adjoint)


def window(step: int, steps: int, years: int, *, first: int = 3) -> int:
    """How many years count in this training step.

    Oscillations cannot be learnt from all years at once: the flat line in their
    middle is a local minimum. So the first half of the training starts with a few
    years and adds the others one by one.
    """
    return min(years, first + 2 * step * (years - first + 1) // steps)


def train(model: NeuralODE, pelts: Pelts, steps: int) -> NeuralODE:
    """Train for a number of steps of Adam, with a progress bar."""
    years = len(pelts.ts)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(1e-2, steps)),
    )
    optimiser_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(model, optimiser_state, weights):
        value, gradient = eqx.filter_value_and_grad(weighted_loss)(
            model, pelts, weights
        )
        change, optimiser_state = optimiser.update(gradient, optimiser_state)
        return eqx.apply_updates(model, change), optimiser_state, value

    with tqdm(range(steps), desc="training") as progress:
        for step in progress:
            count = window(step, steps, years)
            weights = jnp.where(jnp.arange(years) < count, 1.0, 0.0)
            model, optimiser_state, value = update(model, optimiser_state, weights)
            progress.set_postfix(years=count, loss=f"{value:.4f}", refresh=False)
    return model
