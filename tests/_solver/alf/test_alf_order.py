import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    ALF,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
    ReversibleYoshida6,
    ReversibleYoshida8,
)

from ...helpers import copies, jit, without_restarts


# The numbers of steps are such that the errors are above round-off and the leading
# term of the error prevails.
_slow = pytest.mark.slow
_solvers = (
    pytest.param(ALF(), 2, (100, 400), id="ALF", marks=_slow),
    pytest.param(ALF(0.8), 1, (200, 1600), id="ALF damped"),
    pytest.param(ReversibleALF2(), 2, (100, 400), id="ALF2", marks=_slow),
    pytest.param(ReversibleALF4(), 4, (100, 400), id="ALF4"),
    pytest.param(
        ReversibleALF4(restart=1e-6), 4, (100, 400), id="ALF4 restarting", marks=_slow
    ),
    pytest.param(
        ReversibleALF6(restart=1e-6), 6, (32, 80), id="ALF6 restarting", marks=_slow
    ),
    pytest.param(ReversibleYoshida4(), 4, (60, 240), id="Yoshida4", marks=_slow),
    pytest.param(ReversibleALF6(), 6, (32, 80), id="ALF6"),
    pytest.param(ReversibleYoshida6(), 6, (40, 160), id="Yoshida6", marks=_slow),
    pytest.param(ReversibleALF8(), 8, (20, 40), id="ALF8"),
    pytest.param(ReversibleYoshida8(), 8, (24, 44), id="Yoshida8", marks=_slow),
)
_end = 4.0


def _field(t, y, args):
    a, b = y["a"], y["b"]
    da = b + 0.3 * jnp.sin(t) * a**2
    db = -a - 0.2 * b * a**2 + 0.4 * jnp.cos(2 * t) * b
    return {"a": da, "b": db}


_term = diffrax.ODETerm(_field)
_start = {"a": jnp.array(1.0), "b": jnp.array(0.5)}


def _stack(tree):
    return jnp.stack([tree["a"], tree["b"]])


def _exact():
    solution = diffrax.diffeqsolve(
        _term, diffrax.Dopri8(), 0.0, _end, 0.01, _start, adjoint=diffrax.ForwardMode()
    )
    y = jax.tree_util.tree_map(lambda x: x[-1], solution.ys)
    return np.array(_stack(y)), np.array(_stack(_field(_end, y, None)))


@pytest.mark.parametrize("solver, order, numbers", _solvers)
def test_order(solver, order, numbers):
    exact_y, exact_v = _exact()
    if solver.restart > 1e-3:
        # Where it restarts would depend on the step.
        solver = without_restarts(solver)

    @jit
    def solve(n, wave, rough):
        def node(i):
            i, number = jnp.asarray(i, float), jnp.asarray(n, float)
            x = i / number
            smooth = x + wave * jnp.sin(2 * jnp.pi * x) / (2 * jnp.pi)
            return _end * (smooth + rough * (i % 2) / number)

        def body(i, carry):
            y, v = carry
            step = solver.step(_term, node(i), node(i + 1), y, None, v, False)
            return step[0], step[3]

        v = solver.init(_term, 0.0, 0.1, _start, None)
        y, v = lax.fori_loop(0, n, body, (_start, v))
        return _stack(y), _stack(copies(v))

    counts = np.unique(np.geomspace(numbers[0], numbers[1], 4).astype(int) // 2 * 2)

    def orders(wave, rough):
        results = [solve(n, wave, rough) for n in counts]
        errors = [
            [np.linalg.norm(y - exact_y), np.linalg.norm(v - exact_v)]
            for y, v in results
        ]
        slopes, _ = np.polyfit(np.log(counts), np.log(errors), 1)
        return -slopes

    assert solver.order(_term) == order
    assert np.all(np.abs(orders(0.0, 0.0) - order) < 0.15)
    # Steps that vary smoothly, by a factor of three.
    assert np.all(np.abs(orders(0.5, 0.0) - order) < 0.15)
    # Every other step is twice as long. Where the number of fractions is odd, the
    # errors of `v` alternate in sign, and no longer cancel.
    order_y, order_v = orders(0.3, 0.15)
    odd = len(_fractions(solver)) % 2 == 1
    assert order_y > order - 0.15
    assert order_v > (order - 1 if odd else order) - 0.15


def _fractions(solver):
    return (1.0,) if isinstance(solver, ALF) else solver.composition.fractions
