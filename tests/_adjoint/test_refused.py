"""What is not supported is refused by name, with a way out, when it is traced."""

import re

import diffrax
import jax
import jax.numpy as jnp
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


class _Jumping(diffrax.ConstantStepSize):
    """A controller of one's own that says that there is a jump."""

    def adapt_step_size(self, *args):
        keep_step, t0, t1, _, state, result = super().adapt_step_size(*args)
        return keep_step, t0, t1, t0 > 0.5, state, result


@pytest.mark.parametrize("differentiate", (False, True))
def test_jumps_of_a_controller_of_ones_own(differentiate):
    class Wrapped(diffrax.AbstractStepSizeController):
        controller: _Jumping

        def wrap(self, direction):
            return self

        def init(self, *args):
            return self.controller.init(*args)

        def adapt_step_size(self, *args):
            return self.controller.adapt_step_size(*args)

    def f(x):
        return jnp.sum(_solve(stepsize_controller=Wrapped(_Jumping())).ys) * x

    f = jax.grad(f) if differentiate else f
    message = _mentions("`ClipStepSizeController(jump_ts=...)`")
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(f, 1.0)


@pytest.mark.parametrize("mode", (jax.grad, jax.jacfwd))
def test_derivative_in_the_first_of_adaptive_steps(mode):
    f = lambda dt0: jnp.sum(_solve(dt0=dt0, stepsize_controller=_pid()).ys)
    assert jnp.isfinite(f(0.1))
    with pytest.raises(NotImplementedError, match=_mentions("`dt0`", _checkpoints)):
        jax.eval_shape(mode(f), 0.1)


def test_derivative_in_times_with_a_controller_state():
    saveat = diffrax.SaveAt(t1=True, controller_state=True)
    state = _solve(saveat=saveat).controller_state
    f = lambda t1: jnp.sum(_solve(t1=t1, controller_state=state).ys)
    with pytest.raises(NotImplementedError, match=_mentions("`controller_state`")):
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


def test_reverse_over_reverse():
    """Second derivatives are forward over reverse."""
    f = lambda x: jnp.sum(_solve(terms=diffrax.ODETerm(lambda t, y, _: -x * y**2)).ys)
    with pytest.raises(RuntimeError, match=_mentions("`jax.jacfwd(jax.grad(...))`")):
        jax.eval_shape(jax.grad(jax.grad(f)), 1.0)
