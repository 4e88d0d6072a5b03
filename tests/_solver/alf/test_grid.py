import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from diffrax_reversible import (
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleYoshida4,
)

from ...helpers import tree_difference


_propose_grid = ReversibleALF4.propose_grid


def _field(dtype):
    """A rotation, whose speed and direction an MLP varies: it neither contracts nor
    grows much."""
    mlp = eqx.nn.MLP(4, 4, 16, 1, activation=jnp.tanh, key=jr.PRNGKey(0), dtype=dtype)

    def field(t, y, args):
        x = jnp.concatenate([y["a"], y["b"]])
        push = mlp(x) * jnp.cos(t) if args is None else args(x) * jnp.cos(t)
        return {"a": -y["b"] + 0.3 * push[:2], "b": y["a"] + 0.3 * push[2:]}

    return diffrax.ODETerm(field), mlp


def _equal(x, y):
    return all(
        bool(jnp.all(a == b)) for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y))
    )


@pytest.mark.parametrize(
    "solver, dtype",
    (
        (ReversibleALF2, jnp.float32),
        pytest.param(ReversibleALF4, jnp.float64, marks=pytest.mark.slow),
        *(
            pytest.param(solver, dtype, marks=pytest.mark.slow)
            for solver in (ReversibleALF6, ReversibleYoshida4)
            for dtype in (jnp.float32, jnp.float64)
        ),
    ),
)
def test_every_bit_is_recovered(solver, dtype):
    steps, h = 20_000, dtype(0.001)
    term, _ = _field(dtype)
    y0 = {"a": jr.normal(jr.PRNGKey(1), (2,), dtype), "b": jnp.ones(2, dtype)}

    @eqx.filter_jit
    def there_and_back(solver, y0):
        def forward(i, carry):
            y, v = carry
            t = i * h
            y, _, _, v, _ = solver.step(term, t, t + h, y, None, v, False)
            return y, v

        def backward(i, carry):
            y, v = carry
            t = (steps - 1 - i) * h
            y, _, v, _ = solver.backward_step(term, t, t + h, y, None, (t,), v, False)
            return y, v

        v0 = solver.init(term, dtype(0), h, y0, None)
        middle = lax.fori_loop(0, steps, forward, (y0, v0))
        return v0, middle, lax.fori_loop(0, steps, backward, middle)

    grid = _propose_grid(32.0, dtype)
    y0 = jtu.tree_map(lambda x: jnp.round(x / grid) * grid, y0)
    v0, middle, end = there_and_back(solver(grid=grid), y0)
    assert not _equal(middle, (y0, v0))
    assert _equal(end, (y0, v0))

    v0, _, end = there_and_back(solver(), y0)
    assert not _equal(end, (y0, v0))


@pytest.mark.parametrize(
    "dtype, grid",
    (
        pytest.param(jnp.float32, 2.0**-18, marks=pytest.mark.slow),
        pytest.param(jnp.float64, 2.0**-40, marks=pytest.mark.slow),
    ),
)
def test_gradient_of_the_rounded_path(dtype, grid):
    term, mlp = _field(dtype)
    params, static = eqx.partition(mlp, eqx.is_array)
    y0 = {"a": jr.normal(jr.PRNGKey(1), (2,), dtype), "b": jnp.ones(2, dtype)}

    @eqx.filter_jit
    def gradient(adjoint):
        def loss(y0, params):
            solution = diffrax.diffeqsolve(
                term,
                ReversibleALF4(grid=grid),
                dtype(0),
                dtype(2),
                None,
                y0,
                eqx.combine(params, static),
                stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
                saveat=diffrax.SaveAt(ts=jnp.array([0.0, 0.3, 1.1, 2.0], dtype)),
                adjoint=adjoint,
                max_steps=64,
            )
            return sum(jnp.sum(jnp.sin(x)) for x in jtu.tree_leaves(solution.ys))

        return jax.value_and_grad(loss, (0, 1))(y0, params)

    ours = gradient(ReversibleAdjoint())
    reference = gradient(diffrax.RecursiveCheckpointAdjoint())
    assert tree_difference(ours[0], reference[0]) < 10 * float(jnp.finfo(dtype).eps)
    assert tree_difference(ours[1], reference[1]) < 50 * float(jnp.finfo(dtype).eps)


def test_the_grid_is_used():
    term, _ = _field(jnp.float64)
    y0 = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([0.5, 0.6])}
    solution = diffrax.diffeqsolve(
        term,
        ReversibleALF2(grid=2.0**-10),
        0.0,
        1.0,
        0.1,
        y0,
        saveat=diffrax.SaveAt(steps=True, solver_state=True),
        max_steps=16,
    )
    for x in jtu.tree_leaves((solution.ys, solution.solver_state)):
        x = jnp.where(jnp.isfinite(x), x, 0) * 2**10
        assert jnp.all(x == jnp.round(x))


def test_complex():
    term = diffrax.ODETerm(lambda t, y, args: 1j * y * jnp.abs(y).astype(y.dtype))
    solver, grid = ReversibleALF4(grid=2.0**-40), 2.0**-40
    y0 = jnp.round(jnp.array([0.3 + 0.1j, 1.0]) / grid) * grid
    v0 = solver.init(term, 0.0, 0.1, y0, None)
    y1, _, _, v1, _ = solver.step(term, 0.0, 0.1, y0, None, v0, False)
    y, _, v, _ = solver.backward_step(term, 0.0, 0.1, y1, None, (0.0,), v1, False)
    assert _equal((y, v), (y0, v0))
    assert not _equal(y1, y0)


def test_leaving_the_range():
    term = diffrax.ODETerm(lambda t, y, args: y)

    def solve(grid, t1):
        return diffrax.diffeqsolve(
            term,
            ReversibleALF4(grid=grid),
            0.0,
            t1,
            0.1,
            jnp.array([1.0, -0.5]),
            adjoint=ReversibleAdjoint(),
            max_steps=128,
        )

    solve(2.0**-50, 1.0)
    with pytest.raises(Exception, match=r"propose_grid\(bound, dtype\)"):
        solve(2.0**-50, 10.0)


def test_propose_grid():
    assert _propose_grid(1.0, jnp.float32) == 2.0**-23
    assert _propose_grid(1.0) == 2.0**-52
    assert _propose_grid(3.0, jnp.float64) == 2.0**-50
    assert _propose_grid(0.3, jnp.float16) == 2.0**-11
    for bound in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive bound"):
            _propose_grid(bound)


@pytest.mark.parametrize("grid", (0.0, -0.5, 0.3, 1e-6, float("inf"), float("nan")))
def test_not_a_power_of_two(grid):
    with pytest.raises(ValueError, match=r"`ReversibleALF4\(grid=.*power of two"):
        ReversibleALF4(grid=grid)
