"""What gradients of implicit solvers cost, as multiples of what they cost with
`RecursiveCheckpointAdjoint`."""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import pytest
from jaxtyping import Array

from diffrax_reversible import SymplecticAdjoint

from ..helpers import leaf_differences
from ..measure import medians


pytestmark = pytest.mark.benchmark

_theirs = diffrax.RecursiveCheckpointAdjoint()


class _Problem(NamedTuple):
    field: Callable
    y0: Array
    rates: Array
    t1: float
    dt0: float
    rtol: float
    atol: float


def _robertson(cells):
    """Cells that exchange their substances, and react at somewhat different rates."""

    def field(t, y, rates):
        a, b, c = y.reshape(3, cells)
        mix = lambda x: 0.1 * (jnp.roll(x, 1) - 2 * x + jnp.roll(x, -1))
        first = rates[2] * b * c - rates[0] * (1 + jnp.arange(cells) / cells) * a
        last = rates[1] * b**2
        return jnp.concatenate([first + mix(a), -first - last + mix(b), last + mix(c)])

    y0 = jnp.concatenate([jnp.ones(cells), jnp.zeros(2 * cells)])
    rates = jnp.array([0.04, 3e7, 1e4])
    return _Problem(field, y0, rates, 100.0, 1e-4, 1e-6, 1e-8)


def _brusselator(points):
    """Two substances that react and diffuse along a line."""

    def field(t, y, rates):
        u, v = y.reshape(2, points)

        def diffusion(x, end):
            left = jnp.concatenate([end, x[:-1]])
            right = jnp.concatenate([x[1:], end])
            return rates[2] * (points + 1) ** 2 * (left - 2 * x + right)

        reaction = u**2 * v
        du = rates[0] + reaction - (rates[1] + 1) * u + diffusion(u, jnp.ones(1))
        dv = rates[1] * u - reaction + diffusion(v, 3 * jnp.ones(1))
        return jnp.concatenate([du, dv])

    x = jnp.arange(1, points + 1) / (points + 1)
    y0 = jnp.concatenate([1 + jnp.sin(2 * jnp.pi * x), 3 + 0 * x])
    return _Problem(field, y0, jnp.array([1.0, 3.0, 0.02]), 10.0, 1e-3, 1e-4, 1e-6)


def _compare(name, problem, ours, repeats):
    """Time and memory of gradients with each of `ours`, relative to `_theirs`, after they
    have been found to agree."""

    def compiled(adjoint):
        def loss(y0, rates):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(problem.field),
                diffrax.Kvaerno5(),
                *(0.0, problem.t1, problem.dt0),
                y0,
                rates,
                stepsize_controller=diffrax.PIDController(problem.rtol, problem.atol),
                adjoint=adjoint,
                max_steps=1024,
            )
            assert solution.ys is not None
            return jnp.sum(solution.ys[-1][: len(y0) // 2])

        args = (problem.y0, problem.rates)
        f = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
        return ft.partial(f, *args), f.memory_analysis().temp_size_in_bytes

    programs, memory = zip(*(compiled(x) for x in (_theirs, *ours.values())))
    true, *found = [f() for f in programs]
    for x in found:
        assert leaf_differences(x, true) < 1e-6
    times = medians(*programs, repeats=repeats)
    ratios = [(t / times[0], m / memory[0]) for t, m in zip(times[1:], memory[1:])]
    print(f"{name}, {len(problem.y0)} states: {times[0]:.3f} s, {memory[0]} bytes")
    for key, (t, m) in zip(ours, ratios):
        print(f"  {key}: {t:.2f} times as long, {m:.2f} times the memory")
    return dict(zip(ours, ratios))


def test_robertson():
    """Of few states the memory is of another kind: about twelve kilobytes of numbers and
    addresses in either program, a multiple of 64 bytes each, and eight for the times of
    1024 steps in ours."""
    ours = {"default": SymplecticAdjoint(), "capacity": SymplecticAdjoint(capacity=256)}
    ratios = _compare("Robertson", _robertson(1), ours, 7)
    assert all(time < 0.7 for time, _ in ratios.values())
    assert ratios["default"][1] < 1.5
    assert ratios["capacity"][1] < 1.1


def test_robertson_in_cells():
    """From about 70 states on the memory is that of states and matrices."""
    ours = {"default": SymplecticAdjoint()}
    time, memory = _compare("Robertson", _robertson(32), ours, 3)["default"]
    assert time < 0.7
    assert memory < 0.5


def test_brusselator():
    gmres = lx.GMRES(rtol=1e-8, atol=1e-10, restart=40)
    ours = {
        "default": SymplecticAdjoint(),
        "256 checkpoints": SymplecticAdjoint(checkpoints=256),
        "GMRES": SymplecticAdjoint(linear_solver=gmres),
    }
    ratios = _compare("Brusselator", _brusselator(128), ours, 3)
    assert all(time < 0.7 for time, _ in ratios.values())
    assert all(memory < 0.5 for _, memory in ratios.values())
