"""`InterpolatedAdjoint`: what is refused, and no gradient that is wrong without a word."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    InterpolatedAdjoint,
    RecordedSteps,
    ReplayedSteps,
    StormerVerlet,
)

from ..helpers import jit, tree_difference


_checkpoints = "RecursiveCheckpointAdjoint()"


def _mentions(*calls):
    return "(?s)" + ".*".join(re.escape(call) for call in calls)


def _pid(tol=1e-6, **options):
    controller = diffrax.PIDController(rtol=tol, atol=tol)
    if options:
        controller = diffrax.ClipStepSizeController(controller, **options)
    return controller


def _solve(**options):
    options = (
        dict(
            terms=diffrax.ODETerm(lambda t, y, args: -y * args),
            solver=diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.1,
            y0=jnp.array([1.0, 2.0]),
            args=0.5,
            adjoint=InterpolatedAdjoint(6),
        )
        | options
    )
    return diffrax.diffeqsolve(**options)


#
# Refused when it is traced
#

_path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jr.PRNGKey(0))
_diffusion = diffrax.ControlTerm(lambda t, y, args: y, _path)
_drift = diffrax.ODETerm(lambda t, y, args: -y)
_control = diffrax.LinearInterpolation(jnp.arange(3.0), jnp.arange(3.0))


@pytest.mark.parametrize(
    "what, options",
    (
        ("`diffeqsolve(..., event=...)`",
         lambda: dict(event=diffrax.Event(lambda t, y, args, **_: t > 0.5))),
        ("`SaveAt(dense=True)`", lambda: dict(saveat=diffrax.SaveAt(dense=True))),
        ("`SaveAt(steps=...)`", lambda: dict(saveat=diffrax.SaveAt(steps=2))),
        ("`SaveAt(fn=...)`",
         lambda: dict(saveat=diffrax.SaveAt(t1=True, fn=lambda t, y, args: y**2))),
        ("stochastic",
         lambda: dict(terms=diffrax.MultiTerm(_drift, _diffusion),
                      solver=diffrax.Heun())),
        ("`ControlTerm`",
         lambda: dict(terms=diffrax.ControlTerm(lambda t, y, args: y, _control))),
        ("`StormerVerlet`",
         lambda: dict(terms=(_drift, _drift), solver=StormerVerlet(),
                      y0=(jnp.ones(2), jnp.ones(2)))),
    ),
)  # fmt: skip
@pytest.mark.parametrize("differentiate", (False, True))
def test_combinations(what, options, differentiate):
    def f(x):
        return x * jnp.sum(jax.tree.leaves(_solve(**options()).ys)[0])

    f = jax.grad(f) if differentiate else f
    message = _mentions("`adjoint=InterpolatedAdjoint(...)`", what, _checkpoints)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(f, 1.0)


_saved = diffrax.SaveAt(t1=True, solver_state=True, controller_state=True)


def _scale(tree, x):
    return jtu.tree_map(lambda s: s * x if eqx.is_inexact_array(s) else s, tree)


def _with_solver_state(x):
    return dict(solver_state=_scale(_solve(saveat=_saved).solver_state, x))


def _with_controller_state(x):
    state = _solve(saveat=_saved, stepsize_controller=_pid()).controller_state
    return dict(controller_state=_scale(state, x), stepsize_controller=_pid())


@pytest.mark.parametrize(
    "what, options",
    (
        ("`dt0`", lambda x: dict(dt0=0.1 * x)),
        ("`stepsize_controller`", lambda x: dict(stepsize_controller=_pid(1e-6 * x))),
        ("the adjoint method",
         lambda x: dict(adjoint=InterpolatedAdjoint(6, dt0=0.1 * x))),
        ("`solver_state`", _with_solver_state),
        ("`controller_state`", _with_controller_state),
    ),
)  # fmt: skip
@pytest.mark.parametrize("mode", (jax.grad, jax.jacfwd))
def test_derivatives(what, options, mode):
    f = lambda x: jnp.sum(_solve(**options(x)).ys)
    assert jnp.isfinite(f(1.0))
    message = _mentions("`adjoint=InterpolatedAdjoint(...)`", what, _checkpoints)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(mode(f), 1.0)


def test_derivative_of_the_solver_state():
    """Not silently zero."""

    def f(x):
        solution = _solve(args=x, saveat=_saved)
        return sum(map(jnp.sum, jtu.tree_leaves(solution.solver_state)))

    with pytest.raises(Exception, match=_mentions("`ys` and `ts`", _checkpoints)):
        jax.block_until_ready(jit(jax.grad(f))(0.5))


def test_reverse_over_reverse():
    f = lambda x: jnp.sum(_solve(args=x).ys)
    message = _mentions("`InterpolatedAdjoint(...)`", "`jax.jacfwd(jax.grad(...))`")
    with pytest.raises(RuntimeError, match=message):
        jax.eval_shape(jax.grad(jax.grad(f)), 1.0)


@pytest.mark.parametrize("given", ("StepTo", "ReplayedSteps"))
def test_given_steps(given):
    """They are not those of the adjoint equation, so that others are asked for."""
    controller = diffrax.StepTo(jnp.linspace(0, 1, 33))
    if given == "ReplayedSteps":
        recorded = RecordedSteps(controller, capacity=33)
        solution = _solve(
            stepsize_controller=recorded,
            dt0=None,
            saveat=_saved,
            adjoint=diffrax.ForwardMode(),
        )
        controller = ReplayedSteps(solution.controller_state.record)
    options = dict(stepsize_controller=controller, dt0=None)
    message = _mentions(f"`{given}`", "stepsize_controller=")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: _solve(**options).ys)
    adjoint = InterpolatedAdjoint(6, stepsize_controller=_pid())
    grad = jit(
        jax.grad(lambda x: jnp.sum(_solve(**options, args=x, adjoint=adjoint).ys))
    )
    assert jnp.allclose(grad(0.5), -3 * jnp.exp(-0.5), rtol=1e-5)


def test_landing_with_constant_steps():
    adjoint = InterpolatedAdjoint(6, landing=True)
    with pytest.raises(ValueError, match=_mentions("landing=True", "adaptive")):
        jax.eval_shape(lambda: _solve(adjoint=adjoint).ys)


@pytest.mark.parametrize(
    "arguments, message",
    (
        (dict(nodes=3), "nodes="),
        (dict(nodes=8, quadrature=1), "quadrature="),
        (dict(nodes=8, rtol=0.0), "rtol="),
        (dict(nodes=8, on_unresolved="ignore"), "on_unresolved="),
        (dict(nodes=8, saveat=None), "`dt0`, `max_steps`, `solver`"),
    ),
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        InterpolatedAdjoint(**arguments)


#
# Refused when it is run
#


def _oscillator(w, adjoint, **options):
    """About five periods."""
    vector_field = lambda t, y, w: jnp.stack([y[1], -w * jnp.sin(y[0])])
    options = dict(stepsize_controller=_pid(1e-8), dt0=None, t1=3.0) | options
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), args=w, adjoint=adjoint,
                          max_steps=1024, **options).ys)  # fmt: skip


def _reference(f, *args):
    return jit(jax.grad(lambda *x: f(*x, diffrax.RecursiveCheckpointAdjoint())))(*args)


def _grad(f, adjoint, *args, **options):
    return jit(jax.grad(lambda *x: f(*x, adjoint, **options)))(*args)


def test_too_few_nodes():
    """The error names a number that does, and is not many times as large as needed."""
    w = jnp.array(100.0)
    with pytest.raises(Exception, match="does not resolve the solution") as error:
        jax.block_until_ready(_grad(_oscillator, InterpolatedAdjoint(40), w))
    (nodes,) = re.findall(
        r"About `InterpolatedAdjoint\(nodes=(\d+)\)", str(error.value)
    )
    print(f"{nodes} nodes")
    assert _checkpoints in str(error.value) and "between t = 0.0 and t = 3.0" in str(
        error.value
    )
    assert 40 < int(nodes) < 120
    found = _grad(_oscillator, InterpolatedAdjoint(int(nodes)), w)
    assert tree_difference(found, _reference(_oscillator, w)) < 1e-3


def test_unresolved_otherwise():
    """A warning or NaN by choice; NaN with `throw=False`."""
    w = jnp.array(100.0)
    for options, throw in ((dict(on_unresolved="nan"), True), ({}, False)):
        found = _grad(_oscillator, InterpolatedAdjoint(16, **options), w, throw=throw)
        assert jnp.isnan(found)
    with pytest.warns(UserWarning, match=r"at least `InterpolatedAdjoint\(nodes=32\)`"):
        adjoint = InterpolatedAdjoint(16, on_unresolved="warn")
        assert jnp.isfinite(_grad(_oscillator, adjoint, w))


@pytest.mark.parametrize("outside", (False, True))
def test_batch(outside):
    """The element is named, whatever the order of `vmap` and `grad`."""
    loss = lambda w: _oscillator(w, InterpolatedAdjoint(16))
    if outside:
        grad = jax.vmap(jax.grad(loss))
    else:
        grad = jax.grad(lambda w: jnp.sum(jax.vmap(loss)(w)))
    with pytest.raises(Exception, match=r"for element \(1,\) of the batch"):
        jax.block_until_ready(jit(grad)(jnp.array([1.0, 100.0, 0.5])))


def _stiff(rate, adjoint, **options):
    """The solution is smooth; the adjoint is a layer at the end."""
    vector_field = lambda t, y, rate: rate * (jnp.cos(t) - y)
    options = dict(solver=diffrax.Kvaerno5(), stepsize_controller=_pid(1e-8)) | options
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), y0=jnp.ones(1), args=rate,
                          adjoint=adjoint, t1=2.0, dt0=None, **options).ys)  # fmt: skip


@pytest.mark.parametrize("rate", (200.0, 2e4))
def test_stiff_adjoint(rate):
    """Also one that is nothing but zero at the Gauss points."""
    adjoint = InterpolatedAdjoint(12)
    with pytest.raises(Exception, match="adjoint equation") as error:
        jax.block_until_ready(_grad(_stiff, adjoint, rate))
    assert "quadrature=False" in str(error.value)
    assert "quadrature=" in str(error.value)


def test_stiff_adjoint_resolved():
    true = _reference(_stiff, 200.0)
    for quadrature in (64, False):
        adjoint = InterpolatedAdjoint(12, quadrature=quadrature)
        found = _grad(_stiff, adjoint, 200.0)
        assert tree_difference(found, true) < 1e-4


def _jumping(a, adjoint, **options):
    vector_field = lambda t, y, a: jnp.where(t < 0.4, a * jnp.sin(y), -(a**2) * y)
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), args=a, adjoint=adjoint,
                          t1=-1.0, t0=0.7, dt0=None, **options).ys)  # fmt: skip


def test_jumps():
    """Known, they end an interval; unknown, they are found out."""
    a = jnp.array(1.3)
    known = dict(stepsize_controller=_pid(1e-9, jump_ts=[0.4, 5.0]))
    f = lambda a, adjoint: _jumping(a, adjoint, **known)
    found = _grad(f, InterpolatedAdjoint(14), a)
    assert tree_difference(found, _reference(f, a)) < 1e-7
    unknown = dict(stepsize_controller=_pid(1e-9))
    with pytest.raises(Exception, match=r"jump_ts=\.\.\."):
        jax.block_until_ready(_grad(_jumping, InterpolatedAdjoint(14), a, **unknown))


def test_failed_solve():
    """There is no gradient of it."""
    options = dict(stepsize_controller=_pid(1e-12), dt0=None, max_steps=8, throw=False)

    def f(x, y0):
        saveat = diffrax.SaveAt(t0=True, ts=[0.1, 0.9])
        return jnp.sum(_solve(args=x, y0=y0, saveat=saveat, **options).ys[0])

    found = jit(jax.grad(f, (0, 1)))(0.5, jnp.ones(2))
    assert all(bool(jnp.all(jnp.isnan(x))) for x in jtu.tree_leaves(found))


@pytest.mark.parametrize("throw", (False, True))
def test_failed_adjoint_equation(throw):
    adjoint = InterpolatedAdjoint(6, max_steps=3)
    options = dict(stepsize_controller=_pid(1e-10), dt0=None, throw=throw)
    grad = jit(
        jax.grad(lambda x: jnp.sum(_solve(args=x, adjoint=adjoint, **options).ys))
    )
    if throw:
        with pytest.raises(Exception, match=_mentions("max_steps=...)`", _checkpoints)):
            jax.block_until_ready(grad(0.5))
    else:
        assert jnp.isnan(grad(0.5))


def _excitable(a, adjoint):
    """At rest but for a short excursion of the first component."""

    def vector_field(t, y, a):
        push = a * jnp.exp(-20 * (t - 4.7) ** 2)
        return jnp.stack([8 * push - 9 * y[0], 0 * y[1]])

    controller = _pid(1e-6, step_ts=[4.7])
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), args=a, adjoint=adjoint,
                          y0=jnp.array([0.0, 1.0]), t1=10.0, max_steps=1024, dt0=None,
                          stepsize_controller=controller).ys)  # fmt: skip


def test_what_happens_between_the_nodes():
    """The coefficients of a solution that is at rest at every node say nothing, but its
    steps do."""
    with pytest.raises(Exception, match="what the steps of the solve have seen"):
        jax.block_until_ready(_grad(_excitable, InterpolatedAdjoint(8), 1.0))
