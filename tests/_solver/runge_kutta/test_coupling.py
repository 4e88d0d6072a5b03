import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import Reversible, ReversibleAdjoint, ReversibleALF2

from ...helpers import jit, without_restarts


def _lotka_volterra(t, y, args):
    del t, args
    a, b = y
    return jnp.stack([a * (b - 2), b * (1 - a)])


def _nonautonomous(t, y, args):
    del args
    a, b = y
    return jnp.stack(
        [
            b + 0.3 * jnp.sin(t) * a**2,
            -a - 0.2 * b * a**2 + 0.4 * jnp.cos(2 * t) * b,
        ]
    )


def _solve(field, solver, saveat, t1, y0):
    """The solution for a number of steps that may be traced."""

    def solve(steps):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            t1,
            t1 / steps,
            y0,
            saveat=saveat,
            max_steps=None,
        )
        return solution.ys

    return jit(solve)


def _fitted_order(field, solver, y0, t1, steps, saveat, accurate=6000):
    true = _solve(field, diffrax.Dopri8(), saveat, t1, y0)(accurate)
    solve = _solve(field, solver, saveat, t1, y0)
    errors = [jnp.max(jnp.abs(solve(n) - true)) for n in steps]
    print(f"{solver}: errors {[f'{e:.1e}' for e in errors]}")
    return -np.polyfit(np.log(steps), np.log(np.array(errors)), 1)[0]


@pytest.mark.parametrize(
    "solver, field, y0, t1, steps",
    [
        # With the default parameter Euler's error is one of order two for many steps.
        (Reversible(diffrax.Euler(), 1.0), _lotka_volterra, (2, 2), 2, 512),
        (Reversible(diffrax.Heun()), _lotka_volterra, (2, 2), 2, 128),
        *(
            pytest.param(
                *(Reversible(solver), _lotka_volterra, (2, 2), 2, steps),
                marks=pytest.mark.slow,
            )
            for solver, steps in (
                (diffrax.Midpoint(), 128),
                (diffrax.Ralston(), 128),
                (diffrax.Dopri5(), 64),
            )
        ),
        (Reversible(diffrax.Bosh3()), _nonautonomous, (1, 0.5), 4, 64),
        (Reversible(diffrax.Tsit5()), _lotka_volterra, (2, 2), 2, 64),
        (Reversible(diffrax.Dopri8()), _nonautonomous, (1, 0.5), 4, 16),
    ],
)
def test_order(solver, field, y0, t1, steps):
    saveat = diffrax.SaveAt(t1=True)
    y0, solver = jnp.array(y0, float), without_restarts(solver)
    steps = [steps, int(1.5 * steps), 2 * steps]
    found = _fitted_order(field, solver, y0, float(t1), steps, saveat)
    print(f"fitted order {found:.2f}")
    assert abs(found - solver.order(None)) < 0.15


def test_order_of_interpolation():
    saveat = diffrax.SaveAt(ts=jnp.linspace(0.03, 1.97, 41))
    solver, y0 = Reversible(diffrax.Tsit5()), jnp.array([2.0, 2.0])
    found = _fitted_order(_lotka_volterra, solver, y0, 2.0, [30, 40, 60, 80], saveat)
    print(f"fitted order {found:.2f}")
    # Of third order, and so with a local error of the fourth.
    assert found > 3.7


@pytest.mark.parametrize(
    "base",
    [diffrax.Heun(), diffrax.Bosh3(), diffrax.Tsit5(), diffrax.Dopri8()],
    ids=lambda solver: type(solver).__name__,
)
def test_first_step_is_that_of_the_base_solver(base):
    """As long as both copies are the same: solution and error estimate."""
    term, y0 = diffrax.ODETerm(_nonautonomous), jnp.array([1.0, 0.5])
    solver = Reversible(base)
    found, true = [
        s.step(term, 0.2, 0.7, y0, None, s.init(term, 0.2, 0.7, y0, None), False)
        for s in (solver, base)
    ]
    for x, y in zip(found[:2], true[:2]):
        assert jnp.allclose(x, y, rtol=1e-13, atol=1e-15)


def test_no_error_estimate():
    term, y0 = diffrax.ODETerm(_nonautonomous), jnp.array([1.0, 0.5])
    solver = Reversible(diffrax.Euler())
    _, error, *_ = solver.step(term, 0.0, 0.1, y0, None, y0, False)
    assert error is None


@pytest.mark.parametrize("coupling_parameter", (0.5, 0.999, 1.0))
def test_backward_step(coupling_parameter):
    solver = Reversible(diffrax.Bosh3(), coupling_parameter)
    term = diffrax.ODETerm(_nonautonomous)
    y0, z0 = jnp.array([1.0, 0.5]), jnp.array([1.01, 0.49])
    y1, _, dense_info, z1, _ = solver.step(term, 0.2, 0.7, y0, None, z0, False)
    back = solver.backward_step(term, 0.2, 0.7, y1, None, (0.0,), z1, False)
    for x, y in zip(jax.tree.leaves(back[:3]), jax.tree.leaves((y0, dense_info, z0))):
        assert jnp.allclose(x, y, rtol=1e-14, atol=1e-14)


def test_stable_for_complex():
    """Complex states, in a dtype of their own."""
    solver = Reversible(diffrax.Heun())
    term = diffrax.ODETerm(lambda t, y, args: 1j * y)
    y0 = jnp.array([1.0 + 0j], jnp.complex64)
    t0, t1 = jnp.float32(0), jnp.float32(0.1)
    y1, _, _, z1, _ = solver.step(term, t0, t1, y0, None, y0, False)
    assert y1.dtype == z1.dtype == jnp.complex64
    assert abs(y1[0] - jnp.exp(0.1j)) < 1e-3


@pytest.mark.parametrize(
    "solver, match",
    [
        (diffrax.Kvaerno5(), "only explicit Runge-Kutta solvers"),
        (diffrax.KenCarp4(), "only explicit Runge-Kutta solvers"),
        (diffrax.ImplicitEuler(), "only explicit Runge-Kutta solvers"),
        (diffrax.HalfSolver(diffrax.Tsit5()), "only explicit Runge-Kutta solvers"),
        (diffrax.ReversibleHeun(), "reversible already"),
        (diffrax.LeapfrogMidpoint(), "reversible already"),
        (diffrax.SemiImplicitEuler(), "reversible already"),
        (ReversibleALF2(), "reversible already"),
        (Reversible(diffrax.Tsit5()), "reversible already"),
    ],
)
def test_solver_refused(solver, match):
    with pytest.raises(ValueError, match=match):
        Reversible(solver)


@pytest.mark.parametrize("coupling_parameter", (-0.5, 0.0, 1.001, float("nan")))
def test_coupling_parameter_refused(coupling_parameter):
    with pytest.raises(ValueError, match=r"coupling_parameter=\.\.\."):
        Reversible(diffrax.Tsit5(), coupling_parameter)


def test_wrapped_is_refused():
    """`HalfSolver` makes steps that are not those of the solver inside."""
    solver = diffrax.HalfSolver(Reversible(diffrax.Tsit5()))
    with pytest.raises(
        ValueError, match=r"`solver=diffrax.HalfSolver\(\.\.\.\)` is not"
    ):
        diffrax.diffeqsolve(
            diffrax.ODETerm(_nonautonomous),
            solver,
            0.0,
            1.0,
            0.1,
            jnp.ones(2),
            adjoint=ReversibleAdjoint(),
        )
