import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_reversible import RecordedSteps, ReversibleAdjoint, ReversibleALF4

from ..helpers import (
    clip,
    constant,
    CONTROLLERS,
    jit,
    leaf_differences,
    loss,
    parameters,
    pid,
    quick,
    save_end,
    save_everything,
    save_times,
    solution_loss,
    solve,
    step_to,
    term,
    tree_difference,
    weigh,
)


_ours = ReversibleAdjoint()
_reference = diffrax.RecursiveCheckpointAdjoint()
_solver = ReversibleALF4()
_steppings_and_intervals = (
    pytest.param(step_to, (0.3, 1.9), id="StepTo-forward"),
    pytest.param(clip, (1.4, -0.3), id="Clip-backward"),
    pytest.param(pid, (0.3, 1.9), id="PID-forward"),
)


def _both(f):
    """The gradient of `f(p, adjoint)` with our adjoint and with the reference."""
    return jit(lambda p: (jax.grad(f)(p, _ours), jax.grad(f)(p, _reference)))


@pytest.mark.parametrize(
    "stepping, interval", quick(_steppings_and_intervals[:2], "Clip-backward")
)
def test_times_on_nodes(stepping, interval):
    """Save times at `t0`, at `t1`, on the ends of steps, and repeated."""
    t0, t1 = interval
    controller = stepping(t0, t1).controller
    nodes = controller.ts if stepping is step_to else controller.step_ts
    nodes = jnp.sort(nodes) if t0 < t1 else -jnp.sort(-nodes)
    ts = jnp.array([t0, t0, nodes[1], nodes[1], nodes[1], nodes[2], t1, t1, t1])

    def saves(t0, t1, p):
        del t0, t1
        subs = [
            diffrax.SubSaveAt(t0=True, ts=ts, t1=True, steps=2),
            diffrax.SubSaveAt(ts=ts, fn=lambda t, y, args: jnp.sin(t * y["b"])),
            diffrax.SubSaveAt(ts=ts[:0], t1=True),
        ]
        return diffrax.SaveAt(subs=subs)

    f = lambda p, adjoint: loss(p, _solver, stepping, saves, interval, adjoint)
    assert leaf_differences(*_both(f)(parameters())) < 1e-10


@pytest.mark.parametrize("stepping", (constant, pid))
def test_interval_of_length_zero(stepping):
    def saves(t0, t1, p):
        del t1, p
        subs = [
            diffrax.SubSaveAt(t0=True, ts=jnp.array([t0, t0]), t1=True, steps=True),
            diffrax.SubSaveAt(t1=True, fn=lambda t, y, args: y["a"] * args["rate"]),
        ]
        return diffrax.SaveAt(subs=subs, solver_state=True)

    def steps(t0, t1):
        return eqx.tree_at(lambda s: s.dt0, stepping(t0, t1), 0.1)

    f = lambda p, adjoint: loss(p, _solver, steps, saves, (0.4, 0.4), adjoint)
    found, true = _both(f)(parameters())
    assert leaf_differences(found, true) < 1e-10
    assert jnp.any(true["y0"]["a"] != 0) and jnp.any(true["term"] != 0)


@pytest.mark.parametrize("stepping", (constant, pid))
def test_failed_solve(stepping):
    def f(p, adjoint):
        solution = solve(
            p,
            _solver,
            stepping,
            save_times,
            (0.3, 1.9),
            adjoint,
            max_steps=5,
            throw=False,
        )
        return solution_loss(solution), solution.result

    @jit
    def grads(p):
        ours, result = jax.grad(f, has_aux=True)(p, _ours)
        return ours, jax.grad(f, has_aux=True)(p, _reference)[0], result

    found, true, result = grads(parameters())
    assert result == diffrax.RESULTS.max_steps_reached
    assert leaf_differences(found, true) < 1e-10


def test_failed_solve_in_batch():
    """Some elements of a batch are not finished."""

    def f(p, frequency, adjoint):
        p = p | {"closed_over": frequency}
        options = dict(max_steps=20, throw=False)
        solution = solve(p, _solver, pid, save_times, (0.3, 1.9), adjoint, **options)
        return solution_loss(solution), solution.result

    @jit
    def grads(p, frequencies):
        def batch(p):
            losses, results = jax.vmap(lambda x: f(p, x, _ours))(frequencies)
            return jnp.sum(losses), results

        found, results = jax.grad(batch, has_aux=True)(p)
        each = lambda x: jax.grad(f, has_aux=True)(p, x, _reference)[0]
        true = jtu.tree_map(lambda x: jnp.sum(x, 0), lax.map(each, frequencies))
        return found, true, results

    found, true, results = grads(parameters(), jnp.array([0.3, 5.0, 20.0]))
    failed = results == diffrax.RESULTS.max_steps_reached
    assert jnp.any(failed) and not jnp.all(failed)
    assert leaf_differences(found, true) < 1e-10


def _save_between(t0, t1, p):
    ts = t0 + (t1 - t0) * jnp.array([0.1, 0.5, 0.55])
    fn = lambda t, y, args: y["b"] ** 2 * p["closed_over"]
    states = dict(solver_state=True, controller_state=True)
    return diffrax.SaveAt(t0=True, ts=ts, t1=True, fn=fn, **states)


@pytest.mark.parametrize("stepping", (constant, step_to))
def test_unbounded_number_of_steps(stepping):
    def f(p, adjoint, max_steps):
        options = dict(max_steps=max_steps)
        return loss(
            p, _solver, stepping, _save_between, (1.4, -0.3), adjoint, **options
        )

    @jit
    def grads(p):
        return jax.grad(f)(p, _ours, None), jax.grad(f)(p, _reference, 64)

    assert leaf_differences(*grads(parameters())) < 1e-10


@pytest.mark.parametrize("stepping", CONTROLLERS)
def test_states_are_the_users(stepping):
    """Whatever is recorded on the side does not show in the solution."""

    @jit
    def states(p):
        solutions = [
            solve(p, _solver, stepping, save_everything, (1.4, -0.3), adjoint)
            for adjoint in (_ours, _reference)
        ]
        return [
            (s.ys, s.solver_state, s.controller_state, s.made_jump, s.stats)
            for s in solutions
        ]

    found, true = states(parameters())
    assert leaf_differences(*_as_floats(found, true)) < 1e-14


def _as_floats(*trees):
    # What was not saved is infinite in both.
    convert = lambda x: jnp.where(jnp.isinf(x), 7.0, x).astype(float)
    return [jtu.tree_map(convert, tree) for tree in trees]


def test_users_record_is_left():
    def recorded(t0, t1):
        controller = RecordedSteps(pid(t0, t1).controller, capacity=64)
        return eqx.tree_at(lambda s: s.controller, pid(t0, t1), controller)

    def f(p, adjoint):
        options = dict(max_steps=None if adjoint is _ours else 64)
        interval = (0.3, 1.9)
        solution = solve(
            p, _solver, recorded, _save_between, interval, adjoint, **options
        )
        return solution_loss(solution), solution.controller_state

    @jit
    def grads(p):
        return [jax.grad(f, has_aux=True)(p, a) for a in (_ours, _reference)]

    (found, found_state), (true, true_state) = grads(parameters())
    assert leaf_differences(found, true) < 1e-10
    assert leaf_differences(*_as_floats(found_state, true_state)) < 1e-14


@pytest.mark.parametrize(
    "stepping, interval", quick(_steppings_and_intervals[1:], "PID-forward")
)
def test_continued_solve(stepping, interval):
    """`solver_state` and `controller_state` passed on, differentiated through both."""
    t0, t2 = interval
    t1 = (t0 + t2) / 2

    def f(p, adjoint):
        first = diffrax.diffeqsolve(
            term(p),
            _solver,
            t0,
            t1,
            stepping(t0, t2).dt0,
            p["y0"],
            p["args"],
            saveat=diffrax.SaveAt(
                t1=True, ts=jnp.array([t1]), solver_state=True, controller_state=True
            ),
            stepsize_controller=stepping(t0, t2).controller,
            max_steps=64,
            adjoint=adjoint,
        )
        second = diffrax.diffeqsolve(
            term(p),
            _solver,
            t1,
            t2,
            (t2 - t1) / 4,
            jtu.tree_map(lambda y: y[-1], first.ys),
            p["args"],
            saveat=diffrax.SaveAt(t1=True, steps=2, solver_state=True),
            stepsize_controller=stepping(t0, t2).controller,
            # Off the vector field, as a `solver_state` may be.
            solver_state=jtu.tree_map(lambda v: 1.1 * v, first.solver_state),
            controller_state=first.controller_state,
            max_steps=64,
            adjoint=adjoint,
        )
        return solution_loss(first) + solution_loss(second)

    assert leaf_differences(*_both(f)(parameters())) < 1e-10


def test_loss_on_solver_state_only():
    def f(p, adjoint):
        solution = solve(p, _solver, constant, save_end, (0.3, 1.9), adjoint)
        return weigh(solution.solver_state)

    found, true = _both(f)(parameters())
    assert jnp.any(true["y0"]["a"] != 0)
    assert leaf_differences(found, true) < 1e-10


#
# Effects
#


def test_progress_meter(capfd):
    """Prints what it prints of a solve that is not differentiated."""

    def f(p, adjoint):
        options = dict(progress_meter=diffrax.TextProgressMeter())
        return loss(p, _solver, constant, save_end, (0.3, 1.9), adjoint, **options)

    def printed(f):
        jax.block_until_ready(jit(f)(parameters()))
        jax.effects_barrier()
        return capfd.readouterr().out.splitlines()

    true = printed(lambda p: f(p, diffrax.ForwardMode()))
    assert true[0] == "0.00%" and true[-1] == "100.00%" and len(true) > 10
    assert printed(lambda p: f(p, _ours)) == true
    assert printed(jax.grad(lambda p: f(p, _ours))) == true


@pytest.mark.parametrize("differentiate", (False, True))
def test_error_in_vector_field(differentiate):
    def f(y0):
        def vector_field(t, y, args):
            return eqx.error_if(y, y > 2.0, "The vector field is not defined here.")

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field), _solver, 0, 1, 0.1, y0, adjoint=_ours
        )
        return jnp.sum(solution.ys)

    f = eqx.filter_jit(jax.grad(f) if differentiate else f)
    f(jnp.array(0.5))
    with pytest.raises(RuntimeError, match="is not defined here"):
        jax.block_until_ready(f(jnp.array(1.0)))


def test_callbacks():
    """Callbacks run as often as the vector field and `SaveAt(fn=...)` are called."""
    calls = {"field": [], "fn": []}

    def vector_field(t, y, args):
        jax.debug.callback(lambda t: calls["field"].append(t), t)
        return -y * args

    def fn(t, y, args):
        jax.debug.callback(lambda t: calls["fn"].append(t), t)
        return y**2

    @jax.jit
    def solution(y0, a):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            _solver,
            0.0,
            1.0,
            0.25,
            y0,
            a,
            saveat=diffrax.SaveAt(t0=True, ts=[0.1, 0.2, 0.7], t1=True, fn=fn),
            adjoint=_ours,
        ).ys

    def count(f):
        for values in calls.values():
            values.clear()
        jax.block_until_ready(f(1.0, 2.0))
        jax.effects_barrier()
        return len(calls["field"]), sorted(float(t) for t in calls["fn"])

    stages = 4 * 5
    num_field, ts = count(solution)
    assert num_field == stages + 1
    np.testing.assert_allclose(ts, [0.0, 0.1, 0.2, 0.7, 1.0])
    num_field, ts = count(jax.grad(lambda *args: jnp.sum(solution(*args)), (0, 1)))
    # The values of `fn` that are saved inside of steps are differentiated in the sweep:
    # in two of the steps, each of which must first be undone to know them.
    assert num_field == 2 * stages + 1 + 2 * 5
    np.testing.assert_allclose(ts, [0.0, 0.1, 0.1, 0.2, 0.2, 0.7, 0.7, 1.0])


def test_results_in_order():
    """What diffrax reports of the solve is what it reports without us."""

    @jit
    def reported(p):
        options = dict(max_steps=5, throw=False)
        solutions = [
            solve(p, _solver, pid, save_times, (0.3, 1.9), adjoint, **options)
            for adjoint in (_ours, _reference)
        ]
        return [(s.ys, s.ts, s.stats, s.result) for s in solutions]

    found, true = reported(parameters())
    assert found[-1] == true[-1]
    assert tree_difference(*_as_floats(found[:-1], true[:-1])) < 1e-14
