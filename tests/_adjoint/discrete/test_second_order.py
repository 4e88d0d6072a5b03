"""Forward mode, forward over forward and forward over reverse, through everything else."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
import pytest

from diffrax_reversible import (
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    SymplecticAdjoint,
)

from ...helpers import directional_difference, jit, tree_difference


_slow = pytest.mark.slow
_METHODS = (
    pytest.param(ReversibleALF2(), ReversibleAdjoint(checkpoints=3), id="ALF2"),
    pytest.param(ReversibleALF4(), ReversibleAdjoint(), id="ALF4", marks=_slow),
    pytest.param(
        Reversible(diffrax.Bosh3()), ReversibleAdjoint(), id="coupled", marks=_slow
    ),
    pytest.param(diffrax.ReversibleHeun(), ReversibleAdjoint(), id="Heun", marks=_slow),
    pytest.param(diffrax.Bosh3(), SymplecticAdjoint(), id="Bosh3"),
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


def _plain(p, *method):
    return _solve(p, *method).ys[-1]


_CASES = {"event": _event, "jump": _jump, "times": _times, "plain": _plain}


def _parameters():
    p = dict(y0=jnp.array([1.0, 0.5]), rate=jnp.array(1.3), level=jnp.array(0.4))
    direction = dict(y0=jnp.array([0.4, -0.7]), rate=jnp.array(0.2))
    return p, direction | dict(level=jnp.array(0.3))


def _dot(x, y):
    return sum(map(jnp.vdot, jtu.tree_leaves(x), jtu.tree_leaves(y)))


_DEFAULT = (("ALF2", "event"), ("Bosh3", "plain"))


@pytest.mark.parametrize(
    "solver, ours, case",
    [
        pytest.param(
            *method.values,
            case,
            id=f"{method.id}-{name}",
            marks=() if (method.id, name) in _DEFAULT else _slow,
        )
        for method in _METHODS
        for name, case in _CASES.items()
    ],
)
def test_second_derivatives(solver, ours, case):
    """A tangent is that of the gradient; a Hessian-vector product that of finite
    differences of the gradient; a Gauss-Newton product is symmetric and made of both."""
    residual = lambda p: case(p, solver, ours)
    f = lambda p: jnp.sum(jnp.sin(residual(p)))
    p, direction = _parameters()

    @jit
    def everything(p, direction):
        grad, product = jax.jvp(jax.grad(f), (p,), (direction,))
        (value, tangent) = jax.jvp(residual, (p,), (direction,))
        _, vjp = jax.vjp(residual, p)
        (gauss_newton,) = vjp(tangent)
        return value, tangent, grad, product, gauss_newton

    value, tangent, grad, product, gauss_newton = everything(p, direction)
    assert abs(_dot(grad, direction) - _dot(jnp.cos(value), tangent)) < 1e-10
    assert abs(_dot(gauss_newton, direction) - _dot(tangent, tangent)) < 1e-10
    grads = lambda p: everything(p, direction)[2]
    true = directional_difference(grads, p, direction, 1e-4)
    assert tree_difference(product, true) < 1e-7


@pytest.mark.parametrize("solver, ours", _METHODS)
def test_forward_over_forward(solver, ours):
    """As finite differences of forward mode; also as a matrix."""
    p, direction = _parameters()
    f = lambda p: _solve(p, solver, ours).ys[-1]

    @jit
    def derivatives(p):
        first = lambda p: jax.jvp(f, (p,), (direction,))[1]
        tangent, second = jax.jvp(first, (p,), (direction,))
        return tangent, second

    tangent, second = derivatives(p)
    true = directional_difference(lambda p: derivatives(p)[0], p, direction, 1e-4)
    assert tree_difference(second, true) < 1e-7


def test_hessian_of_forward_mode():
    f = lambda y0: jnp.sum(
        jnp.sin(
            _plain(_parameters()[0] | {"y0": y0}, ReversibleALF2(), ReversibleAdjoint())
        )
    )
    y0 = jnp.array([1.0, 0.5])
    matrices = jit(lambda y0: (jax.jacfwd(jax.jacfwd(f))(y0), jax.hessian(f)(y0)))(y0)
    assert tree_difference(*matrices) < 1e-10


@pytest.mark.parametrize("solver, ours", _METHODS)
def test_refused(solver, ours):
    """Reverse over reverse, and reverse over forward, with the way out."""
    p, direction = _parameters()
    f = lambda p: jnp.sum(_solve(p, solver, ours).ys)
    over_reverse = lambda p: _dot(jax.grad(f)(p), direction)
    over_forward = lambda p: jax.jvp(f, (p,), (direction,))[1]
    for inner in (over_reverse, over_forward):
        with pytest.raises((NotImplementedError, RuntimeError)) as error:
            jax.eval_shape(jax.grad(inner), p)
        assert "jax.jacfwd(jax.grad" in str(error.value)
        assert "while_loop" not in str(error.value)


#
# Where the gradient is right, and its derivative might not be
#


@ft.partial(jit, static_argnums=0)
def _prey(differentiate, y0, direction, t1):
    def rates(t, y, args):
        return jnp.stack(
            [0.1 * y[0] - 0.02 * y[0] * y[1], -0.4 * y[1] + 0.02 * y[0] * y[1]]
        )

    def final(y0):
        t0, dt0 = jnp.array([0.0, 0.1], y0.dtype)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            ReversibleALF4(restart=None),
            t0,
            t1,
            dt0,
            y0,
            adjoint=ReversibleAdjoint(),
        )
        return solution.ys[-1, 0]

    if not differentiate:
        return jax.grad(final)(y0)
    return jax.jvp(jax.grad(final), (y0,), (direction,))[1]


@pytest.mark.parametrize(
    "differentiate", (False, pytest.param(True, marks=pytest.mark.slow))
)
def test_no_silent_loss(differentiate):
    """In single precision the way back is good enough for a gradient, and then for its
    derivative, over shorter and shorter intervals. Both are right, or refused."""
    y0, direction = jnp.array([10.0, 10.0]), jnp.array([1.0, -0.5])
    single = lambda x: jnp.asarray(x, jnp.float32)
    refused = []
    for t1 in (40.0, 140.0, 170.0, 185.0):
        true = _prey(differentiate, y0, direction, jnp.array(t1))
        try:
            found = _prey(differentiate, single(y0), single(direction), single(t1))
            jax.block_until_ready(found)
        except Exception as error:
            assert "has lost" in str(error)
            refused.append(t1)
        else:
            assert tree_difference(found.astype(true.dtype), true) < 1e-2
    assert 40.0 not in refused and {170.0, 185.0} <= set(refused)


@pytest.mark.parametrize(
    "solver, ours",
    (
        pytest.param(ReversibleALF2(), ReversibleAdjoint(), id="reversible"),
        pytest.param(
            diffrax.Bosh3(), SymplecticAdjoint(), id="symplectic", marks=_slow
        ),
    ),
)
def test_hessian_where_the_cotangent_is_zero(solver, ours):
    """At the optimum of least squares the cotangents are zero, their tangents are not;
    also in a batch, in which elements without cotangents are masked."""
    p, direction = _parameters()

    def residual(p, scale):
        return _plain(p | {"rate": p["rate"] * scale}, solver, ours)

    scales = jnp.array([1.0, 1.2])

    @jit
    def both(p, direction):
        target = jax.lax.stop_gradient(jax.vmap(residual, (None, 0))(p, scales))

        def f(p):
            found = jax.vmap(residual, (None, 0))(p, scales)
            return jnp.sum((found - target) ** 2) / 2

        value, _ = jax.jvp(f, (p,), (direction,))
        grad, product = jax.jvp(jax.grad(f), (p,), (direction,))
        all_residuals = lambda p: jax.vmap(residual, (None, 0))(p, scales)
        _, tangent = jax.jvp(all_residuals, (p,), (direction,))
        _, vjp = jax.vjp(all_residuals, p)
        return value, grad, product, vjp(tangent)[0]

    value, grad, product, true = both(p, direction)
    assert value == 0
    assert all(bool(jnp.all(x == 0)) for x in jtu.tree_leaves(grad))
    assert tree_difference(product, true) < 1e-10
