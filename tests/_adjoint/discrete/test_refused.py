"""What is not supported is refused by name, with a way out, when it is traced."""

import re

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4


def _solve(**options):
    t0, t1, dt0 = (
        options.pop("t0", 0.0),
        options.pop("t1", 1.0),
        options.pop("dt0", 0.1),
    )
    terms = options.pop("terms", diffrax.ODETerm(lambda t, y, args: -y * args))
    options = dict(adjoint=ReversibleAdjoint(), solver=ReversibleALF4()) | options
    solver = options.pop("solver")
    return diffrax.diffeqsolve(
        terms, solver, t0, t1, dt0, jnp.array([1.0, 2.0]), 0.5, **options
    )


def _mentions(*calls):
    return ".*".join(re.escape(call) for call in calls)


def _pid(**options):
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    return diffrax.ClipStepSizeController(controller, **options)


_checkpoints = "RecursiveCheckpointAdjoint()"


@pytest.mark.parametrize("mode", (jax.grad, jax.jacfwd))
def test_derivative_in_the_first_of_adaptive_steps(mode):
    f = lambda dt0: jnp.sum(_solve(dt0=dt0, stepsize_controller=_pid()).ys)
    assert jnp.isfinite(f(0.1))
    with pytest.raises(RuntimeError, match=_mentions("`dt0`", _checkpoints)):
        jax.eval_shape(mode(f), 0.1)


def test_derivative_in_times_with_a_controller_state():
    saveat = diffrax.SaveAt(t1=True, controller_state=True)
    state = _solve(saveat=saveat).controller_state
    f = lambda t1: jnp.sum(_solve(t1=t1, controller_state=state).ys)
    with pytest.raises(RuntimeError, match=_mentions("`controller_state`")):
        jax.eval_shape(jax.grad(f), 1.0)


@pytest.mark.parametrize(
    "message, options",
    (
        pytest.param(
            "`stepsize_controller`",
            lambda x: dict(
                stepsize_controller=diffrax.StepTo(
                    jnp.array([0.0, 0.4, 1.0]).at[1].multiply(x)
                ),
                dt0=None,
            ),
            id="StepTo",
        ),
        pytest.param(
            "`stepsize_controller`",
            lambda x: dict(stepsize_controller=_pid(step_ts=x * jnp.array([0.5]))),
            id="step_ts",
        ),
    ),
)
def test_derivative_in_controllers(options, message):
    f = lambda x: sum(map(jnp.sum, jax.tree.leaves(_solve(**options(x)).ys)))
    assert jnp.isfinite(f(1.0))
    with pytest.raises(RuntimeError, match=_mentions(message, _checkpoints)):
        jax.eval_shape(jax.grad(f), 1.0)
