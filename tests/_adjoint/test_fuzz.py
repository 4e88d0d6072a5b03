"""Random solves: the gradient is that of `RecursiveCheckpointAdjoint`, or an error says
why not.

What has to be compiled anew (solver, controller, what is saved, the pytree of the state)
is drawn from a few combinations, all numbers from wherever they may be. `-m slow` draws
from many more.
"""

import functools as ft
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

from ..helpers import adjoint_of, jit, tree_difference, weigh


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
    ReversibleALF4(damping=0.4),
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


def _loss(structure, parameters, times, adjoint):
    t0, t1, dt0, ts = times
    closed_over = parameters["closed_over"]

    def vector_field(t, y, args):
        flat, unravel = jfu.ravel_pytree(y)
        numbers = [x for x in jtu.tree_leaves(args) if eqx.is_inexact_array(x)]
        rate = sum((jnp.sum(jnp.sin(x)) for x in numbers), jnp.ones_like(t))
        k = jnp.tanh(parameters["matrix"] @ flat + rate * jnp.sin(closed_over * t))
        return unravel(k - 0.3 * flat)

    term, y0 = diffrax.ODETerm(vector_field), parameters["y0"]
    if isinstance(structure.solver, StormerVerlet):
        term, y0 = (term, term), (y0, jtu.tree_map(jnp.sin, y0))
    given = structure.controller == "StepTo"
    solution = diffrax.diffeqsolve(
        term,
        structure.solver,
        t0,
        t1,
        None if given else dt0,
        y0,
        parameters["args"],
        saveat=_saveat(structure, ts, closed_over),
        stepsize_controller=_controller(structure.controller, t0, t1, ts),
        adjoint=adjoint,
        max_steps=64,
    )
    total = weigh((solution.ys, solution.ts))
    if structure.dense:
        total = total + weigh(solution.evaluate((t0 + 3 * t1) / 4))
    return total


@ft.cache
def _gradients(seed):
    structure = _structure(seed)
    adjoints = (adjoint_of(structure.solver), diffrax.RecursiveCheckpointAdjoint())

    def of_both(dynamic, static, times):
        def loss(dynamic, adjoint):
            return _loss(structure, eqx.combine(dynamic, static), times, adjoint)

        return [jax.grad(loss)(dynamic, adjoint) for adjoint in adjoints]

    @ft.cache
    def compiled(leaves, treedef):
        static = jtu.tree_unflatten(treedef, leaves)
        return jit(lambda dynamic, times: of_both(dynamic, static, times))

    def gradients(parameters, times):
        dynamic, static = eqx.partition(parameters, eqx.is_inexact_array)
        leaves, treedef = jtu.tree_flatten(static)
        return compiled(tuple(leaves), treedef)(dynamic, times)

    return structure, gradients


def _check(seed, numbers):
    structure, gradients = _gradients(seed)
    try:
        found, true = jax.block_until_ready(gradients(*_arrays(structure, numbers)))
    except RuntimeError as e:
        documented = "has lost the solution on its way back" in str(e)
        hyp.note(str(structure))
        assert documented, e
        return
    tolerance = 1e-8 if structure.dtype == jnp.float64 else 5e-3
    difference = tree_difference(found, true)
    hyp.note(f"{structure}: {difference}")
    assert difference < tolerance


_settings = ft.partial(
    hyp.settings,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hyp.HealthCheck),
)


@pytest.mark.parametrize("part", range(2))
def test_few_structures(part):
    seeds = st.integers(2 * part, 2 * part + 1)

    @_settings(max_examples=40)
    @hyp.given(seeds, _numbers)
    def check(seed, numbers):
        _check(seed, numbers)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_structures(part):
    seeds = st.integers(100 + 20 * part, 119 + 20 * part)

    @_settings(max_examples=100)
    @hyp.given(seeds, _numbers)
    def check(seed, numbers):
        _check(seed, numbers)

    check()
