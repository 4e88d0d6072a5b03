"""Encoding and decoding."""

import math

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import (
    ALF,
    decode,
    encode,
    Encoding,
    RecordedSteps,
    Reversible,
    ReversibleALF2,
    ReversibleALF4,
    StormerVerlet,
)

from ..helpers import INTERVALS, jit, parameters, term, times, tree_difference
from .test_undo import largest, pendulum


_solvers = (
    pytest.param(ALF(), id="ALF"),
    pytest.param(ReversibleALF2(grid=2.0**-40), id="ALF2 grid"),
    pytest.param(Reversible(diffrax.Heun()), id="Heun coupled"),
    pytest.param(ReversibleALF4(), id="ALF4", marks=pytest.mark.slow),
    pytest.param(diffrax.ReversibleHeun(), id="Heun", marks=pytest.mark.slow),
    pytest.param(diffrax.LeapfrogMidpoint(), id="Leapfrog", marks=pytest.mark.slow),
    pytest.param(StormerVerlet(), id="StormerVerlet"),
)


@pytest.mark.parametrize("solver", _solvers)
def test_there_and_back(solver):
    terms, y0 = pendulum(solver)
    grid = getattr(solver, "grid", None)
    if grid is not None:
        y0 = jnp.round(y0 / grid) * grid

    @jit
    def there_and_back(y0, t1, dt0):
        encoding = encode(terms, solver, 0.0, t1, dt0, y0, 1.3)
        # As it may be read from a file.
        encoding = Encoding(encoding.y, encoding.copy)
        return decode(terms, solver, 0.0, t1, dt0, encoding, 1.3), encoding

    for number in (8, 50, 1000):
        t1 = jnp.array(0.05 * number)
        found, encoding = there_and_back(y0, t1, t1 / number)
        assert largest(encoding.y, y0) > 0.1
        assert largest(found, y0) < (1e-12 if grid is None else 1e-300)
    assert (encoding.copy is None) == isinstance(solver, StormerVerlet)


@pytest.mark.parametrize("interval", INTERVALS)
def test_batch_of_given_steps(interval):
    """In both directions of time, and of a pytree."""
    t0, t1 = interval
    nodes = times(t0, t1, 0.0, 0.2, 0.5, 0.6, 1.0).at[0].set(t0).at[-1].set(t1)
    options = dict(stepsize_controller=diffrax.StepTo(nodes))

    def there_and_back(p):
        problem = (term(p), ReversibleALF4(), t0, t1, None)
        encoding = encode(*problem, p["y0"], p["args"], **options)
        return decode(*problem, encoding, p["args"], **options)

    ps = [parameters(seed) for seed in (0, 1, 2)]
    p = jax.tree_util.tree_map(lambda *x: jnp.stack(x), *ps)
    found = jax.jit(jax.vmap(there_and_back))(p)
    assert tree_difference(found, p["y0"]) < 1e-14


def test_gradient_is_the_identity():
    p = parameters()

    def f(y0, args):
        problem = (term(p), ALF(), 0.0, 1.0, 0.05)
        y0 = decode(*problem, encode(*problem, y0, args), args)
        return jnp.concatenate([y0["a"], y0["b"]])

    found = jit(jax.jacrev(f, (0, 1)))(p["y0"], p["args"])
    in_y0, in_args = found
    in_y0 = jnp.concatenate([in_y0["a"], in_y0["b"]], axis=1)
    assert jnp.max(jnp.abs(in_y0 - jnp.eye(5))) < 1e-10
    assert largest(in_args, jax.tree_util.tree_map(jnp.zeros_like, in_args)) < 1e-10


def test_solution_alone_is_not_enough():
    """What is then found is off by an error of order four."""
    terms, y0 = pendulum(ALF())

    def error(dt0):
        y1 = encode(terms, ALF(), 0.0, 2.0, dt0, y0, 1.3).y
        end = terms.vf(2.0, y1, 1.3)
        found = decode(
            *(terms, ALF(), 0.0, 2.0, dt0, Encoding(y1, end), 1.3),
            reversal_rtol=math.inf,
        )
        return largest(found, y0)

    coarse, fine = error(0.05), error(0.025)
    print(coarse, fine)
    assert fine > 1e-9
    assert 3.7 < math.log2(coarse / fine) < 4.3


def test_edit():
    """Decoded with other `args`, as a solve with those goes."""
    terms, y0 = pendulum(ALF())
    problem = (terms, ALF(), 0.0, 2.0, 0.01)
    encoding = encode(*problem, y0, 1.3)
    change = terms.vf(2.0, encoding.y, 1.1) - terms.vf(2.0, encoding.y, 1.3)
    edited = Encoding(encoding.y, encoding.copy + change)
    found = decode(*problem, edited, 1.1, reversal_rtol=math.inf)
    true = diffrax.diffeqsolve(
        terms, diffrax.Tsit5(), 2.0, 0.0, -0.01, encoding.y, 1.1
    ).ys[-1]
    assert largest(found, y0) > 0.05
    assert largest(found, true) < 1e-4
    with pytest.raises(Exception, match="`decode` has not found the start"):
        decode(*problem, encoding, 1.1)


def test_refused():
    terms, y0 = pendulum(ALF())
    adaptive = RecordedSteps(diffrax.PIDController(rtol=1e-3, atol=1e-3))
    problem, options = (terms, ALF(), 0.0, 1.0, 0.1), dict(stepsize_controller=adaptive)
    with pytest.raises(ValueError, match="`encode` needs steps that are known"):
        encode(*problem, y0, 1.3, **options)
    encoding = encode(*problem, y0, 1.3)
    with pytest.raises(ValueError, match="`decode` needs steps that are known"):
        decode(*problem, encoding, 1.3, **options)
    with pytest.raises(ValueError, match="`encode` cannot undo the steps of `Tsit5`"):
        encode(terms, diffrax.Tsit5(), 0.0, 1.0, 0.1, y0, 1.3)
    with pytest.raises(ValueError, match="`decode` cannot undo the steps of `Tsit5`"):
        decode(terms, diffrax.Tsit5(), 0.0, 1.0, 0.1, encoding, 1.3)
