"""A user who changes nothing but `adjoint=` gets the same gradient, in no more time and no
more memory."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

from diffrax_reversible import Reversible, ReversibleALF4, ReversibleALF6

from .diffrax_examples import (
    EXAMPLES,
    neural_cde_data,
    neural_cde_model,
    solve_neural_cde,
)
from .diffrax_examples_table import DTYPES, measure


pytestmark = pytest.mark.benchmark
# Times that have come out above diffrax's, on a machine that was not idle.
_slower = {"Kalman filter": 1.4, "neural SDE": 1.1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda x: f"{x.name}, {type(x.solver).__name__}"
)
def test_default_arguments(example, dtype):
    found = measure(example, dtype)
    ours, theirs = found.seconds
    print(
        f"{1e3 * ours:.3g} ms, {found.time_ratio:.2f} times diffrax's, with "
        f"{found.memory_ratio:.2f} times its memory; difference {found.difference:.0e}"
    )
    assert found.time_ratio < _slower.get(example.name, 1)
    assert found.memory_ratio < 1
    if dtype == jnp.float64:
        assert found.difference < 1e-11


@pytest.mark.parametrize(
    "solver, evaluations",
    (
        pytest.param(diffrax.Tsit5(), 6, id="Tsit5"),
        pytest.param(ReversibleALF4(), 5, id="ALF4"),
        pytest.param(ReversibleALF6(), 20, id="ALF6"),
        pytest.param(Reversible(diffrax.Tsit5()), 12, id="Tsit5 coupled"),
    ),
)
def test_landing_on_the_knots_of_a_control(solver, evaluations):
    """Only then does a solver hold its tolerance, and only then is it comparable."""
    ts, coeffs = neural_cde_data(jnp.float64, batch=4)
    model = neural_cde_model(jnp.float64)

    def run(solver, controller):
        def one(coeffs):
            solution = solve_neural_cde(
                model, solver, controller, ts, coeffs, max_steps=16384
            )
            return solution.ys[0], solution.stats["num_steps"]

        ys, steps = jax.jit(jax.vmap(one))(coeffs)
        return ys, float(jnp.mean(steps))

    def landing(rtol, atol):
        controller = diffrax.PIDController(rtol=jnp.array(rtol), atol=jnp.array(atol))
        return controller, diffrax.ClipStepSizeController(controller, step_ts=ts)

    exact, _ = run(diffrax.Dopri8(), landing(1e-10, 1e-11)[1])
    (without, wrong), (steps, error) = (
        (steps, float(jnp.max(jnp.abs(ys - exact))))
        for ys, steps in (run(solver, x) for x in landing(1e-3, 1e-6))
    )
    print(
        f"on the knots {steps:.0f} steps, {steps * evaluations:.0f} evaluations, error "
        f"{error:.1e}; without {without:.0f}, {without * evaluations:.0f}, {wrong:.1e}"
    )
    # The 99 intervals, and a few more.
    assert 99 <= steps < 120
    assert error < 3e-4
    assert wrong > 1e-2
