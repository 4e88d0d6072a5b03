"""What this package promises about time and memory, as assertions.

Times are compared as ratios of medians of things that are timed in turn.
"""

import functools as ft
import statistics

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import (
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    SymplecticAdjoint,
)

from ..measure import medians
from .costs import (
    compile_afresh,
    evaluation_loops,
    gradient,
    loss,
    solve,
    solve_adaptively,
    temp_bytes,
)
from .problems import arrays, MLP, mlp_problem, num_bytes, shapes, SMALL, WIDE


pytestmark = pytest.mark.benchmark

_ours = ReversibleAdjoint()
_reference = diffrax.RecursiveCheckpointAdjoint()
# With the evaluations of the vector field that a step takes.
_solvers = (
    pytest.param(ReversibleALF2(), 2, id="ALF2"),
    pytest.param(ReversibleALF4(), 5, id="ALF4"),
)


def _gradient(problem, solver, adjoint, steps, vmapped=False):
    return gradient(loss(ft.partial(solve, problem, solver, adjoint, steps), vmapped))


def _compiled(problem, *options):
    """A gradient without arguments, and its temporary memory."""
    args = arrays(problem)
    compiled = jax.jit(_gradient(problem, *options)).lower(*args).compile()
    return ft.partial(compiled, *args), temp_bytes(compiled)


#
# Batches
#


@pytest.mark.parametrize("solver, evaluations", _solvers)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_vmapped_gradient(solver, evaluations, dtype):
    """256 solves: under `jax.vmap`, in one state, and by `RecursiveCheckpointAdjoint`."""
    problem = mlp_problem(dtype)
    programs, memory = zip(
        _compiled(problem, solver, _ours, 100, True),
        _compiled(problem, solver, _ours, 100, False),
        _compiled(problem, solver, _reference, 100, True),
    )
    times = medians(*programs)
    print(
        f"{type(solver).__name__}, {dtype.__name__}: {times[0]:.3f} s, "
        f"{times[0] / times[1]:.2f} times that of the batch in one state, with "
        f"{memory[0] / memory[1]:.2f} times its memory; RecursiveCheckpointAdjoint takes "
        f"{times[2] / times[0]:.2f} times as long and {memory[2] / memory[0]:.0f} times "
        "the memory"
    )
    assert times[0] < 1.3 * times[1]
    assert memory[0] < 1.3 * memory[1]
    assert memory[0] < memory[2] / 20
    least = 4 if evaluations == 2 and dtype == jnp.float64 else 1
    assert times[0] < times[2] / least


def _with_width(batch, width):
    return mlp_problem(sizes=(64, width, width, 64), batch=batch)


def test_memory_of_vmapped_adaptive_gradient():
    """No sum of cotangents of parameters has a batch axis: of what more a larger batch
    takes, no part grows with the number of parameters."""

    def memory(batch, width):
        problem = _with_width(batch, width)
        solution = ft.partial(solve_adaptively, problem, ReversibleALF4(), _ours, 64)
        f = gradient(loss(solution, vmapped=True))
        return temp_bytes(jax.jit(f).lower(*shapes(problem)).compile())

    # Values of hidden layers have the batch axis and the width, but not squared.
    widths = (128, 256)
    parameters = [num_bytes(shapes(_with_width(256, width))[1]) for width in widths]
    growth = [memory(512, width) - memory(256, width) for width in widths]
    one_axis = 256 * (parameters[1] - parameters[0])
    print(
        f"Temp memory of 256 more solves: {growth} bytes at {parameters} bytes of "
        f"parameters; one sum with a batch axis would differ by {one_axis}"
    )
    assert growth[1] - growth[0] < 0.05 * one_axis


#
# One state
#


@pytest.mark.parametrize("solver, evaluations", _solvers)
@pytest.mark.parametrize("problem", (MLP, WIDE), ids=lambda problem: problem.name)
def test_time_of_batched_gradient(problem, solver, evaluations):
    steps = 100
    run, _ = _compiled(problem, solver, _ours, steps)
    loops = evaluation_loops(problem, steps * evaluations)
    seconds, f, fb = medians(run, *loops)
    ratio = seconds / (f + fb)
    print(f"{problem.name}, {type(solver).__name__}: {ratio:.2f} n s (2F + B)")
    assert ratio < 1.15


@pytest.mark.parametrize("solver, evaluations", _solvers)
@pytest.mark.parametrize("problem", (MLP, WIDE), ids=lambda problem: problem.name)
def test_memory_of_batched_gradient(problem, solver, evaluations):
    del evaluations
    args = shapes(problem)
    memory = [
        temp_bytes(
            jax.jit(_gradient(problem, solver, _ours, steps)).lower(*args).compile()
        )
        for steps in (100, 10_000)
    ]
    print(f"Temp memory at 100 and 10,000 steps: {memory} bytes")
    assert memory[0] == memory[1]


@pytest.mark.parametrize("solver, evaluations", _solvers)
def test_time_of_small_gradient(solver, evaluations):
    """Where a vector field costs next to nothing, what is around it counts."""
    steps = 10_000
    ours, _ = _compiled(SMALL, solver, _ours, steps)
    reference, _ = _compiled(SMALL, solver, _reference, steps)
    loops = evaluation_loops(SMALL, steps * evaluations)
    seconds, theirs, f, fb = medians(ours, reference, *loops, repeats=9)
    ratio, faster = seconds / (f + fb), theirs / seconds
    print(
        f"{type(solver).__name__}: {ratio:.2f} n s (2F + B); RecursiveCheckpointAdjoint "
        f"takes {faster:.1f} times as long"
    )
    assert ratio < 2.5
    assert faster > (5 if evaluations == 2 else 2.5)


def test_time_of_small_gradient_with_residuals():
    """What is kept need not be evaluated again."""
    steps, solver = 10_000, diffrax.Tsit5()
    kept = ("residuals", "stages", "states")
    adjoints = [SymplecticAdjoint(keep=keep, checkpoints=steps + 1) for keep in kept]
    programs = [
        _compiled(SMALL, solver, adjoint, steps)[0]
        for adjoint in (*adjoints, _reference)
    ]
    *ours, theirs = medians(*programs, repeats=9)
    for keep, seconds in zip(kept, ours):
        print(f"keep={keep!r}: {seconds * 1e3:.0f} ms; diffrax {theirs * 1e3:.0f} ms")
    assert ours[0] < min(ours[1:])
    assert max(ours) < theirs / 2


@pytest.mark.parametrize(
    "solver, evaluations",
    (
        pytest.param(diffrax.Tsit5(), 6, id="Tsit5"),
        pytest.param(diffrax.Dopri8(), 13, id="Dopri8"),
    ),
)
def test_time_of_large_gradient_with_residuals(solver, evaluations):
    """What is kept has to be written and read, which is what exceeds n s (F + B); and a
    vmapped solve is as fast as that of a batch."""
    problem, steps = mlp_problem(jnp.float32), 100
    adjoint = SymplecticAdjoint(keep="residuals", checkpoints=steps + 1)
    batched, _ = _compiled(problem, solver, adjoint, steps)
    vmapped, _ = _compiled(problem, solver, adjoint, steps, True)
    loops = evaluation_loops(problem, steps * evaluations)
    one, other, _, fb = medians(batched, vmapped, *loops, repeats=5)
    print(f"batched {one / fb:.2f}, vmapped {other / fb:.2f} n s (F + B)")
    assert one < 1.9 * fb
    assert other < 1.3 * one


#
# Compilation
#


@pytest.mark.parametrize("solver, evaluations", _solvers)
def test_compile_time(solver, evaluations):
    del evaluations
    args = arrays(MLP)

    def seconds(adjoint):
        return compile_afresh(_gradient(MLP, solver, adjoint, 100), *args)[1]

    # In turn, after one of each that is not counted.
    found = [(seconds(_ours), seconds(_reference)) for _ in range(6)][1:]
    ours, theirs = map(statistics.median, zip(*found))
    print(
        f"{type(solver).__name__}: compiled in {ours:.2f} s, with "
        f"RecursiveCheckpointAdjoint in {theirs:.2f} s"
    )
    assert ours < theirs
