"""What the tests vary. A new solver is tested by adding it to `SOLVERS`, `FIXED`, `PAIRS`
or `RUNGE_KUTTA`."""

import copy
import functools as ft
import itertools as it
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_reversible import (
    ALF,
    ALFComposition,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    StormerVerlet,
    SymplecticAdjoint,
    SymplecticComposition4,
)
from diffrax_reversible._solver.updates.restart import RestartState

from .reference import jit as jit, Problem, Unrolled, unrolled


def _as_a_user(composition):
    """A list with an error estimate, as a user might pass it."""
    return ALFComposition(
        composition.fractions,
        4,
        error_weights=composition.error_weights,
        error_order=composition.error_order,
    )


# What differs from another solver by coefficients alone is for the slow tests.
_slow = pytest.mark.slow

SOLVERS = (
    pytest.param(ReversibleALF2(), id="ALF2"),
    pytest.param(ReversibleALF4(), id="ALF4"),
    pytest.param(ReversibleALF6(), id="ALF6", marks=_slow),
    pytest.param(ALF(), id="MALI"),
    pytest.param(ReversibleALF4(restart=1e-6), id="ALF4 restarting"),
    pytest.param(Reversible(diffrax.Tsit5()), id="Tsit5 coupled", marks=_slow),
    pytest.param(ReversibleYoshida4(), id="Yoshida4", marks=_slow),
    pytest.param(ReversibleYoshida6(), id="Yoshida6", marks=_slow),
    pytest.param(ReversibleALF8(), id="ALF8", marks=_slow),
    pytest.param(ALF(eta=0.98), id="MALI damped", marks=_slow),
    pytest.param(ReversibleALF4(grid=2.0**-44), id="ALF4 grid", marks=_slow),
    pytest.param(Reversible(diffrax.Heun()), id="Heun coupled"),
    pytest.param(Reversible(diffrax.Dopri8()), id="Dopri8 coupled", marks=_slow),
    pytest.param(_as_a_user(ReversibleALF4().composition), id="list", marks=_slow),
    pytest.param(diffrax.ReversibleHeun(), id="ReversibleHeun"),
)
# Without an error estimate.
FIXED = (
    pytest.param(Reversible(diffrax.Euler(), 1.0), id="Euler coupled"),
    pytest.param(diffrax.LeapfrogMidpoint(), id="LeapfrogMidpoint"),
)
# For pairs of terms, without an error estimate.
PAIRS = (
    pytest.param(diffrax.SemiImplicitEuler(), id="SemiImplicitEuler", marks=_slow),
    pytest.param(StormerVerlet(), id="StormerVerlet"),
    pytest.param(SymplecticComposition4(), id="SymplecticComposition4", marks=_slow),
)
# For `SymplecticAdjoint`.
RUNGE_KUTTA = (
    pytest.param(diffrax.Heun(), id="Heun", marks=_slow),
    pytest.param(diffrax.Tsit5(), id="Tsit5"),
    pytest.param(diffrax.Bosh3(), id="Bosh3", marks=_slow),
    pytest.param(diffrax.Dopri8(), id="Dopri8", marks=_slow),
    pytest.param(diffrax.Dopri5(), id="Dopri5", marks=_slow),
    pytest.param(diffrax.Ralston(), id="Ralston", marks=_slow),
)


def adjoint_of(solver):
    """The adjoint method that a solver is tested with."""
    is_runge_kutta = isinstance(solver, diffrax.AbstractERK | diffrax.Euler)
    return SymplecticAdjoint() if is_runge_kutta else ReversibleAdjoint()


class Stepping(eqx.Module):
    controller: diffrax.AbstractStepSizeController
    dt0: float | None
    max_steps: int = 256
    # Whether rounding decides how long the steps are.
    adaptive: bool = False


def constant(t0, t1):
    return Stepping(diffrax.ConstantStepSize(), (t1 - t0) / 9.7)


def step_to(t0, t1):
    nodes = jnp.array([0.0, 0.07, 0.22, 0.28, 0.41, 0.6, 0.65, 0.83, 0.9, 1.0])
    # Not by a formula at the ends, which must be met exactly.
    nodes = (t0 + (t1 - t0) * nodes).at[0].set(t0).at[-1].set(t1)
    return Stepping(diffrax.StepTo(nodes), None)


def pid(t0, t1):
    # The first steps are too large and are rejected.
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-4)
    return Stepping(controller, t1 - t0, adaptive=True)


def clip(t0, t1):
    step_ts = t0 + (t1 - t0) * jnp.array([0.21, 0.5, 0.77])
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-3, atol=1e-4),
        step_ts=step_ts,
        store_rejected_steps=8,
    )
    return Stepping(controller, t1 - t0, adaptive=True)


CONTROLLERS = (
    pytest.param(constant, id="constant"),
    pytest.param(step_to, id="StepTo"),
    pytest.param(pid, id="PID"),
    pytest.param(clip, id="Clip"),
)


INTERVALS = (
    pytest.param((0.3, 1.9), id="forward"),
    pytest.param((1.4, -0.3), id="backward"),
)


class Field(eqx.Module):
    """A small nonlinear vector field with parameters of its own, in `args`, and in
    whatever `drive` closes over."""

    matrix: Any
    drive: Callable

    def __call__(self, t, y, args):
        y, unravel = jfu.ravel_pytree(y)
        hidden = jnp.tanh(self.matrix @ y + args["shift"])
        rest = args["rate"] * self.drive(t) * jnp.sin(3 * y[::-1])
        return unravel(hidden * (1 + 0.3 * jnp.sin(2 * t)) - 0.2 * y + rest)


def parameters(seed=0, dtype=jnp.float64):
    """Parameters in every place where they may be."""
    keys = iter(jr.split(jr.PRNGKey(seed), 7))
    normal = lambda *shape: jr.normal(next(keys), shape, dtype)
    return {
        "y0": {"a": normal(2), "b": normal(3)},
        "args": {"shift": normal(5), "rate": 0.3 + 0.3 * normal()},
        "term": normal(5, 5),
        "closed_over": normal(),
        "fn": normal(3),
    }


def term(p):
    closed_over = p["closed_over"]
    return diffrax.ODETerm(Field(p["term"], lambda t: jnp.cos(closed_over * t)))


def times(t0, t1, *fractions):
    # Exact at both ends.
    fractions = jnp.array(fractions)
    return (1 - fractions) * t0 + fractions * t1


def save_end(t0, t1, p):
    del t0, t1, p
    return diffrax.SaveAt(t1=True, solver_state=True)


def save_times(t0, t1, p):
    del p
    subs = [
        diffrax.SubSaveAt(t0=True, ts=times(t0, t1, 0.0, 0.1, 0.13, 0.6, 1), t1=True),
        diffrax.SubSaveAt(steps=3),
    ]
    return diffrax.SaveAt(subs=subs)


def save_dense(t0, t1, p):
    del t0, t1, p
    return diffrax.SaveAt(dense=True, steps=True, t1=True)


def save_everything(t0, t1, p):
    weights = p["fn"]

    def with_args(t, y, args):
        return t * args["rate"], y["a"] ** 2

    def with_closure(t, y, args):
        del args
        return {"b": jnp.cos(weights * y["b"] + t), "positive": y["a"] > 0}

    subs = {
        "ends": diffrax.SubSaveAt(t0=True, t1=True, fn=with_args),
        "inside": (
            diffrax.SubSaveAt(ts=times(t0, t1, 0.05, 0.4, 0.45, 1), fn=with_closure),
            {"steps": diffrax.SubSaveAt(t0=True, steps=True, fn=with_args)},
        ),
        "both": diffrax.SubSaveAt(ts=times(t0, t1, 0.2, 0.9), steps=3, t1=True),
    }
    return diffrax.SaveAt(
        subs=subs, dense=True, solver_state=True, controller_state=True, made_jump=True
    )


SAVES = (
    pytest.param(save_end, id="end"),
    pytest.param(save_times, id="times"),
    pytest.param(save_dense, id="dense"),
    pytest.param(save_everything, id="everything"),
)


def copies(tree):
    """Solver states without what their solvers need to restart, which has no
    derivative."""
    is_leaf = lambda x: isinstance(x, RestartState)
    one = lambda x: x.copy if is_leaf(x) else x
    return jtu.tree_map(one, tree, is_leaf=is_leaf)


def without_restarts(solver):
    """The solver with `restart=None`, if it has that."""
    if not hasattr(solver, "restart"):
        return solver
    solver = copy.copy(solver)
    object.__setattr__(solver, "restart", None)
    return solver


def weigh(tree, seed=1):
    """A nonlinear number made of everything in `tree` that was saved."""
    total, tree = 0.0, eqx.filter(copies(tree), eqx.is_inexact_array)
    for i, x in enumerate(jtu.tree_leaves(tree)):
        weight = np.cos(np.arange(x.size) + 10 * i + 7.3 * seed).reshape(x.shape)
        x = jnp.sin(jnp.where(jnp.isfinite(x), x, 0))
        total = total + jnp.sum(weight.astype(x.dtype) * x)
    return total


def evaluate(solution, ts):
    """Dense output at several times."""
    if isinstance(solution, Unrolled):
        ys = [solution.evaluate(t) for t in ts]
        return jtu.tree_map(lambda *x: jnp.stack(x), *ys)
    return jax.vmap(solution.evaluate)(ts)


def solution_loss(solution):
    """A loss on everything that was saved."""
    total = weigh(solution.ys) + weigh(solution.solver_state, 2)
    if solution.interpolation is not None:
        ts = times(solution.t0, solution.t1, 0.0, 0.03, 0.37, 0.4, 0.91, 1.0)
        total = total + weigh(evaluate(solution, ts), 3)
        total = total + weigh(solution.derivative(ts[2]), 5)
    return total


# The unrolled reference, where an adjoint is asked for.
UNROLLED = "unrolled"


def solve(p, solver, stepping, saves, interval, adjoint, terms=term, **options):
    """`terms`: a function that makes them of `p`, as `solver` may be."""
    t0, t1 = interval
    stepping = stepping(t0, t1)
    options = (
        dict(
            saveat=saves(t0, t1, p),
            stepsize_controller=stepping.controller,
            max_steps=stepping.max_steps,
        )
        | options
    )
    rest = (t0, t1, stepping.dt0, p["y0"], p["args"])
    if adjoint is UNROLLED:
        return unrolled(Problem(terms, solver), p, *rest, **options)
    solver = solver if isinstance(solver, diffrax.AbstractSolver) else solver(p)
    return diffrax.diffeqsolve(terms(p), solver, *rest, adjoint=adjoint, **options)


def loss(p, *args, **options):
    return solution_loss(solve(p, *args, **options))


def check(found, true, tolerance=1e-10, value_tolerance=1e-9, matters="most"):
    """That values and gradients are the same: every parameter by itself, so that no
    small one is drowned; and that the gradient is not just zero. Values may differ a bit
    more, since adaptive steps amplify how they are rounded."""
    (value, grad), (true_value, true_grad) = found, true
    assert abs(value - true_value) <= value_tolerance * abs(true_value)
    assert leaf_differences(grad, true_grad) < tolerance
    nonzero = [bool(jnp.any(x != 0)) for x in jtu.tree_leaves(true_grad)]
    assert sum(nonzero) >= len(nonzero) - (matters == "most")


def check_both_directions(
    solver, stepping, saves, adjoint, terms=term, p=None, **kwargs
):
    """The gradient of one program for both directions of time, against the unrolled
    reference."""
    p = parameters() if p is None else p

    def f(p, t0, t1, adjoint):
        return loss(p, solver, stepping, saves, (t0, t1), adjoint, terms=terms)

    ours = jit(lambda *x: jax.value_and_grad(f)(*x, adjoint))
    for interval in ((0.3, 1.9), (1.4, -0.3)):
        found = ours(p, *interval)
        true = jax.value_and_grad(f)(p, *interval, UNROLLED)
        try:
            check(found, true, **kwargs)
        except AssertionError:
            if not stepping(*interval).adaptive:
                raise
            # Adaptive steps may amplify rounding to more than the tolerance.
            check(found, true, **(kwargs | dict(tolerance=1e-6, value_tolerance=1e-6)))
            check_same_steps(
                solver, stepping, saves, adjoint, terms, p, interval, **kwargs
            )


def check_same_steps(solver, stepping, saves, adjoint, terms, p, interval, **kwargs):
    """As `check_both_directions`, with a reference that makes the steps that were made,
    and does not choose its own."""

    def saves_and_steps(t0, t1, p):
        subs = lambda saveat: saveat.subs
        saveat, steps = saves(t0, t1, p), diffrax.SubSaveAt(t0=True, steps=1)
        return eqx.tree_at(subs, saveat, (saveat.subs, steps))

    def f(p, stepping, adjoint):
        solution = solve(
            p, solver, stepping, saves_and_steps, interval, adjoint, terms=terms
        )
        return solution_loss(solution), solution.ts[1]

    grad = jax.value_and_grad(f, has_aux=True)
    (value, ts), found = jit(lambda p: grad(p, stepping, adjoint))(p)
    steps = Stepping(diffrax.StepTo(ts[jnp.isfinite(ts)]), None)
    (true, _), true_grad = grad(p, lambda *_: steps, UNROLLED)
    check((value, found), (true, true_grad), **kwargs)


def tree_difference(x, y):
    """The relative norm of the difference of two pytrees of the same structure, shapes
    and dtypes."""
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    pairs = list(zip(jtu.tree_leaves(x), jtu.tree_leaves(y)))
    assert all(jnp.shape(a) == jnp.shape(b) for a, b in pairs)
    assert all(jnp.result_type(a) == jnp.result_type(b) for a, b in pairs)
    norm = lambda leaves: sum(float(jnp.sum(jnp.abs(a) ** 2)) for a in leaves) ** 0.5
    size = norm([b for _, b in pairs])
    difference = norm([a - b for a, b in pairs])
    return difference if size == 0 else difference / size


def leaf_differences(x, y):
    """The largest `tree_difference` of any leaf."""
    assert jtu.tree_structure(x) == jtu.tree_structure(y)
    return max(
        tree_difference(a, b) for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y))
    )


def directional_difference(f, x, direction, eps=1e-5):
    """The derivative of `f` at the pytree `x` by central finite differences, of the
    fourth order."""
    at = lambda s: f(jtu.tree_map(lambda a, d: a + s * eps * d, x, direction))
    return jtu.tree_map(
        lambda a, b, c, d: (8 * (a - b) - (c - d)) / (12 * eps),
        *(at(1), at(-1), at(2), at(-2)),
    )


def normal_like(tree, seed):
    leaves, structure = jtu.tree_flatten(tree)
    keys = jr.split(jr.PRNGKey(seed), len(leaves))
    leaves = [jr.normal(k, jnp.shape(x), x.dtype) for k, x in zip(keys, leaves)]
    return jtu.tree_unflatten(structure, leaves)


def _param(params, marks=()):
    values = [value for param in params for value in param.values]
    marks = [*marks, *(mark for param in params for mark in param.marks)]
    return pytest.param(*values, id="-".join(p.id for p in params), marks=marks)


def quick(axis, *ids):
    """The parameters with all but these marked as slow."""
    slow = (pytest.mark.slow,)
    marks = lambda p: p.marks if p.id in ids else slow
    return tuple(pytest.param(*p.values, id=p.id, marks=marks(p)) for p in axis)


def product(*axes):
    return [_param(params) for params in it.product(*axes)]


def _pairs(indices):
    return set(it.combinations(enumerate(indices), 2))


@ft.cache
def _pairwise_indices(*sizes):
    # Greedy: of all combinations the one with most pairs that are still missing.
    combinations = list(it.product(*map(range, sizes)))
    missing = set().union(*map(_pairs, combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda c: len(_pairs(c) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def pairwise_or_product(*axes):
    """Pairwise by default, and what is left of the product when slow tests are run: also
    with everything that is marked as slow by itself."""
    unmarked = [[i for i, p in enumerate(axis) if len(p.marks) == 0] for axis in axes]
    chosen = {
        tuple(axis[i] for axis, i in zip(unmarked, indices))
        for indices in _pairwise_indices(*map(len, unmarked))
    }
    return [
        _param(
            [a[i] for a, i in zip(axes, indices)],
            () if indices in chosen else (pytest.mark.slow,),
        )
        for indices in it.product(*map(range, map(len, axes)))
    ]
