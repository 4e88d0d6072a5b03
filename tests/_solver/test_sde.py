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

from ..helpers import jit, leaf_differences, quick


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
    drift = diffrax.ODETerm(lambda t, y, args: jnp.tanh(args["drift"] @ y) + t)
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(drift, control_term(p)),
        solver,
        t0=t[0],
        t1=t[1],
        dt0=(t[1] - t[0]) / 12,
        y0=p["y0"],
        args=p,
        saveat=diffrax.SaveAt(
            subs=[
                diffrax.SubSaveAt(ts=jnp.array([0.22, 0.7]), t1=True),
                diffrax.SubSaveAt(ts=jnp.array([0.5]), fn=lambda t, y, args: y**2),
            ]
        ),
        max_steps=64,
        adjoint=adjoint,
    )
    return sum(jnp.sum(jnp.sin(y)) for y in solution.ys)


@pytest.mark.parametrize(
    "solver, control_term",
    [
        (ReversibleALF2(), _general),
        pytest.param(ReversibleALF2(), _interpolated, marks=pytest.mark.slow),
        (diffrax.ReversibleHeun(), _diagonal),
        pytest.param(diffrax.ReversibleHeun(), _callable, marks=pytest.mark.slow),
        pytest.param(Reversible(diffrax.Heun()), _general, marks=pytest.mark.slow),
        (Reversible(diffrax.Tsit5()), _interpolated),
        (diffrax.LeapfrogMidpoint(), _callable),
    ],
)
def test_gradients(solver, control_term):
    """Of drift, diffusion, and what the control is made of."""

    @jit
    def grads(p):
        return [
            jax.grad(_loss)(p, solver, control_term, adjoint)
            for adjoint in (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
        ]

    found, true = grads(_parameters())
    assert leaf_differences(found, true) < 1e-10
    assert jnp.any(true["path"] != 0) == (control_term in (_interpolated, _callable))


def test_time_derivatives_of_heun():
    """Of a path that is known between its knots, the ends may be differentiated."""
    solver, p = diffrax.ReversibleHeun(), _parameters()

    @jit
    def grads(t0, t1):
        return [
            jax.grad(lambda *t: _loss(p, solver, _interpolated, adjoint, t), (0, 1))(
                t0, t1
            )
            for adjoint in (
                ReversibleAdjoint(checkpoints=2),
                diffrax.RecursiveCheckpointAdjoint(),
            )
        ]

    found, true = grads(0.05, 0.93)
    assert leaf_differences(found, true) < 1e-10


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
        (_additive, 1.0),
        pytest.param(_commutative, 1.0, marks=pytest.mark.slow),
        (_non_commutative, 0.5),
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

    true = jax.jit(ends, static_argnums=0)(diffrax.Heun(), 1024.0)
    steps = np.array([16.0, 32.0, 64.0])
    for param in (*_solvers, pytest.param(EES25())):
        (solver,) = param.values
        solve = jax.jit(lambda n, solver=solver: ends(solver, n))
        square = lambda x: jnp.mean(jnp.sum(x**2, axis=-1))
        errors = [float(jnp.sqrt(square(solve(n) - true))) for n in steps]
        found = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        print(f"{solver}: strong order {found:.2f}, errors {errors}")
        assert abs(found - order) < 0.15


@pytest.mark.parametrize("solver", quick(_solvers, "ReversibleHeun"))
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
        grad = jax.jit(jax.grad(lambda p, y0: loss(p, y0, steps), (0, 1)))
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
        (ReversibleALF4(), "steps back and forth"),
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


class _Ito(diffrax.Euler):
    def backward_step(self, *args):
        raise AssertionError


def test_ito_refused():
    with pytest.raises(ValueError, match="converges to the Itô solution"):
        _solve(_Ito(), _brownian((2,)))
