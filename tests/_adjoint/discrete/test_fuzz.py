"""Random solves: the gradient is that of the unrolled solve, or an error says why not,
which must be rare.

What has to be compiled anew (solver, controller, what is saved, the pytree of the state)
is drawn from a few combinations, all numbers from wherever they may be. `-m slow` draws
many more, and others each time: it prints the seed, which `FUZZ_SEED` repeats.
"""

import functools as ft
import os
import random
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import hypothesis as hyp
import hypothesis.strategies as st
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from diffrax_reversible import (
    ALF,
    Reversible,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleYoshida4,
    StormerVerlet,
)

from ...helpers import adjoint_of, jit, tree_difference, UNROLLED, weigh
from ...reference import Problem, unrolled


#
# What has to be compiled
#


class Structure(NamedTuple):
    solver: Any
    controller: str
    saves: tuple[str, ...]
    dense: bool
    state: Any
    dtype: Any
    args: Any


_adaptive = (
    ReversibleALF2(),
    ReversibleALF4(),
    ReversibleALF4(restart=1e-6),
    ReversibleYoshida4(),
    ALF(),
    Reversible(diffrax.Bosh3(), 0.99),
    diffrax.ReversibleHeun(),
    diffrax.Heun(),
    diffrax.Tsit5(),
)
_given_steps = (diffrax.LeapfrogMidpoint(), StormerVerlet(), diffrax.Euler())
_shapes = ((), (1,), (2,), (2, 3), (0,))
_saves = ("ends", "times", "steps", "every third", "fn", "fn at times")


def _tree(rng, leaf, depth=2):
    """A random pytree."""
    kind = rng.choice(("leaf", "tuple", "dict", "list"))
    if depth == 0 or kind == "leaf":
        return leaf(rng)
    children = [_tree(rng, leaf, depth - 1) for _ in range(rng.randint(1, 2))]
    if kind == "dict":
        return dict(zip("ab", children))
    return tuple(children) if kind == "tuple" else children


def _structure(seed) -> Structure:
    rng = random.Random(seed)
    controller = rng.choice(("constant", "StepTo", "PID", "Clip"))
    solvers = _adaptive
    if controller in ("constant", "StepTo"):
        solvers = (*_adaptive, *_given_steps)
    # At least one number.
    state = _tree(rng, lambda rng: rng.choice(_shapes)), rng.choice(_shapes[:4])
    args = _tree(rng, lambda rng: rng.choice((None, 3, True, (), (2,), "name")))
    return Structure(
        rng.choice(solvers),
        controller,
        tuple(rng.sample(_saves, rng.randint(1, 3))),
        rng.random() < 0.3,
        state,
        rng.choice((jnp.float32, jnp.float64, jnp.float64)),
        args,
    )


def _is_shape(x):
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


#
# Numbers
#


class Numbers(NamedTuple):
    seed: int
    t0: float
    length: float
    fraction: float
    ts: list[float]


_numbers = st.builds(
    Numbers,
    seed=st.integers(0, 2**31 - 1),
    t0=st.floats(-2.0, 2.0),
    length=st.one_of(st.just(0.0), st.floats(0.05, 1.5), st.floats(-1.5, -0.05)),
    fraction=st.floats(0.04, 1.4),
    ts=st.lists(
        st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0)),
        min_size=4,
        max_size=4,
    ),
)


def _arrays(structure, numbers):
    dtype = structure.dtype
    keys = iter(jr.split(jr.PRNGKey(numbers.seed), 64))

    def normal(x):
        return jr.normal(next(keys), x, dtype) if _is_shape(x) else x

    y0 = jtu.tree_map(normal, structure.state, is_leaf=_is_shape)
    size = sum(x.size for x in jtu.tree_leaves(y0))
    parameters = dict(
        y0=y0,
        args=jtu.tree_map(
            normal, structure.args, is_leaf=lambda x: _is_shape(x) or x is None
        ),
        matrix=normal((size, size)) / size**0.5,
        closed_over=normal(()),
    )
    # diffrax has no `StepTo` of no steps.
    length = numbers.length or (0.5 if structure.controller == "StepTo" else 0.0)
    t0, t1 = numbers.t0, numbers.t0 + length
    # Exact at both ends.
    fractions = np.sort(numbers.ts)
    ts = (1 - fractions) * t0 + fractions * t1
    dt0 = numbers.fraction * (length or 1.0)
    times = [np.asarray(x, dtype) for x in (t0, t1, dt0, ts)]
    return parameters, times


#
# The solve
#


def _controller(kind, t0, t1, ts):
    if kind == "constant":
        return diffrax.ConstantStepSize()
    if kind == "StepTo":
        nodes = jnp.array([0.0, 0.1, 0.15, 0.4, 0.7, 1.0], t0.dtype)
        nodes = (t0 + (t1 - t0) * nodes).at[0].set(t0).at[-1].set(t1)
        return diffrax.StepTo(nodes)
    controller = diffrax.PIDController(rtol=1e-2, atol=1e-3)
    if kind == "Clip":
        return diffrax.ClipStepSizeController(controller, step_ts=ts[1:3])
    return controller


def _saveat(structure, ts, closed_over):
    def fn(t, y, args):
        return [t * closed_over, jtu.tree_map(lambda x: closed_over * x**2, y)]

    subs = {
        "ends": diffrax.SubSaveAt(t0=True, t1=True),
        "times": diffrax.SubSaveAt(ts=ts),
        "steps": diffrax.SubSaveAt(steps=True),
        "every third": diffrax.SubSaveAt(steps=3, t1=True),
        "fn": diffrax.SubSaveAt(t0=True, steps=2, fn=fn),
        "fn at times": diffrax.SubSaveAt(ts=ts, t1=True, fn=fn),
    }
    chosen = {name: subs[name] for name in structure.saves}
    return diffrax.SaveAt(subs=chosen, dense=structure.dense)


class _Terms(eqx.Module):
    """Of the parameters: equal ones are compiled once."""

    seed: int
    static_args: Any
    splits: bool

    def __hash__(self):
        return self.seed

    def __eq__(self, other):
        return isinstance(other, _Terms) and self.seed == other.seed

    def __call__(self, p):
        def vector_field(t, y, args):
            args = eqx.combine(args, self.static_args)
            flat, unravel = jfu.ravel_pytree(y)
            numbers = [x for x in jtu.tree_leaves(args) if eqx.is_inexact_array(x)]
            rate = sum((jnp.sum(jnp.sin(x)) for x in numbers), jnp.ones_like(t))
            k = jnp.tanh(p["matrix"] @ flat + rate * jnp.sin(p["closed_over"] * t))
            return unravel(k - 0.3 * flat)

        term = diffrax.ODETerm(vector_field)
        return (term, term) if self.splits else term


def _loss(seed, structure, parameters, static_args, times, adjoint):
    t0, t1, dt0, ts = times
    y0, solver = parameters["y0"], structure.solver
    splits = isinstance(solver, StormerVerlet)
    if splits:
        y0 = (y0, jtu.tree_map(jnp.sin, y0))
    terms = _Terms(seed, static_args, splits)
    given = structure.controller == "StepTo"
    rest = (t0, t1, None if given else dt0, y0)
    options = dict(
        saveat=_saveat(structure, ts, parameters["closed_over"]),
        stepsize_controller=_controller(structure.controller, t0, t1, ts),
        max_steps=64,
    )
    if adjoint is UNROLLED:
        problem = Problem(terms, solver)
        solution = unrolled(problem, parameters, *rest, parameters["args"], **options)
    else:
        args = eqx.combine(parameters["args"], static_args)
        options |= dict(adjoint=adjoint)
        rest = (*rest, args)
        solution = diffrax.diffeqsolve(terms(parameters), solver, *rest, **options)
    total = weigh((solution.ys, solution.ts))
    if structure.dense and (adjoint is not UNROLLED or solution.steps):
        total = total + weigh(solution.evaluate((t0 + 3 * t1) / 4))
    return total


@ft.cache
def _gradients(seed):
    structure = _structure(seed)

    def split(parameters):
        args, static_args = eqx.partition(parameters["args"], eqx.is_inexact_array)
        return parameters | {"args": args}, static_args

    # The same for all numbers.
    _, static_args = split(_arrays(structure, Numbers(0, 0.0, 1.0, 0.1, [0.0] * 4))[0])
    adjoint = adjoint_of(structure.solver)
    f = lambda p, times: _loss(seed, structure, p, static_args, times, adjoint)
    compiled = jit(jax.grad(f))

    def ours(parameters, times):
        return compiled(split(parameters)[0], times)

    def true(parameters, times):
        parameters, _ = split(parameters)
        f = lambda p: _loss(seed, structure, p, static_args, times, UNROLLED)
        return jax.grad(f)(parameters)

    return structure, ours, true


def _check(seed, numbers):
    """Whether there is a gradient; if so, it is right."""
    structure, ours, true = _gradients(seed)
    arrays = _arrays(structure, numbers)
    try:
        found = jax.block_until_ready(ours(*arrays))
    except Exception as e:
        assert "has lost the solution on its way back" in str(e), (structure, e)
        return False
    tolerance = 1e-8 if structure.dtype == jnp.float64 else 5e-3
    difference = tree_difference(found, true(*arrays))
    hyp.note(f"{structure}: {difference}")
    assert difference < tolerance
    return True


_settings = ft.partial(
    hyp.settings,
    deadline=None,
    database=None,
    suppress_health_check=list(hyp.HealthCheck),
)


def _run(seeds, share, settings, **options):
    """`share`: of the solves that must have a gradient."""
    accepted = []

    @settings
    @hyp.given(st.sampled_from(seeds), _numbers)
    def check(seed, numbers):
        accepted.append(_check(seed, numbers))

    check = hyp.seed(options["seed"])(check) if options else check
    check()
    print(f"{sum(accepted)} of {len(accepted)} solves have a gradient")
    assert sum(accepted) >= share * len(accepted)


@pytest.mark.slow
def test_few_structures():
    """The same in each run."""
    _run(range(1), 0.8, _settings(max_examples=30, derandomize=True))


_seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**20)))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_structures(part):
    seed = _seed + part
    print(f"FUZZ_SEED={_seed}")
    seeds = range(100 * seed, 100 * seed + 8)
    _run(seeds, 0.6, _settings(max_examples=80), seed=seed)
