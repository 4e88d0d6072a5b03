"""What is not supported is refused by name, with a way out, when it is traced."""

import re

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible import RecordedSteps, ReversibleAdjoint, ReversibleALF4


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


@pytest.mark.parametrize("differentiate", (False, True))
@pytest.mark.parametrize(
    "options, message",
    (
        pytest.param(
            dict(event=diffrax.Event(lambda t, y, args, **_: y[0] - 0.7)),
            _mentions("`diffeqsolve(..., event=...)`", _checkpoints),
            id="event",
        ),
        pytest.param(
            dict(stepsize_controller=_pid(jump_ts=jnp.array([0.3]))),
            _mentions("`ClipStepSizeController(jump_ts=...)`", _checkpoints),
            id="jump_ts",
        ),
        pytest.param(
            dict(made_jump=True),
            _mentions("`diffeqsolve(..., made_jump=...)`", _checkpoints),
            id="made_jump",
        ),
    ),
)
def test_not_implemented(options, message, differentiate):
    def f(x):
        return jnp.sum(_solve(**options).ys) * x

    f = jax.grad(f) if differentiate else f
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(f, 1.0)


@pytest.mark.parametrize("name", ("t0", "t1", "dt0"))
@pytest.mark.parametrize("mode", (jax.grad, jax.jacfwd))
def test_derivative_in_times(name, mode):
    value = dict(t0=0.1, t1=1.1, dt0=0.13)[name]
    f = lambda t: jnp.sum(_solve(**{name: t}).ys)
    assert jnp.isfinite(f(value))
    message = _mentions(f"`diffeqsolve({name}=...)`", _checkpoints)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(mode(f), value)


@pytest.mark.parametrize(
    "message, options",
    (
        pytest.param(
            "`SaveAt(ts=...)`",
            lambda x: dict(saveat=diffrax.SaveAt(ts=x * jnp.array([0.3, 0.6]))),
            id="ts",
        ),
        pytest.param(
            "`SaveAt(ts=...)`",
            lambda x: dict(
                saveat=diffrax.SaveAt(
                    subs=[
                        diffrax.SubSaveAt(t1=True),
                        diffrax.SubSaveAt(ts=x * jnp.array([0.3, 0.6])),
                    ]
                )
            ),
            id="ts in subs",
        ),
        pytest.param(
            "`diffeqsolve(stepsize_controller=...)`",
            lambda x: dict(
                stepsize_controller=diffrax.StepTo(
                    jnp.array([0.0, 0.4, 1.0]).at[1].multiply(x)
                ),
                dt0=None,
            ),
            id="StepTo",
        ),
        pytest.param(
            "`diffeqsolve(stepsize_controller=...)`",
            lambda x: dict(stepsize_controller=_pid(step_ts=x * jnp.array([0.5]))),
            id="step_ts",
        ),
    ),
)
def test_derivative_in_controllers_and_saves(options, message):
    f = lambda x: sum(map(jnp.sum, jax.tree.leaves(_solve(**options(x)).ys)))
    assert jnp.isfinite(f(1.0))
    with pytest.raises(NotImplementedError, match=_mentions(message, _checkpoints)):
        jax.eval_shape(jax.grad(f), 1.0)


@pytest.mark.parametrize("differentiate", (False, True))
@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(diffrax.Tsit5(), id="Tsit5"),
        pytest.param(diffrax.HalfSolver(ReversibleALF4()), id="HalfSolver"),
    ),
)
def test_solver_that_is_not_reversible(solver, differentiate):
    def f(x):
        return jnp.sum(_solve(solver=solver).ys) * x

    f = jax.grad(f) if differentiate else f
    message = _mentions(
        f"`{type(solver).__name__}`", "`solver=ReversibleALF4()`", _checkpoints
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(f, 1.0)


def test_adaptive_steps_without_a_bound():
    options = dict(stepsize_controller=_pid(), max_steps=None)
    message = _mentions("max_steps=", "RecordedSteps(controller, capacity=...)`")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: _solve(**options))
    # The way out.
    options["stepsize_controller"] = RecordedSteps(_pid(), capacity=64)
    assert jnp.all(jnp.isfinite(_solve(**options).ys))


@pytest.mark.parametrize(
    "path", (diffrax.UnsafeBrownianPath, diffrax.VirtualBrownianTree)
)
@pytest.mark.parametrize("alone", (False, True))
def test_brownian_motion(path, alone):
    options = {} if path is diffrax.UnsafeBrownianPath else dict(t0=0, t1=1, tol=1e-3)
    control = path(shape=(2,), key=jr.PRNGKey(0), **options)
    noise = diffrax.ControlTerm(lambda t, y, args: jnp.diag(y), control)
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    terms = noise if alone else diffrax.MultiTerm(drift, noise)
    message = _mentions("SDEs", _checkpoints)
    with (
        pytest.raises(NotImplementedError, match=message),
        # diffrax's own.
        pytest.warns(UserWarning, match="is not marked as converging"),
    ):
        jax.eval_shape(lambda: _solve(terms=terms))


def test_reverse_over_reverse():
    """Second derivatives are forward over reverse; the other order is JAX's error."""
    f = lambda x: jnp.sum(_solve(terms=diffrax.ODETerm(lambda t, y, _: -x * y**2)).ys)
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        jax.eval_shape(jax.grad(jax.grad(f)), 1.0)
