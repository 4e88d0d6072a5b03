"""What is saved and handed on: what diffrax saves, and differentiated wherever it is."""

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF2, SymplecticAdjoint

from ...helpers import (
    check,
    check_both_directions,
    clip,
    CONTROLLERS,
    jit,
    leaf_differences,
    parameters,
    pid,
    quick,
    save_everything,
    solution_loss,
    solve,
    step_to,
    term,
    tree_difference,
    UNROLLED,
    weigh,
)
from ...reference import Problem, unrolled


_slow = pytest.mark.slow
_METHODS = (
    pytest.param(ReversibleALF2(), ReversibleAdjoint(), id="reversible"),
    pytest.param(diffrax.Bosh3(), SymplecticAdjoint(), id="symplectic"),
)


@pytest.mark.parametrize("solver, ours", quick(_METHODS, "reversible"))
@pytest.mark.parametrize("stepping", (step_to, pytest.param(clip, marks=_slow)))
@_slow
def test_times_on_nodes(solver, ours, stepping):
    """Save times at `t0`, at `t1`, on the ends of steps, and repeated."""

    def saves(t0, t1, p):
        del p
        controller = stepping(t0, t1).controller
        nodes = controller.ts if stepping is step_to else controller.step_ts
        inner = nodes[jnp.array([1, 1, 1, 2])]
        ts = jnp.concatenate([jnp.stack([t0, t0]), inner, jnp.stack([t1, t1, t1])])
        subs = [
            diffrax.SubSaveAt(t0=True, ts=ts, t1=True, steps=2),
            diffrax.SubSaveAt(ts=ts, fn=lambda t, y, args: jnp.sin(t * y["b"])),
            diffrax.SubSaveAt(ts=ts[:0], t1=True),
        ]
        return diffrax.SaveAt(subs=subs)

    check_both_directions(solver, stepping, saves, ours)


@pytest.mark.slow
@pytest.mark.parametrize("stepping", CONTROLLERS)
@pytest.mark.parametrize("solver, ours", (*_METHODS[:1],))
def test_states_are_the_users(solver, ours, stepping):
    """Whatever is recorded on the side does not show in the solution."""

    def saved(adjoint):
        interval, p = (1.4, -0.3), parameters()
        f = lambda p: solve(p, solver, stepping, save_everything, interval, adjoint)
        s = jit(lambda p: jtu.tree_leaves(f(p)))(p)
        # What was not saved is infinite in both.
        s = [x.astype(float) for x in s]
        return [jnp.where(jnp.isinf(x), 7.0, x) for x in s]

    found, true = saved(ours), saved(diffrax.ForwardMode())
    assert len(found) == len(true) > 20
    assert max(map(tree_difference, found, true)) < 1e-12


@pytest.mark.parametrize("solver, ours", quick(_METHODS, "symplectic"))
@pytest.mark.parametrize("stepping", (pid, pytest.param(clip, marks=_slow)))
def test_continued_solve(solver, ours, stepping):
    """`solver_state` and `controller_state` passed on, differentiated through both."""
    t0, t1, t2 = 0.3, 1.1, 1.9

    def f(p):
        controller = stepping(t0, t2).controller
        first = diffrax.diffeqsolve(
            term(p),
            solver,
            t0,
            t1,
            stepping(t0, t2).dt0,
            p["y0"],
            p["args"],
            saveat=diffrax.SaveAt(t1=True, solver_state=True, controller_state=True),
            stepsize_controller=controller,
            max_steps=64,
            adjoint=ours,
        )
        second = diffrax.diffeqsolve(
            term(p),
            solver,
            t1,
            t2,
            (t2 - t1) / 4,
            jtu.tree_map(lambda y: y[-1], first.ys),
            p["args"],
            saveat=diffrax.SaveAt(t1=True, steps=2, solver_state=True),
            stepsize_controller=controller,
            solver_state=jtu.tree_map(_off, first.solver_state),
            controller_state=first.controller_state,
            max_steps=64,
            adjoint=ours,
        )
        return solution_loss(first) + solution_loss(second)

    p = parameters()
    direction = jtu.tree_map(jnp.cos, p)

    @jit
    def both(p):
        # Forward mode is what diffrax's own loop gives.
        return jax.grad(f)(p), jax.jvp(f, (p,), (direction,))[1]

    grad, true = both(p)
    dots = jtu.tree_map(jnp.vdot, grad, direction)
    found = sum(jtu.tree_leaves(dots))
    assert abs(found - true) < 1e-10 * abs(true)


def _off(x):
    """Off the vector field, as a `solver_state` may be."""
    return 1.1 * x if jnp.issubdtype(x.dtype, jnp.inexact) else x


@pytest.mark.parametrize(
    "solver, ours",
    (
        *_METHODS[:1],
        *(
            pytest.param(diffrax.Bosh3(), SymplecticAdjoint(**options), id=f"{options}")
            for options in (dict(keep="stages"), dict(checkpoints=3))
        ),
    ),
)
def test_given_solver_state(solver, ours):
    """What an earlier solve has left is differentiated, also where it is the first stage
    of a step; and so is what this one leaves."""
    p = dict(y0=jnp.array([0.2, -0.4]), args=jnp.array(1.3), v0=jnp.array([0.5, 1.0]))
    saveat = diffrax.SaveAt(t1=True, solver_state=True)

    def terms(p):
        del p
        return diffrax.ODETerm(lambda t, y, a: jnp.sin(a * y + t))

    def f(p, adjoint):
        state = (
            p["v0"] if ours is _METHODS[0].values[1] else (jnp.array(False), p["v0"])
        )
        rest = (0.0, 1.0, 0.13, p["y0"], p["args"])
        options = dict(solver_state=state, saveat=saveat, max_steps=16)
        if adjoint is UNROLLED:
            solution = unrolled(Problem(terms, solver), p, *rest, **options)
        else:
            options |= dict(adjoint=adjoint)
            solution = diffrax.diffeqsolve(terms(p), solver, *rest, **options)
        return weigh((solution.ys, solution.solver_state))

    found = jit(jax.value_and_grad(lambda p: f(p, ours)))(p)
    check(found, jax.value_and_grad(f)(p, UNROLLED), matters="all")


def test_loss_on_solver_state_only():
    """Nothing of `ys` has a cotangent."""
    p = dict(y0=jnp.array([0.2, -0.4]), args=jnp.array(1.3))

    def f(p):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, a: jnp.sin(a * y + t)),
            ReversibleALF2(),
            0.0,
            1.0,
            0.13,
            p["y0"],
            p["args"],
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            adjoint=ReversibleAdjoint(),
            max_steps=16,
        )
        return weigh(solution.solver_state)

    grad, tangents = jit(lambda p: (jax.grad(f)(p), jax.jacfwd(f)(p)))(p)
    assert jnp.all(grad["y0"] != 0)
    assert leaf_differences(grad, tangents) < 1e-10
