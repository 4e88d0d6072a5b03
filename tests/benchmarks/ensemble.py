"""An ensemble of small systems: the benchmark of gradsolve, whose steps are recorded
outside of `jax.jit` and then stepped again.

    python -m tests.benchmarks.ensemble --output docs/_tables/ensemble.md

writes the table. Needs the extra `benchmarks`.
"""

import argparse
import dataclasses
import functools as ft
from collections.abc import Callable
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from diffrax_reversible import ReversibleAdjoint, ReversibleALF6, SymplecticAdjoint

from ..measure import medians


def lorenz(t, y, rho):
    del t
    a, b, c = y
    return jnp.stack([10 * (b - a), a * (rho - c) - b, a * b - 8 / 3 * c])


def _rhos(n):
    return jnp.linspace(0.0, 21.0, n)


def _loss(rhos, rtol, *, solver, adjoint):
    def one(rho):
        y0 = jnp.array([1.0, 0.0, 0.0])
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lorenz),
            *(solver, 0.0, 1.0, 0.01, y0, rho),
            stepsize_controller=diffrax.PIDController(rtol, rtol / 1000),
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys**2)

    return jnp.sum(jax.vmap(one)(rhos))


class _Problem:
    """As gradsolve wants it."""

    name, dim, t0, t1, is_stiff = "lorenz of the benchmark", 3, 0.0, 1.0, False

    def f_jax(self, t, y, p):
        return lorenz(t, y, p[0])


def _gradsolve():
    try:
        from gradsolve.solvers.tsit5_replay import record_tsit5_jax
        from gradsolve.warp.warp_replay import replay_solve_jax
    except ImportError as error:
        raise ImportError(
            "This benchmark compares with gradsolve: `pip install "
            '"diffrax_reversible[benchmarks]"`.'
        ) from error
    return record_tsit5_jax, replay_solve_jax


@dataclasses.dataclass
class Row:
    """One method. `error`: that of the gradient, relative to the largest component."""

    n: int
    rtol: float
    method: str
    seconds: float
    memory: int
    error: float


def _exact(rho) -> float:
    """The gradient of one of the systems, by the equation of its sensitivity."""

    def field(t, z):
        del t
        a, b, c, da, db, dc = z
        return (
            10 * (b - a),
            a * (rho - c) - b,
            a * b - 8 / 3 * c,
            10 * (db - da),
            da * (rho - c) + a * (1 - dc) - db,
            da * b + a * db - 8 / 3 * dc,
        )

    z0 = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    solution = solve_ivp(field, (0.0, 1.0), z0, method="DOP853", rtol=1e-13, atol=1e-15)
    z = solution.y[:, -1]
    return 2 * z[:3] @ z[3:]


def _error(gradient, rhos) -> float:
    chosen = np.linspace(0, len(rhos) - 1, 16).astype(int)
    exact = np.array([_exact(float(rhos[i])) for i in chosen])
    gradient = np.asarray(gradient).reshape(-1)[chosen]
    return float(np.max(np.abs(gradient - exact)) / np.max(np.abs(exact)))


_methods = {
    "diffrax: Tsit5, RecursiveCheckpointAdjoint": (
        diffrax.Tsit5(),
        diffrax.RecursiveCheckpointAdjoint(),
    ),
    "Tsit5, SymplecticAdjoint": (diffrax.Tsit5(), SymplecticAdjoint()),
    "ReversibleALF6, ReversibleAdjoint": (ReversibleALF6(), ReversibleAdjoint()),
}
DIFFRAX, SYMPLECTIC, REVERSIBLE = _methods
REPLAY = "gradsolve: replay"
RECORDED = "gradsolve: replay and recording"


def measure(n: int, rtol: float, repeats: int = 5) -> dict[str, Row]:
    """All methods, timed in turn."""
    record, replay = _gradsolve()
    rhos = _rhos(n)
    fns: dict[str, Callable] = {}
    memory, gradients = {}, {}
    for name, (solver, adjoint) in _methods.items():
        fn = jax.jit(jax.grad(ft.partial(_loss, solver=solver, adjoint=adjoint)))
        compiled = fn.lower(rhos, jnp.array(rtol)).compile()
        fns[name] = ft.partial(compiled, rhos, jnp.array(rtol))
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        gradients[name] = fns[name]()
    problem = _Problem()
    y0, p = np.tile([1.0, 0.0, 0.0], (n, 1)), np.asarray(rhos)[:, None]

    def steps():
        options = dict(rtol=rtol, atol=rtol / 1000)
        _, dts, _ = record(problem.f_jax, y0, p, 0.0, 1.0, **options)
        return jnp.asarray(dts)

    def loss(p, dts):
        return jnp.sum(replay(problem, jnp.asarray(y0), p, dts) ** 2)

    arguments = jnp.asarray(p), steps()
    compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    fns[REPLAY] = lambda: compiled(*arguments)
    fns[RECORDED] = lambda: compiled(arguments[0], steps())
    for name in (REPLAY, RECORDED):
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        gradients[name] = fns[name]()
    seconds = medians(*fns.values(), repeats=repeats)
    return {
        name: Row(n, rtol, name, time, memory[name], _error(gradients[name], rhos))
        for name, time in zip(fns, seconds)
    }


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [
        "| systems | rtol | method | gradient | temp memory | error of the gradient |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.n:,} | {row.rtol:.0e} | {row.method} | {row.seconds * 1e3:.3g} ms "
            f"| {row.memory / 1e6:.3g} MB | {row.error:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--systems", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--rtol", type=float, nargs="+", default=[1e-3, 1e-6, 1e-8])
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = []
    for n in options.systems:
        for rtol in options.rtol:
            rows += measure(n, rtol).values()
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(table(rows))
            print(n, rtol, flush=True)


if __name__ == "__main__":
    main()
