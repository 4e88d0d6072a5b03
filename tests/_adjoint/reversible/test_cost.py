"""What a gradient costs: evaluations of the vector field, memory, time."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import RecordedSteps, ReversibleAdjoint, ReversibleALF4

from ...helpers import constant, FIXED, jit, PAIRS, SOLVERS, Stepping, without_restarts
from ...measure import Counter, fastest, mlp, temp_memory


_ours = ReversibleAdjoint()
_reference = diffrax.RecursiveCheckpointAdjoint()


#
# Evaluations of the vector field
#


def _loose_pid(t0, t1):
    # Rejects some steps, and makes few with solvers of low order.
    return Stepping(diffrax.PIDController(rtol=1e-2, atol=1e-2), t1 - t0)


_quick = {
    *(("ALF2", "constant"), ("ALF4", "PID"), ("MALI", "constant")),
    *(("Heun coupled", "constant"), ("ReversibleHeun", "constant")),
    *(("LeapfrogMidpoint", "constant"), ("StormerVerlet", "constant")),
}
# Solvers, controllers, and whether for a pair of terms.
_cases = [
    pytest.param(
        *param.values,
        stepping,
        pair,
        id=f"{param.id}-{name}",
        marks=() if (param.id, name) in _quick else pytest.mark.slow,
    )
    for solvers, names, pair in (
        (SOLVERS, ("constant", "PID"), False),
        (FIXED, ("constant",), False),
        (PAIRS, ("constant",), True),
    )
    for param in solvers
    for name, stepping in (("constant", constant), ("PID", _loose_pid))
    if name in names
]


def _evaluations_of_one_step(solver, pair):
    """Those of `step` and of `init`."""
    counter = Counter()
    term = diffrax.ODETerm(counter.field())
    terms = (term, term) if pair else term
    y0, a = jnp.array([0.3, 0.9]), jnp.array(1.3)
    y0 = (y0, y0) if pair else y0

    def count(f):
        before = counter.evaluations
        result = jax.block_until_ready(jit(f)())
        jax.effects_barrier()
        return result, counter.evaluations - before

    state, at_start = count(lambda: solver.init(terms, 0.0, 0.1, y0, a))
    step = lambda: solver.step(terms, 0.0, 0.1, y0, a, state, False)[0]
    return count(step)[1], at_start


@pytest.mark.parametrize("solver, stepping, pair", _cases)
def test_evaluations(solver, stepping, pair):
    """Each update is evaluated once on the way, once on the way back, and pulled back
    once; the initial vector field is evaluated and pulled back once more."""
    counter, solver = Counter(), without_restarts(solver)
    t0, t1 = 0.0, 1.5
    stepping = stepping(t0, t1)
    term = diffrax.ODETerm(counter.field())

    @jit
    @ft.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def grad(y0, a):
        solution = diffrax.diffeqsolve(
            (term, term) if pair else term,
            solver,
            t0,
            t1,
            stepping.dt0,
            (y0, y0) if pair else y0,
            a,
            stepsize_controller=stepping.controller,
            saveat=diffrax.SaveAt(ts=jnp.linspace(t0, t1, 7), dense=True),
            max_steps=stepping.max_steps,
            adjoint=_ours,
        )
        saved = (solution.ys, solution.evaluate(0.77))
        loss = sum(jnp.sum(x) for x in jtu.tree_leaves(saved))
        steps = [solution.stats[f"num_{x}steps"] for x in ("", "accepted_")]
        return loss, steps

    _, steps = jax.block_until_ready(grad(jnp.array([0.3, 0.9]), jnp.array(1.3)))
    jax.effects_barrier()
    stages, at_start = _evaluations_of_one_step(solver, pair)
    steps, accepted = map(int, steps)
    print(
        f"{type(solver).__name__}: {steps} steps, {accepted} accepted; "
        f"{counter.evaluations} evaluations, {counter.vjps} vjps"
    )
    assert counter.vjps == accepted * stages + at_start
    # The check of the reversal starts `ReversibleHeun` once more: at the start of the
    # solve, and at every state that is kept.
    again = 0
    if isinstance(solver, diffrax.ReversibleHeun):
        again = at_start * (1 + min(accepted, 8))
    assert counter.evaluations == (steps + accepted) * stages + at_start + again


#
# Memory
#


def _field(t, y, weights):
    *hidden, last = weights
    for w in hidden:
        y = jnp.tanh(y @ w.T + jnp.sin(t))
    return y @ last.T


def _loss(y0, weights, adjoint, steps, controller=None, saveat=None):
    # Times of a wider dtype would widen the state.
    t0, t1, dt0 = jnp.array(
        [0.0, 1.0, 1 / steps if controller is None else 0.1], y0.dtype
    )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        ReversibleALF4(),
        t0,
        t1,
        dt0,
        y0,
        weights,
        max_steps=steps,
        stepsize_controller=controller or diffrax.ConstantStepSize(),
        saveat=saveat or diffrax.SaveAt(t1=True),
        adjoint=adjoint,
    )
    return jnp.sum(solution.ys**2)


@pytest.mark.parametrize(
    "save_times", (pytest.param(False, marks=pytest.mark.slow), True)
)
def test_memory_of_constant_steps(save_times):
    saveat = diffrax.SaveAt(ts=jnp.linspace(0, 1, 5)) if save_times else None
    memory = [
        temp_memory(
            jax.grad(lambda *x: _loss(*x, _ours, steps, saveat=saveat), (0, 1)),
            jnp.ones(8),
            mlp((8, 32, 8)),
        )
        for steps in (100, 10_000)
    ]
    print(f"Temp memory at 100 and 10,000 constant steps: {memory} bytes")
    assert memory[0] == memory[1]


def test_memory_of_adaptive_steps():
    """Only the record grows: up to one number for each of 512 steps; and what it takes to
    make earlier ones again."""
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    max_steps = (100, 10_000)
    memory = [
        temp_memory(
            jax.grad(lambda *x: _loss(*x, _ours, steps, controller), (0, 1)),
            jnp.ones(8),
            mlp((8, 32, 8)),
        )
        for steps in max_steps
    ]
    print(f"Temp memory at max_steps 100 and 10,000, PID: {memory} bytes")
    record = 8 * (512 - max_steps[0])
    # The solution, its second copy, and about as much for the controller and counters.
    again = 3 * 8 * 8 * (max_steps[1] // 512)
    growth = (memory[1] - memory[0]) / (record + again)
    print(f"Growth over that of one record, and of states: {growth:.3f}")
    assert 0.5 < growth < 1.2


#
# Batches
#


_batch_sizes = (64, 128, 128, 64)


def _batch_gradient(adjoint, vmapped, steps):
    def one(y0, weights):
        return _loss(y0, weights, adjoint, steps)

    def total(y0, weights):
        if vmapped:
            return jnp.sum(jax.vmap(one, in_axes=(0, None))(y0, weights))
        return one(y0, weights)

    return jax.grad(total, (0, 1))


def test_memory_of_vmapped_gradient():
    """Memory does not depend on the number of steps, so a few will do."""
    args = (jr.normal(jr.PRNGKey(1), (256, 64)), mlp(_batch_sizes))
    vmapped = temp_memory(_batch_gradient(_ours, True, 100), *args)
    batched = temp_memory(_batch_gradient(_ours, False, 100), *args)
    reference = temp_memory(_batch_gradient(_reference, True, 100), *args)
    print(
        f"Temp memory, 256 solves: vmapped {vmapped / 1e6:.2f} MB, batched "
        f"{batched / 1e6:.2f} MB, RecursiveCheckpointAdjoint vmapped "
        f"{reference / 1e6:.2f} MB"
    )
    assert vmapped < 1.5 * batched
    assert vmapped < reference / 10


#
# The record
#


def _recorded_solves(adjoint, max_steps, controller):
    y0s = jr.normal(jr.PRNGKey(2), (64, 8))
    weights = mlp((8, 64, 64, 8))

    def one(y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_field),
            ReversibleALF4(),
            0.0,
            8.0,
            0.01,
            y0,
            weights,
            stepsize_controller=controller,
            max_steps=max_steps,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            adjoint=adjoint,
        )
        # With the record, which would otherwise be optimised away.
        return solution.stats["num_accepted_steps"], solution.controller_state

    return ft.partial(jit(jax.vmap(one)), y0s)


@pytest.mark.benchmark
@pytest.mark.parametrize("max_steps, factor", ((4096, 1.5), (16384, 2.0)))
def test_time_of_record(max_steps, factor):
    controller = diffrax.PIDController(rtol=3e-9, atol=3e-9)
    # The same loop, which differs by nothing but the record.
    without = _recorded_solves(diffrax.ForwardMode(), max_steps, controller)
    recorded = RecordedSteps(controller, max_steps)
    with_record = _recorded_solves(_ours, max_steps, recorded)
    num_steps, _ = with_record()
    assert 350 < jnp.max(num_steps) < 500
    time_without, time_with = fastest(without, with_record, repeats=9)
    ratio = time_with / time_without
    print(
        f"Solve at max_steps {max_steps}, {int(jnp.max(num_steps))} steps: "
        f"{time_without * 1e3:.0f} ms without and {time_with * 1e3:.0f} ms with the "
        f"record, {ratio:.2f} times"
    )
    assert ratio < factor


def test_record_grows_no_copies():
    """The time of the record cannot depend on `max_steps` but by filling it once: the
    loop of the solve holds it just once."""
    memory = []
    for max_steps in (128, 16384):
        controller = diffrax.PIDController(rtol=3e-9, atol=3e-9)
        controller = RecordedSteps(controller, max_steps)
        solve = _recorded_solves(_ours, max_steps, controller)
        compiled = solve.func.lower(*solve.args).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    record = 2 * 8 * 64 * (16384 - 128)
    growth = memory[1] - memory[0]
    print(f"Growth of a solve over that of one record: {growth / record:.3f}")
    assert growth < 1.1 * record


def test_what_is_not_differentiated_keeps_nothing():
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    args = (jnp.ones(8), mlp((8, 32, 8)))
    memory = [
        temp_memory(lambda *x: _loss(*x, _ours, steps, controller), *args)
        for steps in (100, 10_000)
    ]
    assert memory[0] == memory[1]


@pytest.mark.slow
def test_users_record_costs_the_same():
    """Wrapping the controller by hand adds no second record."""
    ours = ReversibleAdjoint(capacity=4096)
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    args = (jnp.ones(8), mlp((8, 32, 8)))
    memory = [
        temp_memory(jax.grad(lambda *x: _loss(*x, ours, 4096, c), (0, 1)), *args)
        for c in (controller, RecordedSteps(controller, 4096))
    ]
    assert memory[1] < memory[0] + 1024
