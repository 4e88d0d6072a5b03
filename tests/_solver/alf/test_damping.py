import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import ReversibleAdjoint, ReversibleALF4, ReversibleALF6

from ...helpers import jit, leaf_differences
from ...problems import VAN_DER_POL


def _end(solver, steps, t1, adjoint):
    def f(y0, strength):
        def vector_field(t, y, strength):
            a, b = y
            force = 0.5 * jnp.cos(1.1 * t)
            return jnp.stack([b, strength * (1 - a**2) * b - a + force])

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            0.0,
            t1,
            t1 / steps,
            y0,
            strength,
            adjoint=adjoint,
            max_steps=steps + 1,
        )
        assert solution.ys is not None
        return solution.ys[0]

    return f


@pytest.mark.parametrize(
    "solver, steps",
    (
        (ReversibleALF4, 4000),
        pytest.param(ReversibleALF6, 1000, marks=pytest.mark.slow),
    ),
)
def test_contraction(solver, steps):
    """A forced van der Pol oscillator for a long time: without damping the parasitic
    mode takes over."""
    problem = VAN_DER_POL._replace(t1=20.0)
    (exact,) = problem.exact(np.array([problem.t1]))

    def error(damping):
        f = _end(solver(damping=damping), steps, problem.t1, diffrax.ForwardMode())
        return np.max(np.abs(jax.jit(f)(problem.start, 1.0) - exact))

    errors = [error(damping) for damping in (0.0, 1.0, 2.0)]
    print(f"{solver.__name__}: {errors}")
    assert not errors[0] < 1e-3
    assert max(errors[1:]) < 1e-8


@pytest.mark.parametrize("damping", (pytest.param(0.5, marks=pytest.mark.slow), 2.0))
def test_gradient(damping):
    def f(y0, strength, adjoint):
        end = _end(ReversibleALF4(damping=damping), 200, VAN_DER_POL.t1, adjoint)
        return jnp.sum(end(y0, strength))

    x, ours = (VAN_DER_POL.start, jnp.array(1.0)), ReversibleAdjoint()
    grad = jit(jax.grad(lambda *x: f(*x, ours), (0, 1)))(*x)
    forward = diffrax.ForwardMode()
    true = jit(jax.jacfwd(lambda *x: f(*x, forward), (0, 1)))(*x)
    assert leaf_differences(grad, true) < 1e-10


def test_step():
    """What is damped is the distance from the vector field at the end of the step."""
    h, gamma = 0.1, 3.0
    term = diffrax.ODETerm(lambda t, y, args: jnp.cos(y + t))
    y0, v0 = jnp.array([0.3, 1.0]), jnp.array([0.9, -0.4])
    bare, damped = ReversibleALF4(), ReversibleALF4(damping=gamma)
    y, _, _, v, _ = bare.step(term, 0.2, 0.2 + h, y0, None, v0, False)
    found_y, _, _, found_v, _ = damped.step(term, 0.2, 0.2 + h, y0, None, v0, False)
    f = term.vf(0.2 + h, y, None)
    assert jnp.all(found_y == y)
    assert jnp.allclose(found_v, f + np.exp(-gamma * h) * (v - f), rtol=1e-14)


@pytest.mark.parametrize("damping", (-0.1, float("inf"), float("nan")))
def test_not_a_rate(damping):
    with pytest.raises(ValueError, match=r"`ReversibleALF4\(damping=.*positive rate"):
        ReversibleALF4(damping=damping)


def test_too_much():
    """Damped by more than the dtype has digits, a step cannot be undone."""
    solver = ReversibleALF4(damping=50.0)
    term = diffrax.ODETerm(lambda t, y, args: -y)
    y0 = jnp.array([1.0])

    def undo(h):
        y1, _, _, v1, _ = solver.step(term, 0.0, h, y0, None, -y0, False)
        y, *_ = solver.backward_step(term, 0.0, h, y1, None, (0.0,), v1, False)
        return y

    assert jnp.allclose(jax.jit(undo)(0.1), y0, rtol=1e-10)
    with pytest.raises(Exception, match="cannot be undone. Use less damping"):
        jax.block_until_ready(jax.jit(undo)(1.0))
