import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import (
    ReversibleAdjoint,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleYoshida4,
)

from ..helpers import (
    clip,
    constant,
    jit,
    leaf_differences,
    loss,
    parameters,
    pid,
    save_times,
)
from ..problems import KEPLER, LOTKA_VOLTERRA, NON_AUTONOMOUS_A, VAN_DER_POL
from .test_dense import errors


@pytest.mark.parametrize(
    "solver, problem, number",
    (
        (ReversibleALF4, LOTKA_VOLTERRA, 211),
        (ReversibleALF4, KEPLER, 613),
        (ReversibleALF4, NON_AUTONOMOUS_A, 53),
        (ReversibleALF4, VAN_DER_POL, 97),
        (ReversibleALF6, VAN_DER_POL, 53),
        (ReversibleYoshida4, LOTKA_VOLTERRA, 211),
    ),
)
def test_as_accurate_as_the_nodes(solver, problem, number):
    at_ts, at_nodes = errors(solver(interpolation="side_step"), problem, number)
    print(f"{solver.__name__} {problem.name}: {at_ts / at_nodes:.3f}")
    assert at_ts < 1.05 * at_nodes


@pytest.mark.parametrize(
    "solver, stepping, interval",
    (
        (ReversibleALF4(interpolation="side_step"), pid, (0.3, 1.9)),
        (ReversibleALF4(interpolation="side_step", damping=0.5), clip, (1.4, -0.3)),
        pytest.param(
            ReversibleALF4(interpolation="side_step", grid=2.0**-44),
            constant,
            (0.3, 1.9),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ReversibleYoshida4(interpolation="side_step"),
            constant,
            (1.4, -0.3),
            marks=pytest.mark.slow,
        ),
    ),
)
def test_gradient(solver, stepping, interval):
    @jit
    def values_and_grads(p):
        return [
            jax.value_and_grad(loss)(p, solver, stepping, save_times, interval, adjoint)
            for adjoint in (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
        ]

    (value, grad), (true_value, true_grad) = values_and_grads(parameters())
    assert abs(value - true_value) < 1e-12 * abs(true_value)
    assert leaf_differences(grad, true_grad) < 1e-10


def test_gradient_of_a_batch():
    """With parameters that are shared, and steps and save times that are not."""
    y0s = jnp.array([[1.0, 0.5], [0.3, 2.0], [2.5, -1.0]])
    ts = jnp.array([[0.1, 0.9], [0.4, 0.5], [0.0, 1.0]])

    def f(adjoint):
        def one(y0, ts, a):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, a: jnp.sin(a * y[::-1] * (1 + t))),
                ReversibleALF4(interpolation="side_step"),
                0.0,
                1.0,
                None,
                y0,
                a,
                saveat=diffrax.SaveAt(ts=ts),
                stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
                adjoint=adjoint,
                max_steps=64,
            )
            assert solution.ys is not None
            return jnp.sum(jnp.sin(solution.ys))

        total = lambda y0s, a: jnp.sum(jax.vmap(one, (0, 0, None))(y0s, ts, a))
        return jit(jax.grad(total, (0, 1)))(y0s, 1.3)

    found, true = f(ReversibleAdjoint()), f(diffrax.DirectAdjoint())
    assert leaf_differences(found, true) < 1e-12


def test_only_steps_with_save_times_are_stepped_aside():
    calls = []

    def vector_field(t, y, args):
        jax.debug.callback(lambda: calls.append(0))
        return -y

    def count(saveat):
        calls.clear()
        diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            ReversibleALF4(interpolation="side_step"),
            0.0,
            1.0,
            0.1,
            jnp.array(1.0),
            saveat=saveat,
        )
        jax.effects_barrier()
        return len(calls)

    ts = jnp.array([0.15, 0.17, 0.62])
    assert count(diffrax.SaveAt(ts=ts)) - count(diffrax.SaveAt(t1=True)) == 5 * len(ts)


@pytest.mark.parametrize(
    "options",
    (
        dict(saveat=diffrax.SaveAt(dense=True)),
        dict(event=diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0.5)),
    ),
    ids=("dense", "event"),
)
@pytest.mark.parametrize("adjoint", (ReversibleAdjoint(), diffrax.DirectAdjoint()))
def test_refused(options, adjoint):
    with pytest.raises(NotImplementedError, match="interpolation='side_step'"):
        diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            ReversibleALF4(interpolation="side_step"),
            0.0,
            1.0,
            0.1,
            jnp.array([1.0]),
            adjoint=adjoint,
            **options,
        )
