"""Events: the solve ends where diffrax ends it, and is differentiated through that."""

import itertools as it

import diffrax
import jax
import jax.numpy as jnp
import optimistix as optx
import pytest

from diffrax_reversible import (
    ALF,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
)

from ...helpers import (
    adjoint_of,
    directional_difference,
    jit,
    tree_difference,
)


_newton = optx.Newton(1e-11, 1e-11)


def _crosses(t, y, args, **kwargs):
    return y[0] - args["level"]


def _above(t, y, args, **kwargs):
    return y[1] < -args["level"]


def _one(root_finder, p):
    del p
    return diffrax.Event(_crosses, root_finder)


def _downwards(root_finder, p):
    del p
    return diffrax.Event(_crosses, root_finder, direction=False)


def _several(root_finder, p):
    del p
    return diffrax.Event({"a": _above, "b": [_crosses]}, root_finder)


def _closure(root_finder, p):
    level = p["level"]
    return diffrax.Event(
        lambda t, y, args, **kw: y[0] - level * jnp.cos(t), root_finder
    )


_EVENTS = {
    "real": _one,
    "direction": _downwards,
    "several": _several,
    "closure": _closure,
}
_ROOT_FINDERS = {"no root finder": None, "Newton": _newton}
_SOLVERS = {
    "ALF2": ReversibleALF2(),
    "ALF4": ReversibleALF4(),
    "coupled": Reversible(diffrax.Bosh3()),
    "Tsit5": diffrax.Tsit5(),
    "MALI": ALF(),
    "Heun": diffrax.ReversibleHeun(),
}
_CONTROLLERS = {
    "constant": (diffrax.ConstantStepSize(), 0.07),
    "PID": (diffrax.PIDController(rtol=1e-5, atol=1e-5), None),
}


def _cases(default, *axes):
    """The product, by name, of which only the default ones are not slow."""
    return [
        pytest.param(
            *(axis[name] for axis, name in zip(axes, names)),
            id="-".join(names),
            marks=() if names in default else pytest.mark.slow,
        )
        for names in it.product(*axes)
    ]


def _vector_field(t, y, args):
    return jnp.stack([y[1], -args["rate"] * jnp.sin(y[0]) + 0.1 * jnp.cos(t)])


def _loss(p, solver, stepping, event, root_finder, adjoint):
    controller, dt0 = stepping
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_vector_field),
        solver,
        0.0,
        8.0,
        dt0,
        p["y0"],
        p,
        event=event(root_finder, p),
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(t1=True, ts=jnp.array([0.2, 0.5, 3.0]), steps=2),
        adjoint=adjoint,
        max_steps=2048,
    )
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)
    return jnp.sum(finite(solution.ys) ** 2) + jnp.sum(finite(solution.ts))


def _parameters():
    return dict(y0=jnp.array([1.0, 0.5]), rate=jnp.array(1.3), level=jnp.array(0.3))


@pytest.mark.parametrize(
    "solver, stepping, event, root_finder",
    _cases(
        (("ALF2", "PID", "several", "Newton"),),
        *(_SOLVERS, _CONTROLLERS, _EVENTS, _ROOT_FINDERS),
    )[1::3],
)
def test_against_recursive_checkpoints(solver, stepping, event, root_finder):
    @jit
    def values_and_grads(p):
        return [
            jax.value_and_grad(_loss)(p, solver, stepping, event, root_finder, adjoint)
            for adjoint in (adjoint_of(solver), diffrax.RecursiveCheckpointAdjoint())
        ]

    (value, grad), (true_value, true_grad) = values_and_grads(_parameters())
    assert abs(value - true_value) < 1e-12 * abs(true_value)
    assert tree_difference(grad, true_grad) < 1e-9


@pytest.mark.parametrize(
    "solver, event, root_finder",
    _cases(
        (
            ("ALF2", "closure", "Newton"),
            ("Tsit5", "real", "Newton"),
            ("ALF2", "direction", "no root finder"),
        ),
        *(_SOLVERS, _EVENTS, _ROOT_FINDERS),
    ),
)
def test_against_finite_differences(solver, event, root_finder):
    stepping = _CONTROLLERS["constant"]
    f = lambda p: _loss(p, solver, stepping, event, root_finder, adjoint_of(solver))
    direction = dict(
        y0=jnp.array([0.4, -0.7]), rate=jnp.array(0.2), level=jnp.array(0.5)
    )
    grad = jit(jax.grad(f))(_parameters())
    found = sum(jnp.vdot(grad[key], direction[key]) for key in grad)
    true = directional_difference(jit(f), _parameters(), direction, 1e-4)
    assert abs(found - true) < 1e-5 * abs(true)


def test_batch():
    """Elements end at different times; one of them by no event."""

    def loss(y0, rate):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_vector_field),
            ReversibleALF2(),
            0.0,
            2.0,
            None,
            y0,
            dict(rate=rate, level=0.3),
            event=diffrax.Event(_crosses, _newton),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
            adjoint=ReversibleAdjoint(),
            max_steps=512,
        )
        return jnp.sum(solution.ys**2)

    y0 = jnp.array([[1.0, 0.5], [1.1, -0.5], [0.1, -0.2]])
    total = lambda *x: jnp.sum(jax.vmap(loss, (0, None))(*x))
    found, rate = jit(jax.grad(total, (0, 1)))(y0, jnp.array(1.3))
    alone = jit(jax.grad(loss, (0, 1)))
    rows = [alone(y, jnp.array(1.3)) for y in y0]
    assert tree_difference(found, jnp.stack([y for y, _ in rows])) < 1e-9
    assert tree_difference(rate, sum(rate for _, rate in rows)) < 1e-9


def test_steady_state():
    """An infinite interval, and a condition that asks for the user's controller."""

    def loss(y0, rate, adjoint):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: rate * (jnp.cos(rate) - y)),
            ReversibleALF2(),
            0.0,
            jnp.inf,
            0.1,
            y0,
            rate,
            event=diffrax.Event(diffrax.steady_state_event()),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-4),
            adjoint=adjoint,
            max_steps=256,
        )
        return jnp.sum(solution.ys**2)

    @jit
    def grads(*x):
        adjoints = (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
        return [jax.grad(loss, (0, 1))(*x, adjoint) for adjoint in adjoints]

    grad, true_grad = grads(jnp.array([0.2, 0.9]), jnp.array(1.2))
    assert tree_difference(grad, true_grad) < 1e-9


def test_event_at_the_start():
    def loss(y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            ReversibleALF2(),
            0.0,
            1.0,
            0.1,
            y0,
            event=diffrax.Event(lambda t, y, args, **kwargs: y[0] > 0),
            adjoint=ReversibleAdjoint(),
        )
        return jnp.sum(solution.ys**2)

    y0 = jnp.array([0.2, 0.9])
    assert tree_difference(jax.jit(jax.grad(loss))(y0), 2 * y0) == 0
