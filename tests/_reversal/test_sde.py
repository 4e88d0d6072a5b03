import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from diffrax_reversible import (
    EES25,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
)

from ..helpers import jit, leaf_differences, UNROLLED
from ..reference import Problem, unrolled


_solvers = (
    pytest.param(ReversibleALF2(), id="ALF2"),
    pytest.param(diffrax.ReversibleHeun(), id="ReversibleHeun"),
    pytest.param(Reversible(diffrax.Heun()), id="Reversible-Heun"),
)
_knots = jnp.linspace(0.0, 1.0, 9)


def _parameters():
    keys = iter(jr.split(jr.PRNGKey(0), 3))
    return {
        "y0": jnp.array([0.3, -0.4, 1.0]),
        "drift": jr.normal(next(keys), (3, 3)) / 2,
        "diffusion": jr.normal(next(keys), (3, 2)) / 3,
        "path": jnp.stack([jnp.sin(3 * _knots), jnp.cos(2 * _knots)], axis=-1),
    }


def _brownian(shape, tol=1e-3, key=5):
    return diffrax.VirtualBrownianTree(0.0, 1.0, tol, shape, jr.PRNGKey(key))


def _matrix(p):
    return lambda t, y, args: args["diffusion"] * jnp.cos(y)[:, None]


def _general(p):
    return diffrax.ControlTerm(_matrix(p), _brownian((2,)))


def _diagonal(p):
    def field(t, y, args):
        return lx.DiagonalLinearOperator(p["diffusion"][:, 0] * jnp.cos(y))

    return diffrax.ControlTerm(field, _brownian((3,)))


def _interpolated(p):
    return diffrax.ControlTerm(
        _matrix(p), diffrax.LinearInterpolation(_knots, p["path"])
    )


def _callable(p):
    # An increment that closes over what is differentiated.
    increment = lambda t0, t1: p["path"][3] * (jnp.sin(t1) - jnp.sin(t0))
    return diffrax.ControlTerm(_matrix(p), increment)


def _loss(p, solver, control_term, adjoint, t=(0.0, 1.0)):
    def terms(p):
        drift = diffrax.ODETerm(lambda t, y, args: jnp.tanh(args["drift"] @ y) + t)
        return diffrax.MultiTerm(drift, control_term(p))

    subs = [
        diffrax.SubSaveAt(ts=jnp.array([0.22, 0.7]), t1=True),
        diffrax.SubSaveAt(ts=jnp.array([0.5]), fn=lambda t, y, args: y**2),
    ]
    rest = (t[0], t[1], (t[1] - t[0]) / 11.7, p["y0"], p)
    options = dict(saveat=diffrax.SaveAt(subs=subs), max_steps=64)
    if adjoint is UNROLLED:
        solution = unrolled(Problem(terms, solver), p, *rest, **options)
    else:
        options |= dict(adjoint=adjoint)
        solution = diffrax.diffeqsolve(terms(p), solver, *rest, **options)
    return sum(jnp.sum(jnp.sin(y)) for y in solution.ys)


@pytest.mark.parametrize(
    "solver, control_term",
    [
        pytest.param(ReversibleALF2(), _general, marks=pytest.mark.slow),
        (ReversibleALF2(), _interpolated),
        pytest.param(diffrax.ReversibleHeun(), _diagonal, marks=pytest.mark.slow),
        pytest.param(diffrax.ReversibleHeun(), _callable, marks=pytest.mark.slow),
        pytest.param(Reversible(diffrax.Heun()), _general, marks=pytest.mark.slow),
        pytest.param(Reversible(diffrax.Heun()), _interpolated, marks=pytest.mark.slow),
        (diffrax.LeapfrogMidpoint(), _callable),
    ],
)
def test_gradients(solver, control_term):
    """Of drift, diffusion, what the control is made of, and, of a path that is known
    between its knots, of the ends."""
    with_times = control_term in (_interpolated, _callable)
    p, t = _parameters(), (jnp.array(0.05), jnp.array(0.93))

    def f(x, adjoint):
        p, t = x if with_times else (x, (0.0, 1.0))
        return _loss(p, solver, control_term, adjoint, t)

    x = (p, t) if with_times else p
    found = jit(jax.grad(lambda x: f(x, ReversibleAdjoint(checkpoints=2))))(x)
    true = jax.grad(f)(x, UNROLLED)
    assert leaf_differences(found, true) < 1e-10
    true = true[0] if with_times else true
    assert jnp.any(true["path"] != 0) == with_times


def _additive(t, y, args):
    return jnp.array([[0.5, 0.2], [-0.1, 0.4]]) * (1 + 0.5 * t)


def _commutative(t, y, args):
    return jnp.diag(0.5 * jnp.sin(y) + 0.2)


def _non_commutative(t, y, args):
    a, b = y
    return jnp.array([[jnp.cos(b), 0.3 * a], [0.5 * a, jnp.sin(b) + 0.4]])


@pytest.mark.parametrize(
    "diffusion, order",
    [
        pytest.param(_additive, 1.0, marks=pytest.mark.slow),
        pytest.param(_commutative, 1.0, marks=pytest.mark.slow),
        pytest.param(_non_commutative, 0.5, marks=pytest.mark.slow),
    ],
)
def test_strong_order(diffusion, order):
    """Of all solvers, on the same Brownian paths; the reference is a fine solve."""
    drift = lambda t, y, args: jnp.stack([jnp.sin(y[1]), -y[0]])
    keys = jr.split(jr.PRNGKey(0), 150)

    def ends(solver, steps):
        def one(key):
            path = diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-11, (2,), key)
            control_term = diffrax.ControlTerm(diffusion, path)
            solution = diffrax.diffeqsolve(
                diffrax.MultiTerm(diffrax.ODETerm(drift), control_term),
                solver,
                0.0,
                1.0,
                1.0 / steps,
                jnp.array([0.3, 0.6]),
                max_steps=None,
            )
            return solution.ys[0]

        return jax.vmap(one)(keys)

    true = jit(ends, static_argnums=0)(diffrax.Heun(), 1024.0)
    steps = np.array([16.0, 32.0, 64.0])
    for param in (*_solvers, pytest.param(EES25())):
        (solver,) = param.values
        solve = jit(lambda n, solver=solver: ends(solver, n))
        square = lambda x: jnp.mean(jnp.sum(x**2, axis=-1))
        errors = [float(jnp.sqrt(square(solve(n) - true))) for n in steps]
        found = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        print(f"{solver}: strong order {found:.2f}, errors {errors}")
        assert abs(found - order) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("solver", _solvers)
def test_memory_of_latent_sde(solver):
    """Networks for drift and diffusion, 1,000 steps."""
    f, g = (
        eqx.nn.MLP(5, size, 32, 1, activation=jnp.tanh, key=jr.PRNGKey(size))
        for size in (4, 8)
    )
    parameters, static = eqx.partition((f, g), eqx.is_inexact_array)

    def loss(parameters, y0, steps):
        f, g = eqx.combine(parameters, static)
        with_time = lambda t, y: jnp.append(y, t)
        diffusion = lambda t, y, args: 0.1 * g(with_time(t, y)).reshape(4, 2)
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: f(with_time(t, y))),
                diffrax.ControlTerm(diffusion, _brownian((2,), 1e-4)),
            ),
            solver,
            0.0,
            1.0,
            1.0 / steps,
            y0,
            max_steps=steps + 8,
            adjoint=ReversibleAdjoint(),
        )
        return jnp.sum(solution.ys**2)

    def memory(steps):
        grad = jit(jax.grad(lambda p, y0: loss(p, y0, steps), (0, 1)))
        compiled = grad.lower(parameters, jnp.full(4, 0.3)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = memory(10), memory(1000)
    print(f"{solver}: temp memory {few} and {many} bytes with 10 and 1,000 steps")
    assert many <= few


def _solve(solver, path):
    term = diffrax.ControlTerm(lambda t, y, args: jnp.ones((3, 2)), path)
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    return diffrax.diffeqsolve(
        diffrax.MultiTerm(drift, term),
        solver,
        0.0,
        1.0,
        0.1,
        jnp.ones(3),
        adjoint=ReversibleAdjoint(),
    )


# diffrax only warns.
@pytest.mark.filterwarnings("ignore:`ReversibleALF4` is not marked as converging")
@pytest.mark.parametrize(
    "solver, match",
    [
        (ReversibleALF4(), "not known to converge"),
        (Reversible(diffrax.Euler()), "converges to the Itô solution"),
        (Reversible(diffrax.Tsit5()), "not known to converge to the Stratonovich"),
    ],
)
def test_refused(solver, match):
    with pytest.raises(ValueError, match=match):
        _solve(solver, _brownian((2,)))


def test_unsafe_brownian_path_refused():
    path = diffrax.UnsafeBrownianPath((2,), jr.PRNGKey(0))
    with pytest.raises(ValueError, match="`UnsafeBrownianPath`"):
        _solve(ReversibleALF2(), path)
