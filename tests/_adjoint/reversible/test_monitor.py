"""How close a gradient was to what is not accepted."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    EES25,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
)
from diffrax_reversible._compat import enable_x64

from ...helpers import jit
from ...user import as_a_user


def _loss(y0, t1, monitor, solver=ReversibleALF4(restart=None), **options):
    """A relaxation, which loses digits on its way back."""
    times = dict(t0=jnp.array(0.5), t1=t1, dt0=0.1 * jnp.sign(t1 - 0.5))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.cos(t) - y),
        solver,
        y0=y0,
        adjoint=ReversibleAdjoint(monitor=monitor),
        **times | options,
    )
    return jnp.sum(solution.ys**2)


def _figures(report):
    return report.loss, report.rtol, report.t, report.num_steps


@pytest.mark.parametrize("t1", (2.5, -1.0))
def test_figures(t1):
    """Even if all is well; and only if somebody differentiates."""
    reports, y0, t1 = [], jnp.ones(2), jnp.array(t1)
    value_and_grad = jax.value_and_grad(_loss)
    _, found = jit(lambda *x: value_and_grad(*x, reports.append))(y0, t1)
    _, true = jit(lambda *x: value_and_grad(*x, None))(y0, t1)
    assert jnp.all(found == true)
    (report,) = reports
    assert all(type(x) is np.ndarray and x.shape == () for x in _figures(report))
    assert 0 < report.loss < report.rtol < 2e-9
    assert report.t == 0.5
    assert report.num_steps in (15, 16, 20, 21)
    assert report.num_restarts == report.checkpoints == 0

    jit(lambda *x: _loss(*x, reports.append))(y0, t1)
    assert len(reports) == 1


def test_float64_for_a_while():
    """As far as one thread is concerned. Callbacks are run in others."""
    reports = []
    with as_a_user(), enable_x64(True):
        y0, t1 = jnp.ones(2), jnp.array(2.5)
        gradient = jit(jax.grad(lambda *x: _loss(*x, reports.append)))(y0, t1)
    assert gradient.dtype == jnp.float64
    (report,) = reports
    assert 0 < report.loss < report.rtol < 2e-9


def test_restarts():
    """What is asked for where there is not enough room."""
    reports, y0 = [], jnp.array([0.3])
    options = dict(
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        dt0=None,
        max_steps=512,
    )
    loss = lambda y0: _loss(
        y0, jnp.array(20.0), reports.append, ReversibleALF2(), **options
    )
    jit(jax.grad(loss))(y0)
    (report,) = reports
    assert 1 < report.num_restarts < report.checkpoints == 32
    assert report.num_restarts < report.num_steps


@pytest.mark.parametrize(
    "solver, number",
    (
        pytest.param(diffrax.ReversibleHeun(), 8, id="ReversibleHeun"),
        pytest.param(diffrax.LeapfrogMidpoint(), 8, id="LeapfrogMidpoint"),
        pytest.param(EES25(), 32, id="EES25", marks=pytest.mark.slow),
        pytest.param(ReversibleALF4(), 32, id="ALF4", marks=pytest.mark.slow),
    ),
)
def test_states_kept_by_default(solver, number):
    """Few, where two copies of the solution can drift apart and no restart helps; not more
    than `max_steps`."""
    reports = []
    for max_steps in (100, 5):
        t1 = jnp.array(1.0)
        loss = lambda y0: _loss(y0, t1, reports.append, solver, max_steps=max_steps)
        jit(jax.grad(loss))(jnp.ones(1))
    assert [report.checkpoints for report in reports] == [number, 5]


@pytest.mark.parametrize("outside", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_batch(outside):
    """All elements at once, whatever the order of `vmap` and `grad`."""
    reports, y0 = [], jnp.ones((3, 1))
    t1 = jnp.array([1.0, 4.0, 2.0])
    loss = lambda y0, t1: _loss(y0, t1, reports.append)
    if outside:
        grad = jax.vmap(jax.grad(loss))
    else:
        grad = jax.grad(lambda y0, t1: jnp.sum(jax.vmap(loss)(y0, t1)))
    jit(grad)(y0, t1)
    (report,) = reports
    assert all(x.shape == (3,) for x in _figures(report))
    assert np.argmax(report.loss) == np.argmax(report.num_steps) == 1


@pytest.mark.slow
def test_second_derivative():
    """Forward over reverse mode has one reverse sweep, and tells of it once."""
    reports = []
    loss = lambda y0: _loss(y0, jnp.array(1.0), reports.append)
    hessian = jit(jax.jacfwd(jax.grad(loss)))(jnp.ones(2))
    assert hessian.shape == (2, 2)
    assert len(reports) == 1


def test_raises():
    """To stop a training that comes too close."""

    def monitor(report):
        if report.num_steps > 20:
            raise RuntimeError("too close")

    loss = lambda y0: _loss(y0, jnp.array(8.0), monitor)
    with pytest.raises(RuntimeError, match="too close"):
        jax.block_until_ready(jit(jax.grad(loss))(jnp.ones(2)))


def test_costs_nothing():
    """Where it is not used there is not one more operation than the check needs."""
    text = lambda monitor: str(
        jax.make_jaxpr(jax.grad(lambda y0: _loss(y0, jnp.array(1.0), monitor)))(
            jnp.ones(1)
        )
    )
    calls = lambda monitor: text(monitor).count("pure_callback[")
    assert calls(lambda report: None) == calls(None) + 1
