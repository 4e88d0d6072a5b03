"""What is timed, and what is found out about it besides the time."""

import functools as ft
import math
import time
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree

from diffrax_reversible._compare.measure import temp_bytes as temp_bytes

from ..measure import Counter, medians
from .problems import arrays


def _solve(problem, solver, num_steps, y0, params, **kwargs):
    # Times of a wider dtype would widen the state.
    t0, t1, dt0 = jnp.array([0.0, problem.t1, problem.t1 / num_steps], y0.dtype)
    term = diffrax.ODETerm(problem.field)
    return diffrax.diffeqsolve(term, solver, t0, t1, dt0, y0, params, **kwargs)


def solve(problem, solver, adjoint, steps, y0, params):
    """Constant steps; `y0` may hold a batch in one state."""
    # Rounding may leave a last step of next to nothing.
    options = dict(adjoint=adjoint, max_steps=steps + 1)
    return _solve(problem, solver, steps, y0, params, **options)


def solve_adaptively(problem, solver, adjoint, max_steps, y0, params):
    """Under `jax.vmap`, with steps of each element's own."""
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    options = dict(adjoint=adjoint, max_steps=max_steps)
    return _solve(
        problem, solver, 20, y0, params, stepsize_controller=controller, **options
    )


def loss(solve, vmapped=False):
    """The sum of squares at the end, as a function of `y0` and the parameters; `solve`
    is a function of these. Has the statistics as auxiliary output."""

    def one(y0, params):
        solution = solve(y0, params)
        stats = {k: solution.stats[k] for k in ("num_steps", "num_accepted_steps")}
        return jnp.sum(solution.ys**2), stats

    def many(y0, params):
        values, stats = jax.vmap(one, in_axes=(0, None))(y0, params)
        return jnp.sum(values), jtu.tree_map(jnp.max, stats)

    return many if vmapped else one


def gradient(loss):
    return jax.grad(loss, (0, 1), has_aux=True)


def compile_afresh(f, *args):
    """The compiled function and the time of tracing, lowering and compiling it, with
    nothing left over from earlier ones."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    return compiled, time.perf_counter() - start


#
# One evaluation of the vector field
#


def evaluation_loops(problem, repeats):
    """Two functions without arguments: `repeats` evaluations one after the other, and
    as many with their vector-Jacobian products added up."""

    def field(y, params):
        return problem.field(jnp.zeros((), y.dtype), y, params)

    def evaluations(y0, params):
        body = lambda _, y: y + 1e-4 * field(y, params)
        return jax.lax.fori_loop(0, repeats, body, y0)

    def pullbacks(y0, params):
        def body(_, carry):
            y, cotangent, sums = carry
            k, vjp = jax.vjp(field, y, params)
            dy, dparams = vjp(cotangent)
            sums = jtu.tree_map(jnp.add, sums, dparams)
            return y + 1e-4 * k, cotangent + 1e-4 * dy, sums

        zeros = jtu.tree_map(jnp.zeros_like, params)
        return jax.lax.fori_loop(0, repeats, body, (y0, y0, zeros))

    args = arrays(problem)
    compiled = [jax.jit(f).lower(*args).compile() for f in (evaluations, pullbacks)]
    return [ft.partial(f, *args) for f in compiled]


# Kept, since many cases of one problem follow each other.
_loops = ft.lru_cache(maxsize=1)(evaluation_loops)


def evaluation_times(problem):
    """Seconds of one evaluation of the vector field, F, and of one with its
    vector-Jacobian product, F + B."""
    times = medians(*_loops(problem, problem.repeats), repeats=3)
    return [seconds / problem.repeats for seconds in times]


#
# Evaluations of the vector field
#


@ft.cache
def _counted(method, max_steps, differentiated):
    """A solve of one variable, or its gradient, which counts the evaluations of its
    vector field by callbacks. Their number does not depend on the equation."""
    counter = Counter()

    def value(y0, a, t1):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(counter.field()),
            method.solver,
            0.0,
            t1,
            1.0,
            y0,
            a,
            max_steps=max_steps,
            adjoint=method.adjoint(max_steps),
        )
        return jnp.sum(solution.ys)

    f = jax.jit(jax.grad(value, (0, 1)) if differentiated else value)
    args = (jnp.array([0.3]), jnp.array(1.3), jnp.array(1.0))
    # Compiling takes longer than running.
    options = {"xla_backend_optimization_level": 0}
    return counter, f.lower(*args).compile(compiler_options=options)


@ft.cache
def _count(method, steps, max_steps=32, differentiated=True):
    """Evaluations and vector-Jacobian products of constant steps."""
    counter, f = _counted(method, max_steps, differentiated)
    before = np.array([counter.evaluations, counter.vjps])
    jax.block_until_ready(f(jnp.array([0.3]), jnp.array(1.3), jnp.array(float(steps))))
    jax.effects_barrier()
    return np.array([counter.evaluations, counter.vjps]) - before


class Evaluations(NamedTuple):
    """Of the vector field: by a solve, by that part of it that is differentiated, and by
    a gradient as a whole; and the vector-Jacobian products."""

    solve: int
    differentiated: int
    gradient: int
    vjps: int


def count_evaluations(method, steps, accepted, max_steps):
    """What one gradient takes, forward pass and all.

    Counted for 10 and 20 steps, from which the number for `steps` steps follows, since
    each takes as many. How often `RecursiveCheckpointAdjoint` repeats a step, though,
    depends on the number of steps and of checkpoints, whatever the solver: that is
    counted for `steps` steps of Euler's method. `jax.checkpoint`, which `DirectAdjoint`
    uses, does not repeat callbacks, so its repetitions are computed. Our adjoints
    differentiate the accepted steps only, diffrax's all of them.
    """

    def extrapolate(number, method=method, differentiated=True):
        ten, twenty = (
            _count(method, n, differentiated=differentiated) for n in (10, 20)
        )
        return ten + (number - 10) * (twenty - ten) // 10

    # Whatever the adjoint.
    forward = method._replace(adjoint_cls=diffrax.ForwardMode, checkpoints=None)
    evaluations = lambda number: int(extrapolate(number, forward, False)[0])
    number = accepted if method.is_own else steps
    solve, differentiated = evaluations(steps), evaluations(number)
    total, vjps = extrapolate(number)
    if method.adjoint_cls is diffrax.RecursiveCheckpointAdjoint:
        euler = method._replace(solver_name="Euler", solver=diffrax.Euler())
        more = (_count(euler, steps, max_steps) - extrapolate(steps, euler))[0]
        total += more * (evaluations(20) - evaluations(10)) // 10
    elif method.adjoint_cls is diffrax.DirectAdjoint:
        # Loops of 16 steps in loops of 16, all but the innermost ones repeated.
        total = solve * math.ceil(math.log(max_steps, 16))
    gradient = int(total) + solve - differentiated
    return Evaluations(solve, differentiated, gradient, int(vjps))


#
# Errors
#


def _flat(gradient):
    return ravel_pytree(jtu.tree_map(lambda x: x.astype(jnp.float64), gradient))[0]


@ft.cache
def reference_gradient(problem):
    """The gradient of the exact solution, but for errors near rounding.

    That of 100 constant steps of `diffrax.Dopri8`, which is of order 8, in float64, by
    `diffrax.RecursiveCheckpointAdjoint`. Of 25 steps for the batches, which are float32
    where they are timed, and in one state here.
    """
    steps = 25 if problem.batched else 100
    args = jtu.tree_map(lambda x: x.astype(jnp.float64), arrays(problem))
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    value = loss(ft.partial(solve, problem, diffrax.Dopri8(), adjoint, steps))
    grads, _ = jax.jit(gradient(value))(*args)
    return _flat(grads)


def gradient_error(problem, gradient):
    """Relative to the reference, in the Euclidean norm over `y0` and parameters."""
    reference = reference_gradient(problem)
    difference = jnp.linalg.norm(_flat(gradient) - reference)
    return float(difference / jnp.linalg.norm(reference))
