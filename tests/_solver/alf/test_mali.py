import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import ALF


def _field(t, y):
    return np.stack([y[1] + 0.3 * np.sin(t), -np.sin(y[0]) - 0.2 * y[1] ** 2])


_term = diffrax.ODETerm(
    lambda t, y, args: jnp.stack(
        [y[1] + 0.3 * jnp.sin(t), -jnp.sin(y[0]) - 0.2 * y[1] ** 2]
    )
)


def _mali_step(z, v, t, h, eta):
    """As in MALI's paper, algorithms 2 and 4: the step and its inverse."""
    middle = z + v * h / 2
    u = _field(t + h / 2, middle)
    v_out = (1 - 2 * eta) * v + 2 * eta * u
    return middle + v_out * h / 2, v_out, h * (u - v)


def _mali_inverse(z, v, t, h, eta):
    middle = z - v * h / 2
    u = _field(t + h / 2, middle)
    v_in = (v - 2 * eta * u) / (1 - 2 * eta)
    return middle - v_in * h / 2, v_in


@pytest.mark.parametrize("eta", (1.0, 0.8, 0.55))
def test_as_mali(eta):
    solver, t, h = ALF(eta), 0.3, 0.17
    z, v = np.array([0.4, -0.9]), np.array([0.2, 0.6])
    found_z, estimate, _, found_v, _ = solver.step(
        _term, t, t + h, jnp.array(z), None, jnp.array(v), False
    )
    true_z, true_v, true_estimate = _mali_step(z, v, t, h, eta)
    assert np.allclose(found_z, true_z, rtol=1e-14)
    assert np.allclose(found_v, true_v, rtol=1e-14)
    assert estimate is not None
    assert np.allclose(estimate, 4 * true_estimate, rtol=1e-13)

    found_z, _, found_v, _ = solver.backward_step(
        _term, t, t + h, jnp.array(true_z), None, (t,), jnp.array(true_v), False
    )
    undone_z, undone_v = _mali_inverse(true_z, true_v, t, h, eta)
    assert np.allclose(found_z, undone_z, rtol=1e-13)
    assert np.allclose(found_v, undone_v, rtol=1e-13)
    assert np.allclose(found_z, z, rtol=1e-13)
    assert np.allclose(found_v, v, rtol=1e-13)


def test_start():
    y0 = jnp.array([0.4, -0.9])
    v0 = ALF().init(_term, 0.3, 0.5, y0, None)
    assert np.allclose(v0.copy, _field(0.3, np.array(y0)), rtol=1e-15)


@pytest.mark.parametrize("eta", (0.5, 0.0, -1.0, 1.01, float("nan")))
def test_bad_eta(eta):
    with pytest.raises(ValueError, match=r"`ALF\(eta=.*above 0.5"):
        ALF(eta)
