"""Gradients of `InterpolatedAdjoint`: how accurate they are and what they cost."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_reversible import InterpolatedAdjoint

from ...helpers import jit, leaf_differences, times, tree_difference, weigh


_reference = diffrax.RecursiveCheckpointAdjoint()


def _pid(tol):
    return diffrax.PIDController(rtol=tol, atol=tol)


def _parameters():
    keys = jr.split(jr.PRNGKey(0), 3)
    return {
        "y0": {"a": jr.normal(keys[0], (2,)), "b": jnp.array(0.4)},
        "args": {"w": 0.8 * jr.normal(keys[1], (3, 3)), "nothing": None, "power": 2},
        "closed_over": jnp.array(1.3),
        "times": jnp.array([0.2, 1.7]),
    }


def _term(p):
    """A vector field that also closes over a parameter."""
    frequency = p["closed_over"]

    def vector_field(t, y, args):
        z = jnp.append(y["a"], y["b"])
        z = jnp.tanh(args["w"] @ z + jnp.cos(frequency * t)) - 0.2 * z ** args["power"]
        return {"a": z[:2], "b": z[2]}

    return diffrax.ODETerm(vector_field)


def _save_times(t0, t1):
    subs = {
        "some": diffrax.SubSaveAt(
            t0=True, ts=times(t0, t1, 0.0, 0.3, 0.3, 0.8), t1=True
        ),
        "others": [diffrax.SubSaveAt(ts=times(t0, t1, 0.1, 0.5))],
    }
    return diffrax.SaveAt(subs=subs)


def _save_end(t0, t1):
    del t0, t1
    return diffrax.SaveAt(t1=True)


def _solve(p, adjoint, tol=1e-9, saves=_save_end, **options):
    t0, t1 = p["times"]
    options = (
        dict(
            terms=_term(p),
            solver=diffrax.Tsit5(),
            dt0=None,
            stepsize_controller=_pid(tol),
            saveat=saves(t0, t1),
        )
        | options
    )
    return diffrax.diffeqsolve(
        t0=t0, t1=t1, y0=p["y0"], args=p["args"], adjoint=adjoint, **options
    )


def _loss(p, adjoint, *args, **options):
    solution = _solve(p, adjoint, *args, **options)
    return weigh((solution.ys, solution.ts))


def _grad(p, *args, **options):
    f = eqx.filter_grad(lambda p: _loss(p, *args, **options))
    return f(p)


@pytest.fixture(scope="module")
def true():
    """The gradient of nearly the exact solution."""
    return jit(lambda p: _grad(p, _reference, 1e-12))(_parameters())


def _decay(x, adjoint, t1=3.0, **options):
    term = diffrax.ODETerm(lambda t, y, x: -x * jnp.sin(3 * y) + jnp.cos(2 * t))
    options = dict(dt0=None, stepsize_controller=_pid(1e-8)) | options
    options |= dict(t0=0.0, t1=t1, y0=jnp.array(1.0), args=x, adjoint=adjoint)
    return diffrax.diffeqsolve(term, diffrax.Tsit5(), **options).ys[0]


@pytest.mark.slow
def test_error_falls_spectrally():
    """By the same factor for every further node, down to what is left by the solves."""
    numbers = (4, 7, 10, 20)
    steps = dict(stepsize_controller=diffrax.ConstantStepSize(), dt0=0.01)
    loss = ft.partial(_decay, t1=1.0, **steps)
    true = jit(jax.jacfwd(ft.partial(loss, adjoint=diffrax.ForwardMode())))(0.7)

    def error(nodes):
        adjoint = InterpolatedAdjoint(nodes, resolution_rtol=10.0)
        return tree_difference(
            jit(jax.grad(ft.partial(loss, adjoint=adjoint)))(0.7), true
        )

    errors = np.array(list(map(error, numbers)))
    print("".join(f"\n{n} nodes: {e:.1e}" for n, e in zip(numbers, errors)))
    slope, intercept = np.polyfit(numbers[:-1], np.log10(errors[:-1]), 1)
    line = 10 ** (slope * np.array(numbers[:-1]) + intercept)
    assert slope < -0.4
    assert np.all(errors[:-1] < 10 * line)
    assert errors[-1] < 1e-8


@pytest.mark.slow
def test_error_falls_with_the_tolerance(true):
    adjoint = InterpolatedAdjoint(16)
    grad = jit(lambda p, tol: _grad(p, adjoint, tol))
    for tol in (1e-4, 1e-6, 1e-8):
        error = tree_difference(grad(_parameters(), jnp.array(tol)), true)
        print(f"tolerance {tol}: {error:.1e}")
        assert error < 20 * tol


@pytest.mark.parametrize(
    "adjoint",
    (
        pytest.param(InterpolatedAdjoint(12), id="quadrature"),
        pytest.param(
            InterpolatedAdjoint(12, quadrature=None),
            id="along",
            marks=pytest.mark.slow,
        ),
    ),
)
def test_save_times_and_directions(adjoint):
    """Many save times, also equal ones and those at the ends, in several `SubSaveAt`s; in
    both directions of time; derivatives with respect to all times, too."""
    intervals = jnp.array([[0.2, 1.7], [1.1, -0.3], [0.5, 0.5]])

    @jit
    def grads(p):
        def each(adjoint, tol):
            grad = lambda t: _grad(p | {"times": t}, adjoint, tol, _save_times)
            return lax.map(grad, intervals)

        return each(adjoint, 1e-9), each(_reference, 1e-11)

    found, true = grads(_parameters())
    # The reference makes no step where there is nothing to solve.
    t0, t1 = found["times"][-1]
    np.testing.assert_allclose(t0 + t1, jnp.sum(true["times"][-1]), rtol=1e-6)
    found, true = (x | {"times": x["times"][:-1]} for x in (found, true))
    assert leaf_differences(found, true) < 1e-6


#
# Cost
#


class _Counter:
    def __init__(self):
        self.evaluations = 0

    def field(self, vector_field):
        def evaluated(_):
            self.evaluations += 1

        @jax.custom_vjp
        def field(t, y, args):
            jax.debug.callback(evaluated, t)
            return vector_field(t, y, args)

        def forward(t, y, args):
            return field(t, y, args), (t, y, args)

        def backward(residuals, cotangent):
            t, y, args = residuals
            _, vjp = jax.vjp(lambda y, args: vector_field(t, y, args), y, args)
            return jnp.zeros_like(t), *vjp(cotangent)

        field.defvjp(forward, backward)
        return field

    def count(self, f, *args):
        """The result, and the number of evaluations."""
        self.evaluations = 0
        result = jax.block_until_ready(f(*args))
        jax.effects_barrier()
        return result, self.evaluations


def _contracting(t, y, args):
    """Two components forget like `exp(-4 t)`, the third does not."""
    return jnp.tanh(args @ y + jnp.cos(t)) - jnp.array([4.0, 4.0, 0.0]) * y


@pytest.mark.slow
def test_contraction():
    """Where solving backwards for the solution multiplies its error by `exp(4 T)`: at T = 4
    `BacksolveAdjoint` needs more than three times as many evaluations for an error that
    is larger; at T = 10 it fails."""
    y0, w = jnp.array([1.0, -1.0, 0.5]), 0.6 * jr.normal(jr.PRNGKey(0), (3, 3))
    counter = _Counter()
    term = diffrax.ODETerm(counter.field(_contracting))

    def solve(y0, w, t1, tol, adjoint):
        options = dict(stepsize_controller=_pid(tol), max_steps=4096, throw=False)
        solution = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, t1, 0.05, y0, w, adjoint=adjoint, **options
        )
        return jnp.sum(jnp.sin(solution.ys))

    def grad(adjoint):
        return jit(jax.grad(ft.partial(solve, adjoint=adjoint), 1))

    forward = jit(ft.partial(solve, adjoint=diffrax.ForwardMode()))
    reference = grad(_reference)
    ours, theirs = grad(InterpolatedAdjoint(40)), grad(diffrax.BacksolveAdjoint())

    def measure(grad, t1, tol):
        _, before = counter.count(forward, y0, w, t1, tol)
        found, both = counter.count(grad, y0, w, t1, tol)
        error = tree_difference(found, reference(y0, w, t1, 1e-12))
        print(
            f"T = {t1}, tolerance {tol}: {both - before} evaluations, error {error:.1e}"
        )
        return both - before, error

    evaluations, error = measure(ours, 4.0, 1e-6)
    their_evaluations, their_error = measure(theirs, 4.0, 1e-10)
    assert error < their_error
    assert 3 * evaluations < their_evaluations

    _, error = measure(ours, 10.0, 1e-6)
    _, their_error = measure(theirs, 10.0, 1e-9)
    assert error < 1e-5
    assert not their_error < 0.01


def test_contraction_at_length():
    """Over a time in which solving backwards would multiply an error by `exp(40)`."""
    y0, w = jnp.array([1.0, -1.0, 0.5]), 0.6 * jr.normal(jr.PRNGKey(0), (3, 3))

    def loss(w, adjoint):
        solution = diffrax.diffeqsolve(
            *(diffrax.ODETerm(_contracting), diffrax.Tsit5(), 0.0, 10.0, 0.02, y0, w),
            adjoint=adjoint,
        )
        return jnp.sum(jnp.sin(solution.ys))

    found = jit(jax.grad(ft.partial(loss, adjoint=InterpolatedAdjoint(40))))(w)
    true = jit(jax.jacfwd(ft.partial(loss, adjoint=diffrax.ForwardMode())))(w)
    assert tree_difference(found, true) < 1e-5


#
# Transformations
#

_coarse = InterpolatedAdjoint(6, resolution_rtol=0.1)
_axes = {"y0": 0, "args": None, "closed_over": 0, "times": 0}


def _batch():
    return {
        "y0": jnp.array([1.0, 0.4, -0.3]),
        "args": {"w": jnp.array(0.7)},
        "closed_over": jnp.array([1.3, 1.8, 3.3]),
        "times": jnp.array([[0.2, 1.7], [1.1, -0.3], [0.3, 0.35]]),
    }


def _coarse_loss(p, adjoint=_coarse):
    """Every element makes steps of its own."""
    t0, t1 = p["times"]
    vector_field = lambda t, y, args: jnp.cos(p["closed_over"] * t) - args["w"] * y**2
    ys = diffrax.diffeqsolve(
        *(
            diffrax.ODETerm(vector_field),
            diffrax.Heun(),
            t0,
            t1,
            None,
            p["y0"],
            p["args"],
        ),
        saveat=diffrax.SaveAt(ts=times(t0, t1, 0.0, 0.3), t1=True),
        stepsize_controller=_pid(1e-3),
        adjoint=adjoint,
    ).ys
    return weigh(ys)


@pytest.mark.parametrize(
    "adjoint",
    (
        pytest.param(_coarse, id="quadrature"),
        pytest.param(
            InterpolatedAdjoint(6, resolution_rtol=0.1, quadrature=None),
            id="along",
            marks=pytest.mark.slow,
        ),
    ),
)
def test_vmap(adjoint):
    """Both orders of `vmap` and `grad`, against one solve at a time."""
    p = _batch()
    loss = ft.partial(_coarse_loss, adjoint=adjoint)

    @jit
    def grads(p):
        total = lambda p: jnp.sum(jax.vmap(loss, in_axes=(_axes,))(p))

        def one(i):
            pick = lambda axis, x: (
                x if axis is None else jtu.tree_map(lambda x: x[i], x)
            )
            is_none = lambda x: x is None
            return jax.grad(loss)(jtu.tree_map(pick, _axes, p, is_leaf=is_none))

        inside = jax.vmap(jax.grad(loss), in_axes=(_axes,))(p)
        return jax.grad(total)(p), inside, lax.map(one, jnp.arange(3))

    outside, inside, true = grads(p)
    assert leaf_differences(inside, true) < 1e-10
    total = true | {"args": jtu.tree_map(lambda x: jnp.sum(x, 0), true["args"])}
    assert leaf_differences(outside, total) < 1e-10


@pytest.mark.slow
def test_memory_of_vmapped_gradient():
    """Nearly that of a batched state: one cotangent of the weights for each element
    would be 20 times as much."""
    keys = jr.split(jr.PRNGKey(0))
    weights = jr.normal(keys[0], (64, 256)) / 8, jr.normal(keys[1], (256, 64)) / 16
    y0 = jnp.ones((128, 64))

    def one(y0, weights):
        term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(y @ w[0]) @ w[1])
        options = dict(solver=diffrax.Heun(), adjoint=InterpolatedAdjoint(5))
        solution = diffrax.diffeqsolve(
            term, t0=0.0, t1=1.0, dt0=0.1, y0=y0, args=weights, **options
        )
        return jnp.sum(solution.ys**2)

    def memory(f):
        compiled = jit(jax.grad(f, 1)).lower(y0, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    vmapped = memory(lambda y0, w: jnp.sum(jax.vmap(one, (0, None))(y0, w)))
    batched = memory(one)
    print(f"temp memory: vmapped {vmapped}, batched {batched} bytes")
    of_each_element = 128 * sum(w.nbytes for w in weights)
    assert vmapped < 2 * batched < of_each_element / 7


@pytest.mark.slow
def test_forward_mode():
    """That of the numerical solution; and forward over reverse mode."""
    p = _parameters()
    p = p | {"args": {"w": p["args"]["w"]}}
    # Fixed numbers of steps, since finite differences see no others.
    options = dict(stepsize_controller=diffrax.ConstantStepSize(), dt0=0.1)

    def loss(p, adjoint=InterpolatedAdjoint(8)):
        p = p | {"args": p["args"] | {"power": 2}}
        return _loss(p, adjoint, saves=_save_times, **options)

    def tangent(times):
        direction = jtu.tree_map(lambda x: jnp.cos(3 * x + 1), p)
        return direction | {"times": times}

    @jit
    def derivatives(p):
        tangents = [tangent(jnp.zeros(2)), tangent(jnp.array([-0.7, 0.4]))]
        both = jtu.tree_map(lambda *x: jnp.stack(x), *tangents)
        found = lax.map(lambda t: jax.jvp(loss, (p,), (t,))[1], both)
        reference = ft.partial(loss, adjoint=diffrax.ForwardMode())
        true = jax.jvp(reference, (p,), (tangents[0],))[1]

        gradient = jax.grad(loss)
        at = lambda s: gradient(jtu.tree_map(lambda x, d: x + s * d, p, tangents[0]))
        near = lax.map(at, jnp.array([0.0, 1e-5, -1e-5]))
        here = jtu.tree_map(lambda x: x[0], near)
        difference = jtu.tree_map(lambda x: (x[1] - x[2]) / 2e-5, near)
        product = jax.jvp(gradient, (p,), (tangents[0],))[1]
        with_times = sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, here, tangents[1])))
        return (found[0], true), (found[1], with_times), (product, difference)

    first, with_times, second = derivatives(p)
    # The steps stay where they are when only the ends of the interval move.
    assert tree_difference(*first) < 1e-12
    assert tree_difference(*with_times) < 1e-4
    assert tree_difference(*second) < 1e-6


@pytest.mark.parametrize(
    "quadrature", ("nodes", pytest.param(None, marks=pytest.mark.slow))
)
@pytest.mark.slow
def test_second_derivative_where_the_gradient_is_zero(quadrature):
    """The adjoint is exactly zero, so that nothing but its tangent needs small steps: with
    the steps for zero the error is a fifth."""
    adjoint = InterpolatedAdjoint(24, quadrature=quadrature)

    @jit
    def both(x):
        data = lax.stop_gradient(_decay(x, adjoint))
        residual = lambda x: _decay(x, adjoint) - data
        loss = lambda x: jnp.sum(residual(x) ** 2)
        slope = jax.jacfwd(residual)(x)
        return jax.grad(loss)(x), jax.jacfwd(jax.grad(loss))(x), 2 * slope**2

    gradient, found, true = both(jnp.array(0.7))
    assert gradient == 0
    assert found == pytest.approx(float(true), rel=1e-5)


def test_forward_mode_twice():
    both = [
        jit(jax.jacfwd(jax.jacfwd(ft.partial(_decay, adjoint=adjoint))))(jnp.array(0.7))
        for adjoint in (InterpolatedAdjoint(8), diffrax.ForwardMode())
    ]
    assert tree_difference(*both) < 1e-12
