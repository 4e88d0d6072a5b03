"""`InterpolatedAdjoint`: what is refused, and no gradient that is wrong without a word."""

import functools as ft
import re

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
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

from ...helpers import jit, tree_difference


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


class _Halved(diffrax.ODETerm):
    def prod(self, vf, control):
        return jtu.tree_map(lambda v: 0.5 * control * v, vf)


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
        ("methods of their own",
         lambda: dict(terms=diffrax.MultiTerm(_Halved(_drift.vector_field), _drift))),
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


@ft.cache
def _states():
    """Of solver and controller, at the end of a solve."""
    solution = _solve(saveat=_saved, stepsize_controller=_pid())
    return solution.solver_state, solution.controller_state


def _scaled_state(i, x):
    return jtu.tree_map(lambda s: s * x if eqx.is_inexact_array(s) else s, _states()[i])


class _Euler(diffrax.Euler):
    """Has an array."""

    factor: jax.Array

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y0 = self.factor * y0
        return super().step(terms, t0, t1, y0, args, solver_state, made_jump)


@pytest.mark.parametrize(
    "what, options",
    (
        ("`dt0`", lambda x: dict(dt0=0.1 * x)),
        ("`stepsize_controller`", lambda x: dict(stepsize_controller=_pid(1e-6 * x))),
        ("the adjoint method",
         lambda x: dict(adjoint=InterpolatedAdjoint(6, dt0=0.1 * x))),
        ("the solver", lambda x: dict(solver=_Euler(x))),
        ("`solver_state`", lambda x: dict(solver_state=_scaled_state(0, x))),
        ("`controller_state`",
         lambda x: dict(controller_state=_scaled_state(1, x), stepsize_controller=_pid())),
    ),
)  # fmt: skip
@pytest.mark.parametrize("mode", (jax.grad, jax.jacfwd))
def test_derivatives(what, options, mode):
    _states()
    f = lambda x: jnp.sum(_solve(**options(x)).ys)
    jax.eval_shape(f, 1.0)
    message = _mentions("`adjoint=InterpolatedAdjoint(...)`", what, _checkpoints)
    with pytest.raises(RuntimeError, match=message):
        jax.eval_shape(mode(f), 1.0)


@pytest.mark.slow
def test_derivative_of_the_solver_state():
    """Not silently zero."""

    def f(x):
        solution = _solve(args=x, saveat=_saved)
        leaves = jtu.tree_leaves(
            eqx.filter(solution.solver_state, eqx.is_inexact_array)
        )
        return sum(map(jnp.sum, leaves))

    with pytest.raises(Exception, match=_mentions("`ys` and `ts`", _checkpoints)):
        jax.block_until_ready(jit(jax.grad(f))(0.5))


def test_reverse_over_reverse():
    f = lambda x: jnp.sum(_solve(args=x).ys)
    message = _mentions("`InterpolatedAdjoint(...)`", "`jax.jacfwd(jax.grad(...))`")
    with pytest.raises(RuntimeError, match=message):
        jax.eval_shape(jax.grad(jax.grad(f)), 1.0)


@pytest.mark.parametrize(
    "given", (pytest.param("StepTo", marks=pytest.mark.slow), "ReplayedSteps")
)
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


@pytest.mark.parametrize(
    "arguments, message",
    (
        (dict(nodes=3), "nodes="),
        (dict(nodes=8, quadrature=1), "quadrature="),
        (dict(nodes=8, quadrature="points"), "quadrature"),
        (dict(nodes=8, resolution_rtol=0.0), "resolution_rtol="),
        (dict(nodes=8, on_failure="ignore"), "on_failure"),
    ),
)
def test_arguments(arguments, message):
    # Where types are checked, as here, that of a `Literal` comes first.
    with pytest.raises((ValueError, TypeError), match=message):
        InterpolatedAdjoint(**arguments)


#
# Refused when it is run
#


def _oscillator(w, adjoint, throw=True):
    """About five periods."""
    vector_field = lambda t, y, w: jnp.stack([y[1], -w * jnp.sin(y[0])])
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), args=w, adjoint=adjoint,
                          t1=3.0, dt0=0.01, throw=throw).ys)  # fmt: skip


@ft.cache
def _jitted(f, adjoint, **options):
    return jit(jax.grad(ft.partial(f, adjoint=adjoint, **options)))


def _grad(f, adjoint, x, **options):
    return _jitted(f, adjoint, **options)(x)


def _reference(f, x):
    """By forward mode."""
    found = jit(jax.jacfwd(ft.partial(f, adjoint=diffrax.ForwardMode())))
    return found(x)


def test_too_few_nodes():
    """The error names a number that does, and is not many times as large as needed."""
    w = jnp.array(100.0)
    with pytest.raises(Exception, match="does not resolve the solution") as error:
        jax.block_until_ready(_grad(_oscillator, InterpolatedAdjoint(40), w))
    message = str(error.value)
    (nodes,) = re.findall(r"About `InterpolatedAdjoint\(nodes=(\d+)\)", message)
    print(f"{nodes} nodes")
    assert _checkpoints in message and "between t = 0.0 and t = 3.0" in message
    assert 40 < int(nodes) < 120
    found = _grad(_oscillator, InterpolatedAdjoint(int(nodes)), w)
    assert tree_difference(found, _reference(_oscillator, w)) < 1e-3


@pytest.mark.slow
def test_unresolved_otherwise():
    """A warning or NaN by choice; NaN with `throw=False`."""
    w = jnp.array(100.0)
    for options, throw in ((dict(on_failure="nan"), True), ({}, False)):
        found = _grad(_oscillator, InterpolatedAdjoint(16, **options), w, throw=throw)
        assert jnp.isnan(found)
    with pytest.warns(UserWarning, match=r"at least `InterpolatedAdjoint\(nodes=32\)`"):
        adjoint = InterpolatedAdjoint(16, on_failure="warn")
        assert jnp.isfinite(_grad(_oscillator, adjoint, w))


@pytest.mark.parametrize("outside", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_batch(outside):
    """The element is named, whatever the order of `vmap` and `grad`."""
    loss = lambda w: _oscillator(w, InterpolatedAdjoint(16))
    if outside:
        grad = jax.vmap(jax.grad(loss))
    else:
        grad = jax.grad(lambda w: jnp.sum(jax.vmap(loss)(w)))
    with pytest.raises(Exception, match=r"for element \(1,\) of the batch"):
        jax.block_until_ready(jit(grad)(jnp.array([1.0, 100.0, 0.5])))


def _stiff(rate, adjoint):
    """The solution is smooth; the adjoint is a layer at the end."""
    vector_field = lambda t, y, rate: rate * (jnp.cos(t) - y)
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), y0=jnp.ones(1), args=rate,
                          adjoint=adjoint, t1=2.0, dt0=None, solver=diffrax.Kvaerno3(),
                          stepsize_controller=_pid()).ys)  # fmt: skip


@pytest.mark.parametrize("rate", (200.0, pytest.param(2e4, marks=pytest.mark.slow)))
def test_stiff_adjoint(rate):
    """Also one that is nothing but zero at the Gauss points."""
    with pytest.raises(
        Exception, match="adjoint equation.*quadrature=.*quadrature=None"
    ):
        jax.block_until_ready(_grad(_stiff, InterpolatedAdjoint(12), rate))


@pytest.mark.slow
@pytest.mark.parametrize("quadrature", (64, None))
def test_stiff_adjoint_resolved(quadrature):
    found = _grad(_stiff, InterpolatedAdjoint(12, quadrature=quadrature), 200.0)
    assert tree_difference(found, _reference(_stiff, 200.0)) < 1e-3


def _jumping(a, adjoint, jump_ts=None):
    vector_field = lambda t, y, a: jnp.where(t < 0.4, a * jnp.sin(y), -(a**2) * y)
    controller = _pid(1e-9) if jump_ts is None else _pid(1e-9, jump_ts=list(jump_ts))
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), args=a, adjoint=adjoint,
                          t1=-1.0, t0=0.7, dt0=None,
                          stepsize_controller=controller).ys)  # fmt: skip


@pytest.mark.slow
def test_jumps():
    """Known, they end an interval; unknown, they are found out."""
    a, adjoint = jnp.array(1.3), InterpolatedAdjoint(14)
    found = _grad(_jumping, adjoint, a, jump_ts=(0.4, 5.0))
    assert tree_difference(found, _reference(_jumping, a)) < 1e-6
    with pytest.raises(Exception, match=r"jump_ts=\.\.\."):
        jax.block_until_ready(_grad(_jumping, adjoint, a))


def test_failed_solve():
    """There is no gradient of it."""
    options = dict(stepsize_controller=_pid(1e-12), dt0=None, max_steps=8, throw=False)

    def f(x, y0):
        saveat = diffrax.SaveAt(t0=True, ts=[0.1, 0.9])
        return jnp.sum(_solve(args=x, y0=y0, saveat=saveat, **options).ys[0])

    found = jit(jax.grad(f, (0, 1)))(0.5, jnp.ones(2))
    assert all(bool(jnp.all(jnp.isnan(x))) for x in jtu.tree_leaves(found))


@pytest.mark.parametrize("throw", (pytest.param(False, marks=pytest.mark.slow), True))
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


def _hidden(a, adjoint, size, solver=diffrax.Tsit5()):
    """A component that is constant and large, and an oscillation of another `size`."""
    vector_field = lambda t, y, a: jnp.stack([0 * y[0], a * size * jnp.cos(40 * t)])
    return jnp.sum(_solve(terms=diffrax.ODETerm(vector_field), args=a, adjoint=adjoint,
                          y0=jnp.array([1e5, 0.0]), dt0=0.01, t1=2.0).ys)  # fmt: skip


def test_components_have_scales_of_their_own():
    """A large one does not hide what is lost of a small one; but rounding of the large one
    is not to be resolved."""
    grad = _jitted(
        lambda x, adjoint: _hidden(x[0], adjoint, x[1]), InterpolatedAdjoint(8)
    )
    with pytest.raises(Exception, match="does not resolve the solution"):
        jax.block_until_ready(grad(jnp.array([1.0, 40.0])))
    rounding = 1e5 * jnp.finfo(float).eps
    assert jnp.all(jnp.isfinite(grad(jnp.array([1.0, 40 * rounding]))))


@pytest.mark.slow
def test_failed_element_of_a_batch():
    """Adds zero to shared gradients where its cotangents are zero, and else NaN; whether it
    runs out of steps, starts at NaN, or meets it on its way."""
    rates, y0 = jnp.array([0.5, 60.0, 0.3, 0.4, -3.0]), jnp.ones(5).at[3].set(jnp.nan)

    def total(w, rates, y0, adjoint, masked):
        def one(rate, y0):
            field = lambda t, y, w: -rate * jnp.sqrt(y) + w * jnp.sin(3 * t)
            return _solve(terms=diffrax.ODETerm(field), args=w, y0=y0, dt0=None, t1=2.0,
                          stepsize_controller=_pid(1e-4), max_steps=64, throw=False,
                          adjoint=adjoint)  # fmt: skip

        solution = jax.vmap(one)(rates, y0)
        okay = jax.vmap(diffrax.is_successful)(solution.result)
        return jnp.sum(
            jnp.where(okay | jnp.array(not masked), solution.ys[:, -1], 0.0) ** 2
        )

    adjoint = InterpolatedAdjoint(12)
    grad = jit(jax.grad(ft.partial(total, adjoint=adjoint)), static_argnames="masked")
    found = grad(0.7, rates, y0, masked=True)
    good = jnp.array([0, 2, 4])
    true = jax.jacfwd(ft.partial(total, adjoint=diffrax.ForwardMode(), masked=True))
    assert tree_difference(found, jit(true)(0.7, rates[good], y0[good])) < 1e-3
    assert jnp.isnan(grad(0.7, rates, y0, masked=False))


#
# Collectives over a batch
#


def _normalised(w, ys, adjoint, **options):
    """Batch normalisation inside of the vector field."""

    def vector_field(t, y, w):
        mean = lax.pmean(y, "batch")
        variance = lax.pmean((y - mean) ** 2, "batch")
        return jnp.tanh(w @ ((y - mean) / jnp.sqrt(variance + 0.1)))

    def one(y, t1):
        term = diffrax.ODETerm(vector_field)
        return _solve(terms=term, args=w, y0=y, t1=t1, adjoint=adjoint, **options).ys

    times = jnp.broadcast_to(jnp.asarray(options.pop("t1", 1.0)), (len(ys),))
    return jnp.sum(jax.vmap(one, axis_name="batch")(ys, times) ** 2)


def test_collectives_refused():
    f = ft.partial(_normalised, ys=jnp.ones((4, 2)), adjoint=InterpolatedAdjoint(8))
    message = _mentions("collective", "'batch'", "ReversibleAdjoint()")
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(f, jnp.eye(2))
