"""Elements of a batch that are masked out of the loss, and states of several sizes: what
has no cotangent adds nothing, and each component is as exact as if it were alone."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4, SymplecticAdjoint

from ...helpers import jit, leaf_differences


_METHODS = (
    pytest.param(ReversibleALF4(), ReversibleAdjoint(), id="reversible"),
    pytest.param(
        ReversibleALF4(), ReversibleAdjoint(checkpoints=2), id="reversible, checkpoints"
    ),
    pytest.param(diffrax.Bosh3(), SymplecticAdjoint(), id="symplectic"),
)


def _grad_of_batch(solver, adjoint, adaptive):
    """Of what is not masked, in the shared and in the own parameters."""
    controller = diffrax.ConstantStepSize()
    if adaptive:
        controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)

    def solve(y0, rate, w):
        field = lambda t, y, w: -rate * y + w * jnp.sin(3 * t) * jnp.cos(y)
        saveat = diffrax.SaveAt(ts=jnp.array([1.3, 4.0]))
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            4.0,
            None if adaptive else 0.05,
            y0,
            w,
            adjoint=adjoint,
            stepsize_controller=controller,
            saveat=saveat,
            max_steps=100,
            # Steps of a given number cannot fail.
            throw=not adaptive,
        ).ys

    def loss(y0s, rates, w, mask):
        ys = jax.vmap(solve, (0, 0, None))(y0s, rates, w)
        return jnp.sum(jnp.where(mask[:, None], ys, 0.0) ** 2)

    return jit(jax.grad(loss, (0, 1, 2)))


@pytest.mark.parametrize("solver, adjoint", _METHODS)
@pytest.mark.parametrize("adaptive", (False, True))
def test_masked_element(solver, adjoint, adaptive):
    """It may run out of steps, contract by more than can be undone, or be padding that is
    no number at all (where no `solver.init` looks at it, which JAX differentiates): the
    gradient is that of the others."""
    grad = _grad_of_batch(solver, adjoint, adaptive)
    mask, w = jnp.array([True, False, True]), jnp.array(0.7)
    y0s, rates = jnp.array([1.0, 0.8, 0.6]), jnp.array([0.5, 0.4, 0.3])
    true = jax.block_until_ready(grad(y0s, rates, w, mask))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in true)
    others = [(1.0, 20.0), (1e300, 0.4)]
    if isinstance(adjoint, SymplecticAdjoint):
        others += [(jnp.nan, 0.4), (1.0, jnp.nan)]
    for y0, rate in others:
        found = grad(y0s.at[1].set(y0), rates.at[1].set(rate), w, mask)
        assert leaf_differences(jax.block_until_ready(found), true) < 1e-12


#
# Components of different sizes
#


def _relaxing(t, y, w):
    """A part that does not change, beside one that relaxes."""
    z = -2 * y["z"] + w * jnp.tanh(y["z"]) * jnp.cos(t) + jnp.sin(t) / 2
    return dict(other=jnp.zeros_like(y["other"]), z=z)


@jit
def _grad_of_relaxing(w, other, t1):
    def loss(w):
        y0 = dict(other=other, z=jnp.array(0.5))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_relaxing),
            ReversibleALF4(restart=None),
            0.0,
            t1,
            t1 / 2000,
            y0,
            w,
            saveat=diffrax.SaveAt(ts=jnp.stack([0.6 * t1, t1])),
            adjoint=ReversibleAdjoint(),
            max_steps=2048,
        )
        return jnp.sum(solution.ys["z"] ** 2)

    return jax.grad(loss)(w)


@pytest.mark.parametrize("other", (1e-6, 1.0, 1e6))
def test_components_of_different_sizes(other):
    """Each is compared on a scale of its own: the loss of one is seen beside any other,
    and nothing is raised where nothing is lost."""
    w, soon, late = jnp.array(0.8), jnp.array(2.0), jnp.array(10.0)
    true = _grad_of_relaxing(w, jnp.array(1.0), soon)
    found = _grad_of_relaxing(w, jnp.array(other), soon)
    assert abs(found - true) < 1e-10 * abs(true)
    with pytest.raises(Exception, match="has lost the solution"):
        jax.block_until_ready(_grad_of_relaxing(w, jnp.array(other), late))
