"""Forward mode, and forward over reverse mode, through everything else."""

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
import pytest

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    ReversibleALF4,
    SymplecticAdjoint,
)

from ..helpers import directional_difference, jit, pairwise_or_product, tree_difference


_METHODS = (
    pytest.param(ReversibleALF4(), ReversibleAdjoint(checkpoints=3), id="ALF4"),
    pytest.param(
        Reversible(diffrax.Bosh3()),
        ReversibleAdjoint(),
        id="coupled",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        diffrax.Bosh3(), SymplecticAdjoint(), id="Bosh3", marks=pytest.mark.slow
    ),
)


def _vector_field(t, y, p):
    return jnp.stack([y[1], -p["rate"] * jnp.sin(y[0]) + 0.1 * jnp.cos(t)])


def _jumping_field(t, y, p):
    return jnp.where(t < 0.55, 1.0, -0.7) * _vector_field(t, y, p)


def _solve(p, solver, adjoint, vector_field=_vector_field, **options):
    options = dict(t1=2.0, saveat=diffrax.SaveAt(t1=True)) | options
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        t0=0.1,
        dt0=0.07,
        y0=p["y0"],
        args=p,
        adjoint=adjoint,
        max_steps=64,
        **options,
    )


def _event(p, *method):
    """The state and the time at which an event ends the solve."""

    def crosses(t, y, args, **kwargs):
        return y[0] - p["level"]

    event = diffrax.Event(crosses, optx.Newton(1e-12, 1e-12))
    solution = _solve(p, *method, event=event)
    return jnp.concatenate([solution.ys[-1], solution.ts])


def _jump(p, *method):
    # With so large a tolerance `dtmax` alone determines the steps.
    controller = diffrax.PIDController(rtol=1e6, atol=1e6, dtmax=0.1)
    controller = diffrax.ClipStepSizeController(controller, jump_ts=jnp.array([0.55]))
    options = dict(stepsize_controller=controller, t1=1.0)
    return _solve(p, *method, _jumping_field, **options).ys[-1]


def _times(p, *method):
    """The end and the save times move."""
    saveat = diffrax.SaveAt(ts=jnp.stack([p["level"], p["rate"]]), t1=True)
    ys = _solve(p, *method, saveat=saveat, t1=p["rate"] + 0.5).ys
    return jnp.reshape(ys, -1)


_CASES = (
    pytest.param(_event, id="event"),
    pytest.param(_jump, id="jump", marks=pytest.mark.slow),
    pytest.param(_times, id="times"),
)


def _parameters():
    p = dict(y0=jnp.array([1.0, 0.5]), rate=jnp.array(1.3), level=jnp.array(0.4))
    direction = dict(y0=jnp.array([0.4, -0.7]), rate=jnp.array(0.2))
    return p, direction | dict(level=jnp.array(0.3))


@pytest.mark.parametrize("solver, ours, case", pairwise_or_product(_METHODS, _CASES))
def test_second_derivatives(solver, ours, case):
    """A tangent is that of the gradient; a Hessian-vector product that of finite
    differences of the gradient; a Gauss-Newton product is symmetric and made of both."""
    residual = lambda p: case(p, solver, ours)
    f = lambda p: jnp.sum(jnp.sin(residual(p)))
    p, direction = _parameters()

    @jit
    def both(p, direction):
        (value, tangent) = jax.jvp(residual, (p,), (direction,))
        grad, product = jax.jvp(jax.grad(f), (p,), (direction,))
        _, vjp = jax.vjp(residual, p)
        (gauss_newton,) = vjp(tangent)
        return value, tangent, grad, product, gauss_newton

    value, tangent, grad, product, gauss_newton = both(p, direction)
    dot = lambda x, y: sum(
        jnp.vdot(a, b) for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y))
    )
    assert abs(dot(grad, direction) - dot(jnp.cos(value), tangent)) < 1e-10
    assert abs(dot(gauss_newton, direction) - dot(tangent, tangent)) < 1e-10
    true = directional_difference(jit(jax.grad(f)), p, direction, 1e-4)
    assert tree_difference(product, true) < 1e-7


def test_hessian():
    """Of all parameters at once, through an event."""
    f = lambda p: jnp.sum(_event(p, ReversibleALF4(), ReversibleAdjoint()) ** 2)
    p, direction = _parameters()
    hessian = jit(jax.hessian(f))(p)
    true = directional_difference(jit(jax.grad(f)), p, direction, 1e-4)
    product = {
        key: sum(jnp.tensordot(row[k], direction[k], jnp.ndim(p[k])) for k in p)
        for key, row in hessian.items()
    }
    assert tree_difference(product, true) < 1e-7
    assert tree_difference(hessian["rate"]["y0"], hessian["y0"]["rate"]) < 1e-10


@pytest.mark.parametrize("solver, ours", _METHODS)
def test_reverse_over_reverse(solver, ours):
    p, _ = _parameters()
    inner = lambda p: jnp.sum(jax.grad(lambda p: _times(p, solver, ours)[0])(p)["y0"])
    with pytest.raises(RuntimeError, match=r"jax.jacfwd\(jax.grad"):
        jax.grad(inner)(p)
