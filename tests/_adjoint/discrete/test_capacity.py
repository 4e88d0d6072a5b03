"""Solves without `max_steps`, and room for the record of their steps."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    RecordedSteps,
    ReversibleAdjoint,
    ReversibleALF2,
    SymplecticAdjoint,
)

from ...helpers import (
    check,
    jit,
    parameters,
    pid,
    quick,
    solution_loss,
    solve,
    step_to,
    tree_difference,
    UNROLLED,
)


_METHODS = (
    pytest.param(ReversibleALF2(), ReversibleAdjoint, id="reversible"),
    pytest.param(diffrax.Bosh3(), SymplecticAdjoint, id="symplectic"),
)


def _save_between(t0, t1, p):
    ts = t0 + (t1 - t0) * jnp.array([0.1, 0.5, 0.55])
    fn = lambda t, y, args: y["b"] ** 2 * p["closed_over"]
    return diffrax.SaveAt(t0=True, ts=ts, t1=True, fn=fn, solver_state=True)


def _loss(p, solver, stepping, adjoint, **options):
    interval = (1.4, -0.3)
    solution = solve(p, solver, stepping, _save_between, interval, adjoint, **options)
    return solution_loss(solution)


@pytest.mark.parametrize("solver, kind", quick(_METHODS, "symplectic"))
def test_adaptive_steps_without_a_bound(solver, kind):
    """A solve that nobody differentiates keeps nothing, and so needs no bound; forward
    mode neither. Reverse mode says what it needs, and then is right."""
    p = parameters()
    f = lambda p, adjoint: _loss(p, solver, pid, adjoint, max_steps=None)
    true = jax.value_and_grad(lambda p: _loss(p, solver, pid, UNROLLED))(p)
    value, tangent = jit(lambda p: jax.jvp(lambda p: f(p, kind()), (p,), (p,)))(p)
    assert abs(value - true[0]) < 1e-9 * abs(true[0])
    dots = jax.tree.map(jnp.vdot, true[1], p)
    assert abs(tangent - sum(jax.tree.leaves(dots))) < 1e-9 * abs(tangent)
    with pytest.raises(
        ValueError, match="(?s)(capacity=.*max_steps=|max_steps=.*capa)"
    ):
        jax.eval_shape(jax.grad(lambda p: f(p, kind())), p)
    check(jit(jax.value_and_grad(lambda p: f(p, kind(capacity=256))))(p), true)


@pytest.mark.parametrize("solver, kind", _METHODS)
def test_value_without_a_bound(solver, kind):
    """Also where it is compiled by itself, and under `jax.vmap`."""
    p = parameters()
    f = lambda scale: _loss(
        p | {"closed_over": scale * p["closed_over"]},
        solver,
        pid,
        kind(),
        max_steps=None,
    )
    found = jit(jax.vmap(f))(jnp.array([0.7, 1.0]))
    true = _loss(p, solver, pid, UNROLLED)
    assert abs(found[1] - true) < 1e-9 * abs(true)


def test_given_steps_without_a_bound():
    """`ReversibleAdjoint` keeps nothing of them."""
    p, solver, ours = parameters(), ReversibleALF2(), ReversibleAdjoint()
    f = lambda p: _loss(p, solver, step_to, ours, max_steps=None)
    true = jax.value_and_grad(lambda p: _loss(p, solver, step_to, UNROLLED))(p)
    check(jit(jax.value_and_grad(f))(p), true)


def _few(y0, solver, adjoint, throw=True, **options):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.sin(5 * t) - y),
        solver,
        0.0,
        2.0,
        0.1,
        y0,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        adjoint=adjoint,
        throw=throw,
        **options,
    )


@pytest.mark.parametrize("solver, kind", _METHODS)
def test_too_small(solver, kind):
    """Raises; with enough room, the bound of the solve does not matter."""
    y0 = jnp.ones(1)
    number = int(_few(y0, solver, diffrax.ForwardMode()).stats["num_accepted_steps"])

    def grad(capacity, **options):
        adjoint = kind(capacity=capacity)
        f = lambda y0: jnp.sum(_few(y0, solver, adjoint, **options).ys)
        return jax.block_until_ready(jit(jax.grad(f))(y0))

    enough = grad(number, max_steps=None)
    assert tree_difference(grad(number), enough) < 1e-14
    with pytest.raises(Exception, match="capacity"):
        grad(number - 1, max_steps=None)


@pytest.mark.parametrize("jumps", (False, True))
@pytest.mark.parametrize("solver, kind", quick(_METHODS, "symplectic"))
def test_more_steps_than_room(solver, kind, jumps):
    """By default there is room for 512 times, and steps before those are made again: by
    elements of a batch with fewer steps than that, too, and with twice and three times as
    many."""
    t1s, a = jnp.array([4.0, 8.0, 13.0]), jnp.array(1.3)

    def loss(y0, a, adjoint):
        def one(y0, t1):
            controller = diffrax.PIDController(rtol=1e-3, atol=1e-3, dtmax=0.01)
            if jumps:
                ts = jnp.array([0.501, 5.003, 9.007])
                controller = diffrax.ClipStepSizeController(controller, jump_ts=ts)
            field = lambda t, y, a: jnp.cos(a * y + t) + jnp.where(t > 5.003, 0.2, 0)
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                *(solver, 0.0, t1, 0.01, y0, a),
                stepsize_controller=controller,
                saveat=diffrax.SaveAt(ts=jnp.linspace(0, t1, 5)),
                max_steps=4096,
                adjoint=adjoint,
            )
            steps = solution.stats["num_accepted_steps"]
            return jnp.sum(solution.ys**2), steps

        losses, steps = jax.vmap(one, in_axes=(None, 0))(y0, t1s)
        return jnp.sum(losses), steps

    def grad(adjoint):
        fn = lambda *x: jax.grad(loss, (0, 1), has_aux=True)(*x, adjoint)
        return jit(fn)(jnp.array(0.3), a)

    true, steps = grad(diffrax.RecursiveCheckpointAdjoint())
    found, _ = grad(kind())
    assert steps[0] < 512 < steps[1] < 1024 < steps[2]
    assert tree_difference(found, true) < 1e-9
    kept, _ = grad(kind(capacity=4096))
    assert tree_difference(found, kept) < 1e-13


def test_steps_that_come_out_otherwise():
    """The vector field is another one by the time that steps are made again."""
    rate = [1.0]

    @jax.custom_jvp
    def field(y):
        struct = jax.ShapeDtypeStruct((), y.dtype)
        return jax.pure_callback(lambda y: np.asarray(-rate[0] * y), struct, y)

    field.defjvp(lambda primals, tangents: (field(*primals), -tangents[0]))

    def solve(y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: field(y)),
            *(diffrax.Bosh3(), 0.0, 4.0, 0.1, y0),
            stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
            adjoint=SymplecticAdjoint(),
        )
        return solution.ys[0]

    y1, pull_back = jax.vjp(solve, jnp.array(1.0))
    jax.block_until_ready(y1)
    rate[0] = 1.3
    with pytest.raises(Exception, match="more than 512, and came out otherwise"):
        jax.block_until_ready(pull_back(jnp.array(1.0)))


@pytest.mark.parametrize("solver, kind", _METHODS)
@pytest.mark.parametrize("name", ("capacity", "checkpoints"))
def test_arguments(solver, kind, name):
    del solver
    with pytest.raises(ValueError, match=rf"{name}="):
        kind(**{name: 0})
    with pytest.raises(TypeError):
        kind(3)


def test_users_record():
    """Is not touched, and is as good as the adjoint's own."""
    y0, controller = jnp.ones(1), diffrax.PIDController(rtol=1e-3, atol=1e-3)
    ours = ReversibleAdjoint(capacity=256)

    def f(y0, controller):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(5 * t) - y),
            ReversibleALF2(),
            0.0,
            2.0,
            0.1,
            y0,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            adjoint=ours,
            max_steps=None,
        )
        return jnp.sum(solution.ys), solution.controller_state

    grad = lambda y0: jax.grad(f, has_aux=True)(y0, RecordedSteps(controller, 256))
    found, state = jit(grad)(y0)
    true = _few(y0, ReversibleALF2(), diffrax.ForwardMode())
    assert state.record.count == true.stats["num_accepted_steps"]
    other, _ = jit(lambda y0: jax.grad(f, has_aux=True)(y0, controller))(y0)
    assert tree_difference(found, other) < 1e-14
