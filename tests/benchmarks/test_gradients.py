"""Time, memory and error of gradients, with our adjoints and with diffrax's.

Nothing is asserted about the figures: they are what these tests are for. They end up in
`benchmark.extra_info`, so in the file of `--benchmark-json`, from which `draw.py` makes
tables and pictures. The times in the statistics of pytest-benchmark are those of one
gradient with respect to `y0` and all parameters, compiled.
"""

import functools as ft
import math
import time

import diffrax
import jax
import pytest

from ..measure import medians
from .costs import (
    compile_afresh,
    count_evaluations,
    evaluation_times,
    gradient,
    gradient_error,
    loss,
    solve,
    solve_adaptively,
    temp_bytes,
)
from .methods import adaptive_cases, constant_step_cases
from .problems import arrays


pytestmark = pytest.mark.benchmark


def _rounds(run):
    """Rounds for about a second, after a call that is not counted."""
    start = time.perf_counter()
    run()
    return min(max(5, math.ceil(1 / (time.perf_counter() - start))), 100)


def _measure(benchmark, problem, method, solve, *, vmapped, max_steps):
    """Time a gradient, and put what else is known about it into `extra_info`.

    - `gradient_seconds`, `forward_seconds`: medians.
    - `compile_seconds`: tracing, lowering and compiling the gradient, once.
    - `temp_bytes`: temporary memory of the compiled gradient.
    - `gradient_error`: see `reference_gradient`.
    - `num_steps`, `num_accepted_steps`: the most of any element where vmapped.
    - `evaluations`, `vjps`: of the vector field in one gradient; see
        `count_evaluations`. Not known of a backward solve with steps of its own.
    - `evaluation_seconds`, `evaluation_and_vjp_seconds`: F and F + B, of the whole batch
        in one state; the mean of medians just before and just after.
    - `ratio`: `gradient_seconds` over the time of the least that a reversible method can
        do: each evaluation of the solve once and, where it is differentiated, once more
        with its vector-Jacobian product. That is `n s (2F + B)` for `n` constant steps of
        `s` evaluations.
    """
    assert benchmark.enabled, "Nothing is timed: pytest-benchmark is off, as with `-n`."
    args = arrays(problem)
    value = loss(solve, vmapped)
    compiled, compile_seconds = compile_afresh(gradient(value), *args)
    grads, stats = compiled(*args)
    steps, accepted = (int(stats[k]) for k in ("num_steps", "num_accepted_steps"))
    error = gradient_error(problem, grads)
    assert math.isfinite(error)

    before = evaluation_times(problem)
    run = lambda: jax.block_until_ready(compiled(*args))
    benchmark.pedantic(run, rounds=_rounds(run))
    after = evaluation_times(problem)
    seconds = benchmark.stats.stats.median
    f, fb = ((x + y) / 2 for x, y in zip(before, after))

    forward = ft.partial(jax.jit(value).lower(*args).compile(), *args)
    (forward_seconds,) = medians(forward)

    info = benchmark.extra_info
    info |= {
        "problem": problem.name,
        "dtype": str(args[0].dtype),
        "shape": list(args[0].shape),
        "solver": method.solver_name,
        "adjoint": method.adjoint_name,
        "vmapped": vmapped,
        "num_steps": steps,
        "num_accepted_steps": accepted,
        "gradient_seconds": seconds,
        "forward_seconds": forward_seconds,
        "compile_seconds": compile_seconds,
        "temp_bytes": temp_bytes(compiled),
        "gradient_error": error,
        "evaluation_seconds": f,
        "evaluation_and_vjp_seconds": fb,
    }
    if vmapped and method.adjoint_cls is diffrax.BacksolveAdjoint:
        info |= {"evaluations": None, "vjps": None, "ratio": None}
    else:
        count = count_evaluations(method, steps, accepted, max_steps)
        least = count.solve * f + count.differentiated * fb
        info |= {
            "evaluations": count.gradient,
            "vjps": count.vjps,
            "ratio": seconds / least,
        }
    print(
        f"{seconds * 1e3:.3g} ms, {info['temp_bytes']} bytes, error {error:.1e}, "
        f"{info['evaluations']} evaluations, compiled in {compile_seconds:.2f} s"
    )


@pytest.mark.parametrize("problem, steps, method", list(constant_step_cases()))
def test_constant_steps(benchmark, problem, steps, method):
    """The batch in one state."""
    benchmark.group = f"{problem.name}, {steps} steps"
    # Rounding may leave a last step of next to nothing.
    max_steps = steps + 1
    adjoint = method.adjoint(max_steps)
    solution = ft.partial(solve, problem, method.solver, adjoint, steps)
    _measure(benchmark, problem, method, solution, vmapped=False, max_steps=max_steps)


@pytest.mark.parametrize("problem, method", list(adaptive_cases()))
def test_adaptive_steps(benchmark, problem, method):
    """Under `jax.vmap` over the batch, with a `PIDController` of each element's own and
    parameters that all share."""
    benchmark.group = f"{problem.name}, adaptive steps, vmapped"
    max_steps = 512
    adjoint = method.adjoint(max_steps)
    solution = ft.partial(solve_adaptively, problem, method.solver, adjoint, max_steps)
    _measure(benchmark, problem, method, solution, vmapped=True, max_steps=max_steps)
