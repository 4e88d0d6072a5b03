"""What a gradient with `SymplecticAdjoint` costs."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible import SymplecticAdjoint
from diffrax_reversible._adjoint.symplectic.sweep import largest_stride

from ...helpers import constant, jit, Stepping, tree_difference
from ...measure import Counter, fastest, mlp, temp_memory


_solvers = (
    pytest.param(diffrax.Heun(), 2, False, id="Heun"),
    pytest.param(diffrax.Bosh3(), 3, True, id="Bosh3"),
)


_quick = (
    ("Heun", "states", "constant"),
    ("Heun", "stages", "PID"),
    ("Bosh3", "states", "PID"),
    ("Bosh3", "stages", "constant"),
)


def _accepts_the_first(t0, t1):
    # A first step that is rejected would evaluate its first stage once more.
    return Stepping(diffrax.PIDController(rtol=1e-4, atol=1e-4), (t1 - t0) / 30)


@pytest.mark.parametrize(
    "solver, stages, fsal, keep, stepping",
    [
        pytest.param(
            *solver.values,
            keep,
            stepping,
            id=f"{solver.id}-{keep}-{name}",
            marks=() if (solver.id, keep, name) in _quick else pytest.mark.slow,
        )
        for solver in _solvers
        for keep in ("states", "stages")
        for name, stepping in (("constant", constant), ("PID", _accepts_the_first))
    ],
)
def test_evaluations(solver, stages, fsal, stepping, keep):
    """`stages`: those that a step needs; the last one of a solver that is FSAL is the
    first one of the next step."""
    counter = Counter()
    stepping = stepping(0.0, 1.5)

    @jit
    @ft.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def grad(y0, a):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(counter.field()),
            solver,
            0.0,
            1.5,
            stepping.dt0,
            y0,
            a,
            stepsize_controller=stepping.controller,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1.5, 7), dense=True),
            max_steps=stepping.max_steps,
            adjoint=SymplecticAdjoint(keep=keep, checkpoints=256),
        )
        loss = jnp.sum(solution.ys) + jnp.sum(solution.evaluate(0.77))
        return loss, [solution.stats[f"num_{x}steps"] for x in ("", "accepted_")]

    _, steps = jax.block_until_ready(grad(jnp.array([0.3, 0.9]), jnp.array(1.3)))
    jax.effects_barrier()
    steps, accepted = map(int, steps)
    print(
        f"{type(solver).__name__}: {steps} steps, {accepted} accepted; "
        f"{counter.evaluations} evaluations, {counter.vjps} vjps"
    )
    # The first step evaluates, and pulls back, one stage more.
    at_start = 1 if fsal else 0
    forward = steps * stages + at_start
    # Of a solver that is not FSAL the last stage is not needed to find the others.
    again = accepted * (stages if fsal else stages - 1) if keep == "states" else 0
    assert counter.vjps == accepted * stages + at_start
    assert counter.evaluations == forward + again + counter.vjps


@pytest.mark.parametrize("solver, stages, fsal", _solvers)
def test_residuals_are_kept(solver, stages, fsal):
    """Nothing is evaluated again, and what does not change is kept once."""
    evaluations = []

    def field(t, y, args):
        jax.debug.callback(evaluations.append, t)
        return jnp.tanh(args @ y + t)

    def loss(y0, args, adjoint):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            *(solver, 0.0, 1.0, 0.1, y0, args),
            max_steps=16,
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys**2)

    y0, args = jnp.linspace(0.1, 1.0, 64), jnp.eye(64)
    keep = SymplecticAdjoint(keep="residuals")
    compiled = jit(jax.grad(loss, (0, 1)), static_argnums=2).lower(y0, args, keep)
    compiled = compiled.compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    found = jax.block_until_ready(compiled(y0, args))
    jax.effects_barrier()
    number = len(evaluations)
    print(f"{type(solver).__name__}: {number} evaluations, {memory} bytes")
    # In the solve, with that of its start; for what is safe to pull back, on the way
    # there and back; and the first stage where the solver does not have it from before.
    start = 2 if fsal else 0
    assert number == 10 * stages + 2 + start
    assert memory < 16 * (stages + 2) * 4 * y0.nbytes + 8 * args.nbytes
    true = jax.grad(loss, (0, 1))(y0, args, diffrax.RecursiveCheckpointAdjoint())
    assert tree_difference(found, true) < 1e-13


def test_residuals_of_custom_vjp():
    counter = Counter()
    with pytest.raises(NotImplementedError, match='Use `keep="stages"`'):
        jax.grad(
            lambda y0: diffrax.diffeqsolve(
                diffrax.ODETerm(counter.field()),
                *(diffrax.Heun(), 0.0, 1.0, 0.1, y0, jnp.array(1.0)),
                adjoint=SymplecticAdjoint(keep="residuals"),
            ).ys[0]
        )(jnp.array(0.3))


def test_keeps_only_what_it_knows():
    with pytest.raises(ValueError, match="must be one of"):
        SymplecticAdjoint(keep="everything")


#
# Memory
#

# One evaluation of the vector field is what takes most memory.
_batch, _size, _width = 1024, 8, 256


def _wide():
    y0 = jr.normal(jr.PRNGKey(1), (_batch, _size), jnp.float32)
    weights = mlp((_size, _width, _width, _width, _size), jnp.float32)
    return y0, weights


def _field(t, y, weights):
    del t
    *hidden, last = weights
    for w in hidden:
        y = jnp.tanh(y @ w.T)
    return y @ last.T


def _loss(y0, weights, adjoint, solver, steps):
    t0, t1, dt0 = jnp.array([0.0, 1.0, 1 / steps], y0.dtype)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver,
        t0,
        t1,
        dt0,
        y0,
        weights,
        max_steps=steps,
        adjoint=adjoint,
    )
    return jnp.sum(solution.ys**2)


def _memory(adjoint, solver, steps):
    gradient = jax.grad(lambda *x: _loss(*x, adjoint, solver, steps), (0, 1))
    return temp_memory(gradient, *_wide())


@pytest.mark.parametrize(
    "solver, steps",
    (
        pytest.param(diffrax.Heun(), 100, marks=pytest.mark.slow),
        (diffrax.Tsit5(), 100),
        pytest.param(diffrax.Dopri8(), 50, marks=pytest.mark.slow),
    ),
)
def test_memory(solver, steps):
    def one_evaluation(y0, weights):
        _, vjp = jax.vjp(lambda y, w: _field(0.0, y, w), y0, weights)
        return vjp(y0)

    once = temp_memory(one_evaluation, *_wide())
    state = _batch * _size * 4
    stages = len(solver.tableau.b_sol)
    expected = {
        SymplecticAdjoint(checkpoints=steps): (1 + steps + 2 * stages) * state + once,
        SymplecticAdjoint(checkpoints=steps, keep="stages"): (1 + steps)
        * (1 + stages)
        * state
        + stages * state
        + once,
        SymplecticAdjoint(): (64 + largest_stride(64, steps) + 2 * stages) * state
        + once,
        SymplecticAdjoint(checkpoints=8): (8 + largest_stride(8, steps)) * state
        + 2 * stages * state
        + once,
    }
    for adjoint, memory in expected.items():
        found = _memory(adjoint, solver, steps)
        print(f"{type(solver).__name__}, {adjoint}: {found} bytes, expected {memory}")
        assert abs(found - memory) < 0.15 * memory


def test_max_steps_costs_nothing():
    """Nor does it run out of room: thinned, or with steps made again many times."""
    few, many = (_memory(SymplecticAdjoint(), diffrax.Heun(), n) for n in (4096, 10**6))
    print(f"temp memory: {few} bytes with room for 4096 steps, {many} for a million")
    assert many < 20 * few

    def loss(y0, adjoint, max_steps):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(y + t)),
            *(diffrax.Bosh3(), 0.0, 5.0, 0.01, y0),
            max_steps=max_steps,
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys**2)

    y0 = jnp.array([0.3, 0.9])
    grad = lambda *x: jit(jax.grad(lambda y0: loss(y0, *x)))(y0)
    true = grad(diffrax.RecursiveCheckpointAdjoint(), 512)
    for adjoint in (
        SymplecticAdjoint(),
        SymplecticAdjoint(checkpoints=5),
        SymplecticAdjoint(checkpoints=5, keep="stages"),
    ):
        assert tree_difference(grad(adjoint, None), true) < 1e-13


@pytest.mark.slow
def test_memory_against_diffrax():
    """As the paper has it."""
    solver, steps = diffrax.Dopri8(), 10
    found = _memory(SymplecticAdjoint(), solver, steps)
    direct = _memory(diffrax.DirectAdjoint(), solver, steps)
    every_step = diffrax.RecursiveCheckpointAdjoint(checkpoints=steps)
    checkpointed = _memory(every_step, solver, steps)
    print(
        f"Temp memory: {found / 1e6:.1f} MB; DirectAdjoint {direct / 1e6:.1f} MB; "
        f"RecursiveCheckpointAdjoint, every step {checkpointed / 1e6:.1f} MB"
    )
    assert found < direct / 4
    assert found < checkpointed


#
# Batches
#


def _batch_gradient(adjoint, vmapped):
    one = lambda y0, w: _loss(y0, w, adjoint, diffrax.Bosh3(), 100)

    def total(y0, weights):
        if vmapped:
            return jnp.sum(jax.vmap(one, in_axes=(0, None))(y0, weights))
        return one(y0, weights)

    return jax.grad(total, (0, 1))


def _many(dtype=jnp.float32):
    y0 = jr.normal(jr.PRNGKey(1), (256, 64), dtype)
    return y0, mlp((64, 128, 128, 64), dtype)


def test_memory_of_vmapped_gradient():
    args = _many()
    adjoint = SymplecticAdjoint(checkpoints=100)
    vmapped = temp_memory(_batch_gradient(adjoint, True), *args)
    batched = temp_memory(_batch_gradient(adjoint, False), *args)
    states = 100 * args[0].nbytes
    print(
        f"Temp memory apart from the states: vmapped {(vmapped - states) / 1e6:.2f} MB, "
        f"batched {(batched - states) / 1e6:.2f} MB"
    )
    assert vmapped - states < 1.4 * (batched - states)


@pytest.mark.benchmark
def test_time_of_vmapped_gradient():
    args = _many()
    ours, reference = SymplecticAdjoint(), diffrax.RecursiveCheckpointAdjoint()
    vmapped, batched, theirs = fastest(
        *[
            ft.partial(jax.jit(_batch_gradient(adjoint, vmapped)), *args)
            for adjoint, vmapped in ((ours, True), (ours, False), (reference, True))
        ]
    )
    print(
        f"Time, 256 solves: vmapped {vmapped:.2f} s, batched {batched:.2f} s, "
        f"RecursiveCheckpointAdjoint vmapped {theirs:.2f} s"
    )
    assert vmapped < 1.4 * batched
    assert vmapped < theirs / 1.5
