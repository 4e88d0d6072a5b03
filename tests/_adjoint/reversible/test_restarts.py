"""Solvers that restart where the flow contracts: their solutions, their gradients, and
what is said where there is no room, or where they must not restart."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from diffrax_reversible import (
    ALF,
    EES25,
    EES27,
    Reversible,
    ReversibleAdjoint,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
)
from diffrax_reversible._adjoint.discrete.checkpoints import Checkpoints

from ..._reversal.third_party import OnlyBackwardStep
from ...helpers import jit, tree_difference
from ...measure import Counter, temp_memory


_slow = pytest.mark.slow


def _van_der_pol(t, y, mu):
    force = 0.5 * jnp.cos(1.1 * t)
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0] + force])


def _relaxation(t, y, a):
    forced = a * (y - jnp.cos(t * jnp.arange(1, 4, dtype=y.dtype)))
    return 0.3 * jnp.sin(y[::-1]) - forced


def _friction(t, y, a):
    return jnp.stack([y[1], -jnp.sin(y[0]) - 2 * a * y[1]])


def _logistic(t, y, a):
    return a * y * (1 - y)


def _network(t, y, a):
    w0, w1 = (0.4 * jr.normal(jr.PRNGKey(0), (2, 4, 4))).astype(y.dtype)
    return -y + a * jnp.tanh(w0 @ jnp.tanh(w1 @ y))


# The vector field, its parameter, the start and the end.
_FRICTION = (_friction, 0.5, [1.0, 0.5], 40.0)
_VAN_DER_POL = (_van_der_pol, 5.0, [1.0, 0.0], 40.0)
_RELAXATION = (_relaxation, 1.0, [0.3, 0.2, 0.1], 40.0)
_PROBLEMS = (
    pytest.param(_FRICTION, id="friction", marks=_slow),
    pytest.param((_van_der_pol, 1.0, [1.0, 0.0], 40.0), id="vdP1", marks=_slow),
    pytest.param(_VAN_DER_POL, id="vdP5"),
    pytest.param(_RELAXATION, id="relaxation1", marks=_slow),
    pytest.param((_relaxation, 5.0, [0.3, 0.2, 0.1], 20.0), id="relaxation5"),
)
_TEXTBOOK = (
    pytest.param((_logistic, 1.0, [0.1], 15.0), id="logistic"),
    pytest.param((_friction, 0.25, [1.0, 0.5], 30.0), id="friction", marks=_slow),
    pytest.param((_network, 1.0, [1.0, -0.5, 0.3, 0.8], 30.0), id="network"),
)


def _solve(problem, solver, rtol, y0, a, adjoint, dtype=jnp.float64, **options):
    field, _, _, t1 = problem
    controller = diffrax.PIDController(rtol, rtol, pcoeff=0.3, icoeff=0.4)
    options = dict(stepsize_controller=controller, max_steps=20000) | options
    times = (jnp.zeros((), dtype), jnp.asarray(t1, dtype), options.pop("dt0", None))
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), solver, *times, y0, a, adjoint=adjoint, **options
    )


def _inputs(problem, dtype=jnp.float64):
    _, a, y0, _ = problem
    return jnp.asarray(y0, dtype), jnp.asarray(a, dtype)


class _Restarts(diffrax.AbstractAdaptiveSolver):
    """A solver that counts its restarts; or one that restarts after every step."""

    solver: diffrax.AbstractSolver
    always: bool = False
    term_structure = diffrax.AbstractTerm

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    def order(self, terms):
        return self.solver.order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args), jnp.array(0)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        solver_state, count = solver_state
        due = solver_state.due | self.always
        solver_state = eqx.tree_at(lambda s: s.due, solver_state, due)
        y1, error, dense_info, new, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y1, error, dense_info, (new, count + jnp.where(due, 1, 0)), result


@pytest.mark.parametrize(
    "rtol", (pytest.param(1e-3, marks=_slow), 1e-6, pytest.param(1e-9, marks=_slow))
)
@pytest.mark.parametrize("problem", _PROBLEMS)
@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(ReversibleALF4(), id="ALF4"),
        pytest.param(ReversibleALF6(), id="ALF6", marks=_slow),
        pytest.param(Reversible(diffrax.Tsit5()), id="Tsit5 coupled", marks=_slow),
    ),
)
def test_contraction(solver, problem, rtol):
    """As many steps as with a restart after every step, and few restarts."""

    def run(solver):
        y0, a = _inputs(problem)
        saveat = diffrax.SaveAt(t1=True, solver_state=True)
        adjoint = diffrax.ForwardMode()
        f = lambda: _solve(problem, solver, rtol, y0, a, adjoint, saveat=saveat)
        solution = jit(f)()
        return solution.stats["num_steps"], solution.solver_state[1]

    (steps, restarts), (most, _) = run(_Restarts(solver)), run(_Restarts(solver, True))
    print(f"{steps} steps with {restarts} restarts; if after every step, {most} steps")
    assert steps <= 1.1 * most
    if isinstance(solver, ReversibleALF4) and rtol == 1e-6:
        assert restarts < min(80, steps / 10)


def _gradients(problem, solver, rtol, adjoints, dtype=jnp.float64, **options):
    def loss(y0, a, adjoint):
        _, _, _, t1 = problem
        saveat = diffrax.SaveAt(ts=jnp.linspace(1.0, t1, 5, dtype=dtype))
        options_ = dict(saveat=saveat) | options
        solution = _solve(problem, solver, rtol, y0, a, adjoint, dtype, **options_)
        return jnp.sum(jnp.sin(solution.ys))

    grad = lambda adjoint: jit(lambda *x: jax.grad(loss, (0, 1))(*x, adjoint))
    return [grad(adjoint)(*_inputs(problem, dtype)) for adjoint in adjoints]


@pytest.mark.parametrize("problem", _PROBLEMS)
@pytest.mark.parametrize(
    "solver, rtol, slots",
    (
        pytest.param(ReversibleALF4(), 1e-3, 64, id="ALF4"),
        pytest.param(ReversibleALF6(), 1e-3, 128, id="ALF6", marks=_slow),
        pytest.param(ReversibleALF2(), 1e-2, 128, id="ALF2", marks=_slow),
        pytest.param(ALF(), 1e-2, 256, id="MALI", marks=_slow),
        pytest.param(ReversibleALF8(), 1e-6, 128, id="ALF8", marks=_slow),
        pytest.param(Reversible(diffrax.Tsit5()), 1e-3, 256, id="Tsit5", marks=_slow),
    ),
)
def test_gradient(solver, problem, rtol, slots):
    """Exact, also where hardly anything of the start is left."""
    adjoints = (
        ReversibleAdjoint(checkpoints=slots),
        diffrax.RecursiveCheckpointAdjoint(checkpoints=4096),
    )
    found, true = _gradients(problem, solver, rtol, adjoints, max_steps=4096)
    difference = tree_difference(found, true)
    print(f"relative difference {difference:.1e}")
    assert difference < 1e-9


@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(ReversibleALF2(restart=1e-6), id="ALF2", marks=_slow),
        pytest.param(ReversibleALF4(restart=1e-6), id="ALF4"),
        pytest.param(ALF(restart=1e-6), id="MALI", marks=_slow),
        pytest.param(
            Reversible(diffrax.Heun(), restart=1e-6), id="Heun coupled", marks=_slow
        ),
    ),
)
def test_transforms(solver):
    """Solves that restart in different steps, in every order of `vmap` and derivatives."""
    term = diffrax.ODETerm(lambda t, y, a: -a * y + jnp.tanh(y[::-1]) + jnp.cos(t))

    def loss(y0, a, t1, adjoint):
        controller = diffrax.PIDController(1e-3, 1e-3, pcoeff=0.3, icoeff=0.4)
        solution = diffrax.diffeqsolve(
            *(term, solver, 0.0, t1, None, y0, a),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=256,
            saveat=diffrax.SaveAt(ts=jnp.array([0.5, 1.0]), t1=True, dense=True),
        )
        return jnp.sum(jnp.sin(solution.ys)) + jnp.sum(solution.evaluate(0.3))

    x = (jr.normal(jr.PRNGKey(0), (4, 2)), jnp.array(1.3))
    ends, axes = jnp.linspace(1.0, 2.5, 4), (0, None, 0)

    def results(adjoint):
        f = lambda *x: loss(*x, adjoint)
        batch = lambda *x: jnp.sum(jax.vmap(f, axes)(*x, ends))
        grads = jax.vmap(jax.grad(f, (0, 1)), axes)
        tangents = jax.tree.map(jnp.cos, x)

        def both(*x):
            return jax.jvp(jax.grad(batch, (0, 1)), x, tangents), grads(*x, ends)

        return jit(both)(*x)

    ours, direct = ReversibleAdjoint(checkpoints=128), diffrax.DirectAdjoint()
    assert tree_difference(results(ours), results(direct)) < 1e-10


@pytest.mark.parametrize("dtype", (jnp.float32, pytest.param(jnp.float64, marks=_slow)))
@pytest.mark.parametrize("problem", _TEXTBOOK)
@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(ReversibleALF4(), id="ALF4"),
        pytest.param(ReversibleALF2(), id="ALF2", marks=_slow),
        pytest.param(ReversibleALF6(), id="ALF6", marks=_slow),
        pytest.param(ReversibleALF8(), id="ALF8", marks=_slow),
        pytest.param(ALF(), id="MALI", marks=_slow),
        pytest.param(Reversible(diffrax.Tsit5()), id="Tsit5 coupled"),
        pytest.param(Reversible(diffrax.Heun()), id="Heun coupled", marks=_slow),
        pytest.param(diffrax.ReversibleHeun(), id="ReversibleHeun", marks=_slow),
        pytest.param(EES25(), id="EES25", marks=_slow),
        pytest.param(EES27(), id="EES27", marks=_slow),
        pytest.param(ReversibleALF4(restart=None), id="ALF4 without", marks=_slow),
    ),
)
def test_textbook_problems(solver, problem, dtype):
    """At default arguments: the right value and gradient, or an error."""
    inputs = _inputs(problem, dtype)

    def loss(y0, a, solver, rtol, adjoint, dtype, **options):
        saveat = diffrax.SaveAt(t1=True, ts=jnp.linspace(0.5, 10, 4).astype(dtype))
        solution = _solve(
            problem, solver, rtol, y0, a, adjoint, dtype, saveat=saveat, **options
        )
        return jnp.sum(jnp.sin(solution.ys))

    value_and_grad = jax.value_and_grad(loss, (0, 1))
    run = lambda *options, **kwargs: jit(
        lambda *x: value_and_grad(*x, *options, **kwargs)
    )
    forward = diffrax.RecursiveCheckpointAdjoint()
    true = run(diffrax.Dopri8(), 1e-10, forward, jnp.float64)(*_inputs(problem))
    try:
        found = run(solver, 1e-3, ReversibleAdjoint(), dtype)(*inputs)
        found = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), found)
    except Exception as error:
        message = str(error)
        if isinstance(solver, diffrax.ReversibleHeun) and "`max_steps`" in message:
            print("too many steps")
            return
        reasons = ("has lost", "is wrong", "restarted", "`max_steps` was reached")
        assert any(words in message for words in reasons)
        assert "solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()" in message
        print("refused")
        return
    value, grad = map(tree_difference, found, true)
    print(f"value {value:.1e}, gradient {grad:.1e}")
    # Of which the error of the solve is the larger part.
    assert value < 2e-2
    assert grad < 5e-2


def test_inside_of_another_solver():
    """Which steps back by `backward_step`, and knows of no restarts."""
    solver = OnlyBackwardStep(Reversible(diffrax.Heun()))
    with pytest.raises(NotImplementedError, match="restart=None"):
        _gradients(_FRICTION, solver, 1e-3, [ReversibleAdjoint()])


@pytest.mark.slow
def test_continued_solve():
    """From a state in which a restart is due."""
    term = diffrax.ODETerm(lambda t, y, a: jnp.sin(a * y + t))
    solver = ReversibleALF4(restart=1e-9)

    def loss(y0, a, adjoint):
        solve = lambda t0, t1, y0, **options: diffrax.diffeqsolve(
            *(term, solver, t0, t1, 0.1, y0, a),
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            adjoint=adjoint,
            **options,
        )
        first = solve(0.0, 0.5, y0)
        state = first.solver_state
        second = solve(0.5, 1.1, first.ys[-1], solver_state=state)
        return jnp.sum(second.ys) + jnp.sum(second.solver_state.copy), state.due

    grad = jax.grad(loss, (0, 1), has_aux=True)
    x = (jnp.array([0.2, -0.4]), jnp.array(1.3))
    found, due = jit(lambda *x: grad(*x, ReversibleAdjoint()))(*x)
    true, _ = jit(lambda *x: grad(*x, diffrax.DirectAdjoint()))(*x)
    assert due
    assert tree_difference(found, true) < 1e-13


def test_no_room():
    """The error says how much room it takes, and with that room there is none."""
    options = dict(dtype=jnp.float32, max_steps=1024)
    true, *_ = _gradients(
        _VAN_DER_POL,
        ReversibleALF4(),
        1e-3,
        [diffrax.RecursiveCheckpointAdjoint(checkpoints=1024)],
        **options,
    )
    run = lambda slots: _gradients(
        *(_VAN_DER_POL, ReversibleALF4(), 1e-3),
        [ReversibleAdjoint(checkpoints=slots)],
        **options,
    )
    with pytest.raises(Exception, match=r"restarted \d+ times") as error:
        run(None)
    _, _, text = str(error.value).rpartition("Use `ReversibleAdjoint(checkpoints=")
    number = int(text.partition(")")[0])
    assert 32 < number < 80
    (found,) = run(number)
    assert tree_difference(found, true) < 1e-3


@pytest.mark.parametrize(
    "solver",
    (
        pytest.param(Reversible(diffrax.Tsit5(), restart=None), id="Tsit5 coupled"),
        pytest.param(Reversible(diffrax.Euler()), id="Euler coupled", marks=_slow),
        pytest.param(diffrax.ReversibleHeun(), id="ReversibleHeun", marks=_slow),
        pytest.param(diffrax.LeapfrogMidpoint(), id="LeapfrogMidpoint", marks=_slow),
        pytest.param(ReversibleALF4(restart=None), id="ALF4", marks=_slow),
    ),
)
def test_wrong_solution(solver):
    """Constant steps: no error estimate keeps them from a wrong solution."""
    options = dict(
        stepsize_controller=diffrax.ConstantStepSize(), dt0=0.05, max_steps=1024
    )
    run = lambda adjoint: _gradients(*(_RELAXATION, solver, 1e-3), [adjoint], **options)
    with pytest.raises(Exception, match="is wrong, and not only its gradient"):
        run(ReversibleAdjoint())
    (grads,) = run(ReversibleAdjoint(on_failure="nan"))
    assert all(bool(jnp.all(jnp.isnan(x))) for x in jax.tree.leaves(grads))


def test_max_steps():
    """Not more steps are what it takes."""
    y0, a = _inputs(_RELAXATION)
    solver = ReversibleALF4(restart=None)
    run = lambda throw: _solve(
        *(_RELAXATION, solver, 1e-3, y0, a, ReversibleAdjoint()),
        max_steps=1000,
        throw=throw,
    )
    with pytest.raises(Exception, match="without `restart=None`"):
        run(True)
    assert run(False).result == diffrax.RESULTS.max_steps_reached


@pytest.mark.parametrize("batch", (False, True))
def test_evaluations(batch):
    """Five a step, and one for each restart; in a batch, for each step in which anything
    restarts."""
    steps = 12
    for restart, expected in ((None, 0), (1e-6, steps - 1)):
        solver, counter = ReversibleALF4(restart=restart), Counter()
        field = counter.field()

        def f(y0):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                *(0.0, 1.2, 0.1, y0, 1.0),
                adjoint=ReversibleAdjoint(),
                max_steps=steps + 1,
            ).ys

        y0 = jnp.ones((1, 2) if batch else 2)
        f = jax.vmap(f) if batch else f
        jax.block_until_ready(jit(f)(y0))
        jax.effects_barrier()
        forward = counter.evaluations
        print(forward, 5 * steps + 1 + expected)
        assert forward == 5 * steps + 1 + expected
        jax.block_until_ready(jit(jax.grad(lambda y0: jnp.sum(f(y0))))(y0))
        jax.effects_barrier()
        # Every update is evaluated again where it is pulled back.
        backward = counter.evaluations - 2 * forward
        assert backward == 5 * steps + expected


@pytest.mark.parametrize("slots", (1, 3, 8))
def test_restarts_come_first(slots):
    """All of them are kept while there is room, and the rest is spread over the solve."""

    def keep(checkpoints, number):
        is_restart = (number == 5) | (number == 6) | (number == 40)
        new = checkpoints.keep(number, jnp.asarray(number, float), True, is_restart)
        return new, None

    start = Checkpoints.empty(slots, jnp.array(0.0))
    kept, _ = jax.lax.scan(keep, start, jnp.arange(1, 101))
    numbers = kept.numbers.tolist()
    assert kept.restarts == 3
    assert set([5, 6, 40][:slots]) <= set(numbers)
    for number in range(1, 101):
        is_restart = bool(kept.is_before_restart(number))
        assert is_restart == (number in [5, 6, 40][:slots])
    if slots == 8:
        assert len(set(numbers) - {5, 6, 40, 0}) == 5


def test_memory():
    """Goes with what the flow forgets, and not with the steps; and is less than that of
    diffrax's default."""

    def temp_bytes(rtol, adjoint):
        def loss(y0, a):
            controller = diffrax.PIDController(rtol, rtol)
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, a: -a * (y - jnp.cos(t))),
                *(ReversibleALF4(), 0.0, 40.0, None, y0, a),
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=4096,
            )
            return jnp.sum(solution.ys**2)

        grad = jax.grad(loss, (0, 1))
        x = (jnp.ones(1000), jnp.array(1.0))
        jax.block_until_ready(jit(grad)(*x))
        return temp_memory(grad, *x)

    record = 4096 * 2 * 8
    ours = temp_bytes(1e-3, ReversibleAdjoint()) - record
    again = temp_bytes(1e-4, ReversibleAdjoint()) - record
    theirs = temp_bytes(1e-3, diffrax.RecursiveCheckpointAdjoint())
    print(f"temp memory: {ours} bytes, {again} at a smaller tolerance; {theirs}")
    assert ours == again < theirs
