"""The examples of diffrax's documentation, as gradients: smaller, without the training
around them, and with the adjoint method left open."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
import jax.tree_util as jtu
from diffrax import AbstractAdjoint
from jaxtyping import PyTree

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4, SymplecticAdjoint


class Example(NamedTuple):
    """A program to differentiate.

    - `make(solver, dtype)` gives a scalar function of parameters and an adjoint method,
        and the parameters.
    - `adjoint`: the one that is compared with diffrax's default.
    - `derivative`: what is taken of the function.
    """

    name: str
    make: Callable[[Any, Any], tuple[Callable[[PyTree, AbstractAdjoint], Any], PyTree]]
    solver: Any
    adjoint: AbstractAdjoint
    derivative: Callable = jax.grad


def _as(tree, dtype):
    """With floating-point arrays of this dtype; other leaves are left alone."""
    cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jtu.tree_map(cast, tree)


def _split(model):
    """The arrays of a model, and a function that makes them a model again."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    return arrays, lambda arrays: eqx.combine(arrays, static)


def _tolerances(dtype):
    return diffrax.PIDController(
        rtol=jnp.array(1e-3, dtype), atol=jnp.array(1e-6, dtype)
    )


#
# Networks
#


def _neural_ode(solver, dtype):
    """A network 2-64-64-2, a batch of 32, steps of a `PIDController`, 100 saved states."""
    keys = jr.split(jr.PRNGKey(0), 2)
    mlp = eqx.nn.MLP(2, 2, 64, 2, jax.nn.softplus, jnp.tanh, dtype=dtype, key=keys[0])
    params, model = _split((jnp.array(1.0, dtype), mlp))
    ts = jnp.linspace(0, 10, 100, dtype=dtype)
    y0 = jr.uniform(keys[1], (32, 2), dtype, minval=-0.6)
    # Anything of the kind that is to be learnt.
    angles = ts[None, :, None] + y0[:, None, :]
    data = jnp.stack([jnp.sin(angles[..., 0]), jnp.cos(angles[..., 1])], axis=-1)

    def field(t, y, args):
        del t
        scale, mlp = args
        return scale * mlp(y)

    def loss(params, adjoint):
        def solve(y0):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                ts[0],
                ts[-1],
                ts[1] - ts[0],
                y0,
                model(params),
                saveat=diffrax.SaveAt(ts=ts),
                stepsize_controller=_tolerances(dtype),
                adjoint=adjoint,
            ).ys

        return jnp.mean((data - jax.vmap(solve)(y0)) ** 2)

    return loss, params


def _latent_ode(solver, dtype):
    """The decoder: a network 16-16-16-16, a batch of 256, constant steps, and 20 saved
    states at times of each element's own."""
    keys = jr.split(jr.PRNGKey(0), 5)
    mlp = lambda key, final: eqx.nn.MLP(
        16, 16, 16, 2, jax.nn.softplus, final, dtype=dtype, key=key
    )
    params, model = _split(
        (
            jnp.array(1.0, dtype),
            mlp(keys[0], jnp.tanh),
            mlp(keys[1], lambda x: x),
            eqx.nn.Linear(16, 2, dtype=dtype, key=keys[2]),
        )
    )
    latents = jr.normal(keys[3], (256, 16), dtype)
    ts = jnp.sort(jr.uniform(keys[4], (256, 20), dtype, maxval=2.5))
    data = jnp.stack([jnp.cos(ts), jnp.sin(ts)], axis=-1)

    def field(t, y, args):
        del t
        scale, mlp = args
        return scale * mlp(y)

    def loss(params, adjoint):
        scale, mlp, to_hidden, to_data = model(params)

        def solve(ts, latent):
            ys = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                ts[0],
                ts[-1],
                jnp.array(0.4, dtype),
                to_hidden(latent),
                (scale, mlp),
                saveat=diffrax.SaveAt(ts=ts),
                adjoint=adjoint,
            ).ys
            return jax.vmap(to_data)(ys)

        return jnp.mean((data - jax.vmap(solve)(ts, latents)) ** 2)

    return loss, params


class ControlledField(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        del t, args
        return self.mlp(y).reshape(8, 3)


def neural_cde_data(dtype, batch=32):
    """Times and coefficients of cubic paths through 100 points: spirals, of which half
    turn the other way round."""
    ts = jnp.linspace(0, 4 * math.pi, 100, dtype=dtype)
    theta = jr.uniform(jr.PRNGKey(1), (batch,), dtype, maxval=2 * math.pi)
    start = jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
    matrix = jnp.array([[-0.3, 2], [-2, -0.3]], dtype)
    flow = jax.vmap(lambda t: jsp.linalg.expm(t * matrix))(ts)
    ys = jnp.einsum("tij,bj->bti", flow, start)
    ys = ys.at[: batch // 2, :, 0].multiply(-1)
    time = jnp.broadcast_to(ts[:, None], (batch, 100, 1))
    ys = jnp.concatenate([time, ys], axis=-1)
    return ts, jax.vmap(lambda ys: diffrax.backward_hermite_coefficients(ts, ys))(ys)


def neural_cde_model(dtype):
    """The initial network and the vector field."""
    keys = jr.split(jr.PRNGKey(0), 2)
    initial = eqx.nn.MLP(3, 8, 128, 1, dtype=dtype, key=keys[0])
    mlp = eqx.nn.MLP(
        8, 8 * 3, 128, 1, jax.nn.softplus, jnp.tanh, dtype=dtype, key=keys[1]
    )
    return initial, ControlledField(mlp)


def solve_neural_cde(model, solver, controller, ts, coeffs, **options):
    """One element of the batch. diffrax's example has `rtol=1e-3, atol=1e-6`."""
    initial, field = model
    control = diffrax.CubicInterpolation(ts, coeffs)
    return diffrax.diffeqsolve(
        diffrax.ControlTerm(field, control).to_ode(),
        solver,
        ts[0],
        ts[-1],
        None,
        initial(control.evaluate(ts[0])),
        stepsize_controller=controller,
        **options,
    )


def _neural_cde(solver, dtype):
    """A network 8-128-24, a batch of 32, cubic controls through 100 points, steps of a
    `PIDController`."""
    params, model = _split(neural_cde_model(dtype))
    ts, coeffs = neural_cde_data(dtype)

    def loss(params, adjoint):
        def solve(coeffs):
            return solve_neural_cde(
                model(params), solver, _tolerances(dtype), ts, coeffs, adjoint=adjoint
            ).ys

        return jnp.mean(jax.vmap(solve)(coeffs) ** 2)

    return loss, params


class _ConcatSquash(eqx.Module):
    of_y: eqx.nn.Linear
    gate: eqx.nn.Linear
    shift: eqx.nn.Linear

    def __init__(self, in_size, out_size, dtype, key):
        keys = jr.split(key, 3)
        linear = eqx.nn.Linear
        self.of_y = linear(in_size, out_size, dtype=dtype, key=keys[0])
        self.gate = linear(1, out_size, dtype=dtype, key=keys[1])
        self.shift = linear(1, out_size, use_bias=False, dtype=dtype, key=keys[2])

    def __call__(self, t, y):
        return self.of_y(y) * jax.nn.sigmoid(self.gate(t)) + self.shift(t)


def _continuous_normalising_flow(field):
    def make(solver, dtype):
        """Two blocks of a network 2-64-64-64-2, a batch of 100, backwards in time."""
        keys = jr.split(jr.PRNGKey(0), 10)
        sizes = (2, 64, 64, 64, 2)
        block = lambda keys: [
            _ConcatSquash(*pair, dtype, key)
            for *pair, key in zip(sizes, sizes[1:], keys)
        ]
        params, model = _split([block(keys[:4]), block(keys[4:8])])
        ys, eps = (jr.normal(key, (100, 2), dtype) for key in keys[8:])
        t0, t1, dt0 = jnp.array([0.5, 0.0, -0.05], dtype)

        def loss(params, adjoint):
            def one(y, eps):
                state = y, jnp.zeros((), dtype)
                for layers in reversed(model(params)):
                    solution = diffrax.diffeqsolve(
                        diffrax.ODETerm(field),
                        solver,
                        t0,
                        t1,
                        dt0,
                        state,
                        (eps, layers),
                        adjoint=adjoint,
                    )
                    state = jtu.tree_map(lambda x: x[-1], solution.ys)
                y, change = state
                return change - jnp.sum(y**2) / 2

            return -jnp.mean(jax.vmap(one)(ys, eps))

        return loss, params

    return make


def _flow(t, y, layers):
    *inner, last = layers
    for layer in inner:
        y = jnp.tanh(layer(t[None], y))
    return last(t[None], y)


def _exact_trace(t, y, args):
    (y, _), (_, layers) = y, args
    f, vjp = jax.vjp(lambda y: _flow(t, y, layers), y)
    (jacobian,) = jax.vmap(vjp)(jnp.eye(2, dtype=y.dtype))
    return f, jnp.trace(jacobian)


def _hutchinsons_trace(t, y, args):
    (y, _), (eps, layers) = y, args
    f, vjp = jax.vjp(lambda y: _flow(t, y, layers), y)
    (product,) = vjp(eps)
    return f, jnp.sum(product * eps)


class _DrivenField(eqx.Module):
    mlp: eqx.nn.MLP
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, shape, dtype, key):
        lipswish = lambda x: 0.909 * jax.nn.silu(x)
        self.mlp = eqx.nn.MLP(
            17, math.prod(shape), 16, 1, lipswish, jnp.tanh, dtype=dtype, key=key
        )
        self.shape = shape

    def __call__(self, t, y, args):
        del args
        return self.mlp(jnp.append(t, y)).reshape(self.shape)


def _neural_sde(solver, dtype):
    """Generator and discriminator: networks of width 16, a batch of 128, 63 constant
    steps."""
    keys = jr.split(jr.PRNGKey(0), 10)
    mlp = lambda size, key: eqx.nn.MLP(size, 16, 16, 1, dtype=dtype, key=key)
    linear = lambda key: eqx.nn.Linear(16, 1, dtype=dtype, key=key)
    generator = (
        mlp(5, keys[0]),
        _DrivenField((16,), dtype, keys[1]),
        _DrivenField((16, 3), dtype, keys[2]),
        linear(keys[3]),
    )
    discriminator = (
        mlp(2, keys[4]),
        _DrivenField((16,), dtype, keys[5]),
        _DrivenField((16, 1), dtype, keys[6]),
        linear(keys[7]),
    )
    params, model = _split((generator, _clipped(discriminator)))
    ts = jnp.linspace(0, 63, 64, dtype=dtype)
    data = jnp.cumsum(0.2 * jr.normal(keys[9], (128, 64, 1), dtype), axis=1)
    keys = jr.split(keys[8], 128)

    def solve(model, start, control, saveat, adjoint):
        initial, drift, driven, readout = model
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(drift), diffrax.ControlTerm(driven, control)
        )
        solution = diffrax.diffeqsolve(
            terms,
            solver,
            ts[0],
            ts[-1],
            jnp.array(1.0, dtype),
            initial(start),
            saveat=saveat,
            adjoint=adjoint,
        )
        return jax.vmap(readout)(solution.ys)

    def loss(params, adjoint):
        generator, discriminator = model(params)

        def score(ys):
            control = diffrax.LinearInterpolation(ts, ys)
            start = jnp.append(ts[0], ys[0])
            saveat = diffrax.SaveAt(t0=True, t1=True)
            return solve(discriminator, start, control, saveat, adjoint)

        def generate(key):
            start, path = jr.split(key)
            motion = diffrax.VirtualBrownianTree(
                ts[0], ts[-1], 0.5, jax.ShapeDtypeStruct((3,), dtype), path
            )
            start = jr.normal(start, (5,), dtype)
            return solve(generator, start, motion, diffrax.SaveAt(ts=ts), adjoint)

        fakes = jax.vmap(generate)(keys)
        return jnp.mean(jax.vmap(score)(data) - jax.vmap(score)(fakes))

    return loss, params


def _clipped(model):
    """With weights as the example has them in training, so that the flow is gentle."""

    def clip(x):
        if not isinstance(x, eqx.nn.Linear):
            return x
        limit = 1 / x.out_features
        return eqx.tree_at(lambda x: x.weight, x, x.weight.clip(-limit, limit))

    return jtu.tree_map(clip, model, is_leaf=lambda x: isinstance(x, eqx.nn.Linear))


def _symplectic_memory(max_steps):
    def make(solver, dtype):
        """A network 16-16-16, a batch of 256, 7 constant steps, 20 saved states."""
        keys = jr.split(jr.PRNGKey(0), 3)
        params = [jr.normal(key, (16, 16), dtype) / 4 for key in keys[:2]]
        y0 = jr.normal(keys[2], (256, 16), dtype)
        ts = jnp.linspace(0, 2.5, 20, dtype=dtype)

        def field(t, y, params):
            del t
            return jnp.tanh(params[1] @ jax.nn.softplus(params[0] @ y))

        def loss(params, adjoint):
            def solve(y0):
                return diffrax.diffeqsolve(
                    diffrax.ODETerm(field),
                    solver,
                    ts[0],
                    ts[-1],
                    jnp.array(0.4, dtype),
                    y0,
                    params,
                    saveat=diffrax.SaveAt(ts=ts),
                    adjoint=adjoint,
                    max_steps=max_steps,
                ).ys

            return jnp.mean(jax.vmap(solve)(y0) ** 2)

        return loss, params

    return make


#
# Small equations
#


def _kalman_filter(solver, dtype):
    """Two states and their covariance, 499 constant steps, 500 saved states."""
    A = jnp.array([[0, 1], [-1, -1.4]], dtype)
    C = jnp.array([[0, 1]], dtype)
    ts = jnp.arange(500, dtype=dtype) / 100
    exact = jnp.exp(-0.3 * ts)[:, None] * jnp.stack([jnp.cos(ts), -jnp.sin(ts)], -1)
    measured = exact[:, 1:] + jr.normal(jr.PRNGKey(0), (500, 1), dtype)
    y0 = jnp.zeros(2, dtype), 10 * jnp.eye(2, dtype=dtype)
    params = 0.1 * jnp.eye(2, dtype=dtype), jnp.eye(1, dtype=dtype)

    def field(t, y, args):
        (x, P), (Q_root, R_root) = y, args
        K = P @ C.T @ jnp.linalg.inv(R_root.T @ R_root)
        dP = A @ P + P @ A.T + Q_root.T @ Q_root - K @ C @ P
        observed = diffrax.LinearInterpolation(ts, measured).evaluate(t)
        return A @ x + K @ (observed - C @ x), dP

    def loss(params, adjoint):
        found, _ = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            ts[0],
            ts[-1],
            jnp.array(0.01, dtype),
            y0,
            params,
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=adjoint,
        ).ys
        return jnp.mean((exact - found) ** 2)

    return loss, params


def _forcing(solver, dtype):
    """One variable, a cubic force through four points, 100 constant steps."""
    ts = jnp.linspace(0, 10, 4, dtype=dtype)
    points = jnp.array([3, 0.5, -0.8, 1.8], dtype)

    def loss(points, adjoint):
        coeffs = diffrax.backward_hermite_coefficients(ts, points)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, force: force.evaluate(t) - y),
            solver,
            ts[0],
            ts[-1],
            jnp.array(0.1, dtype),
            jnp.array(1, dtype),
            diffrax.CubicInterpolation(ts, coeffs),
            adjoint=adjoint,
        ).ys[0]

    return loss, points


def _predator_prey(t, y, args):
    del t
    (prey, predator), (a, b, c, d) = y, args
    return a * prey - b * prey * predator, d * prey * predator - c * predator


def _solve_predator_prey(solver, dtype, y0, args, **options):
    t0, t1, dt0 = jnp.array([0, 140, 0.1], dtype)
    term = diffrax.ODETerm(_predator_prey)
    return diffrax.diffeqsolve(term, solver, t0, t1, dt0, y0, args, **options).ys


def _coupled_odes(solver, dtype):
    """A fit of the four parameters and of the start, 1,400 constant steps, 1,000 saved
    states."""
    ts = jnp.linspace(0, 140, 1000, dtype=dtype)
    data = 10 + 5 * jnp.sin(ts / 5), 5 + 5 * jnp.cos(ts / 5)
    start, args = _as(
        (jnp.array([10.0, 10.0]), jnp.array([0.1, 0.02, 0.4, 0.02])), dtype
    )

    def loss(params, adjoint):
        ys = _solve_predator_prey(
            solver, dtype, *params, saveat=diffrax.SaveAt(ts=ts), adjoint=adjoint
        )
        return sum(jnp.mean((x - y) ** 2) for x, y in zip(data, ys))

    return loss, (tuple(start), tuple(args))


def _hessian(solver, dtype):
    """Forward over reverse mode, 1,400 constant steps of two variables."""
    start, args = _as(
        (jnp.array([10.0, 10.0]), jnp.array([0.1, 0.02, 0.4, 0.02])), dtype
    )

    def loss(y0, adjoint):
        prey, _ = _solve_predator_prey(solver, dtype, y0, tuple(args), adjoint=adjoint)
        return prey[0]

    return loss, tuple(start)


_exact, _hutchinson = map(
    _continuous_normalising_flow, (_exact_trace, _hutchinsons_trace)
)
_tsit5 = diffrax.Tsit5(), SymplecticAdjoint()
_alf4 = ReversibleALF4(), ReversibleAdjoint()
EXAMPLES = (
    Example("neural ODE", _neural_ode, *_tsit5),
    Example("latent ODE", _latent_ode, *_tsit5),
    Example("neural CDE", _neural_cde, *_tsit5),
    Example("CNF, exact trace", _exact, *_tsit5),
    Example("CNF, Hutchinson's trace", _hutchinson, *_tsit5),
    Example("Kalman filter", _kalman_filter, diffrax.Dopri5(), SymplecticAdjoint()),
    Example("forcing", _forcing, *_tsit5),
    Example("coupled ODEs, fit", _coupled_odes, *_tsit5),
    Example(
        "Hessian",
        _hessian,
        # Forward mode asks for this.
        diffrax.Tsit5(scan_kind="bounded"),
        SymplecticAdjoint(),
        jax.hessian,
    ),
    *(
        Example(f"room for {n:,} steps", _symplectic_memory(n), *_tsit5)
        for n in (16, 4096, 65536)
    ),
    Example("neural SDE", _neural_sde, diffrax.ReversibleHeun(), ReversibleAdjoint()),
    Example("neural ODE", _neural_ode, *_alf4),
    Example("latent ODE", _latent_ode, *_alf4),
    Example("CNF, exact trace", _exact, *_alf4),
    Example("CNF, Hutchinson's trace", _hutchinson, *_alf4),
)
