"""Gradients by differentiating a solve that is unrolled in Python: an own loop over an own
copy of nothing but `solver.step`, the step-size controller and the interpolation, each
compiled by itself. It has nothing in common with any adjoint method, and a second test of
the same problem compiles nothing.

It follows what `diffrax.diffeqsolve` does, in the time of the solve: both directions of
time are the same program."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np


# Compiling is what the tests spend their time on.
jit = ft.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


class Problem(NamedTuple):
    """What is solved, as functions of the parameters: hashed, so that equal problems are
    compiled once.

    - `terms`: `terms(p)`.
    - `solver`: the solver or, if it holds parameters, a function that makes it of `p`.
    """

    terms: Callable
    solver: Any

    def make(self, p, direction):
        solver = self.solver
        if not isinstance(solver, diffrax.AbstractSolver):
            solver = solver(p)
        is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
        directed = jtu.tree_map(
            lambda term: _Directed(term, direction),
            self.terms(p),
            is_leaf=lambda x: is_term(x) and not isinstance(x, diffrax.MultiTerm),
        )
        return directed, solver


class _Directed(diffrax.AbstractTerm):
    """In the time of the solve, which is minus that of the user if `t1 < t0`."""

    term: diffrax.AbstractTerm
    direction: jax.Array

    def vf(self, t, y, args):
        return self.term.vf(self.direction * t, y, args)

    def contr(self, t0, t1, **kwargs):
        forward = self.direction > 0
        t0, t1 = jnp.where(forward, t0, -t1), jnp.where(forward, t1, -t0)
        turn = lambda c: self.direction.astype(jnp.result_type(c)) * c
        return jtu.tree_map(turn, self.term.contr(t0, t1, **kwargs))

    def prod(self, vf, control):
        return self.term.prod(vf, control)

    def vf_prod(self, t, y, args, control):
        return self.term.vf_prod(self.direction * t, y, args, control)

    def is_vf_expensive(self, t0, t1, y, args):
        return self.term.is_vf_expensive(t0, t1, y, args)


def _differentiable(num_static):
    """Compiles a function and its vector-Jacobian product, each as a program of its own,
    which `jax.jit` by itself does not do for `jax.grad` with compiler options. Only with
    respect to what is differentiated: not every function can be in all its arguments."""
    static = tuple(range(num_static))

    def decorate(fn):
        compiled = jit(fn, static_argnums=static)

        @ft.partial(jit, static_argnums=(*static, num_static))
        def pull_back(*arguments):
            static, perturbed = arguments[:num_static], arguments[num_static]
            *arguments, cotangent = arguments[num_static + 1 :]
            leaves, structure = jtu.tree_flatten(arguments)
            variables = [x for x, flag in zip(leaves, perturbed) if flag]

            def floats(variables):
                new = iter(variables)
                both = zip(leaves, perturbed)
                inputs = [next(new) if flag else x for x, flag in both]
                out = fn(*static, *jtu.tree_unflatten(structure, inputs))
                return eqx.filter(out, eqx.is_inexact_array)

            _, vjp = jax.vjp(floats, variables)
            found = iter(vjp(cotangent)[0])
            cotangents = [next(found) if flag else None for flag in perturbed]
            return tuple(jtu.tree_unflatten(structure, cotangents))

        def forward(*arguments):
            static, arguments = arguments[:num_static], arguments[num_static:]
            is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            perturbed = jtu.tree_leaves(
                jtu.tree_map(lambda x: x.perturbed and is_float(x.value), arguments)
            )
            arguments = jtu.tree_map(lambda x: x.value, arguments)
            return compiled(*static, *arguments), (arguments, perturbed)

        def backward(*arguments):
            *static, (arguments, perturbed), cotangent = arguments
            zeros = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype)
            is_zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)
            is_float = lambda x: x.dtype != jax.dtypes.float0
            cotangent = jtu.tree_map(
                lambda x: (zeros(x) if is_zero(x) else x) if is_float(x) else None,
                cotangent,
                is_leaf=is_zero,
            )
            flags = tuple(map(bool, perturbed))
            return pull_back(*static, flags, *arguments, cotangent)

        run = jax.custom_vjp(compiled, nondiff_argnums=static)
        run.defvjp(forward, backward, symbolic_zeros=True)
        return run

    return decorate


@_differentiable(1)
def _init(problem, p, direction, t0, t1, y0, args):
    terms, solver = problem.make(p, direction)
    return solver.init(terms, t0, t1, y0, args)


@_differentiable(2)
def _step(problem, made_jump, p, direction, t0, t1, y, args, solver_state):
    terms, solver = problem.make(p, direction)
    *out, _ = solver.step(terms, t0, t1, y, args, solver_state, made_jump)
    return out


@_differentiable(2)
def _inside(problem, method, p, direction, t0, t1, dense_info, t):
    _, solver = problem.make(p, direction)
    interpolation = solver.interpolation_cls(t0=t0, t1=t1, **dense_info)
    return getattr(interpolation, method)(t)


@eqx.filter_jit
def _adapt(controller, *args):
    return controller.adapt_step_size(*args)


class _Step(NamedTuple):
    t0: Any
    t1: Any
    dense_info: Any


class Unrolled(NamedTuple):
    """As a `diffrax.Solution`. `made_jump`: before each of the `steps`."""

    t0: Any
    t1: Any
    ts: Any
    ys: Any
    solver_state: Any
    steps: list[_Step]
    made_jump: list[bool]
    num_steps: int
    inside: Callable
    direction: Any

    @property
    def interpolation(self):
        return self if self.steps else None

    def _at(self, method, t):
        t = self.direction * t
        ends = [float(lax.stop_gradient(step.t1)) for step in self.steps]
        index = min(np.searchsorted(ends, lax.stop_gradient(t)), len(ends) - 1)
        return self.inside(method, self.steps[index], t)

    def evaluate(self, t):
        return self._at("evaluate", t)

    def derivative(self, t):
        out = self._at("derivative", t)
        return jtu.tree_map(lambda x: self.direction.astype(x.dtype) * x, out)


class _Saves:
    """What is saved for one `SubSaveAt`."""

    def __init__(self, sub, direction, args, max_steps):
        self.sub, self.direction, self.args = sub, direction, args
        self.ts = [] if sub.ts is None else list(direction * sub.ts)
        steps = 0 if sub.steps == 0 else max_steps // sub.steps
        end = sub.t1 and (sub.steps == 0 or max_steps % sub.steps != 0)
        self.size = sub.t0 + len(self.ts) + steps + end
        self.saved = []

    def save(self, t, y):
        t = self.direction * t
        self.saved.append((t, self.sub.fn(t, y, self.args)))

    def inside(self, t1, evaluate):
        while self.ts and self.ts[0] <= t1:
            t = self.ts.pop(0)
            self.save(t, evaluate(t))

    def result(self, struct):
        missing = self.size - len(self.saved)

        def stack(like, *leaves):
            rest = jnp.full((missing, *like.shape), jnp.inf, like.dtype)
            return jnp.concatenate([jnp.stack(leaves), rest]) if leaves else rest

        ts = [t for t, _ in self.saved]
        ys = [y for _, y in self.saved]
        # What is not saved is infinite, in the direction of time.
        unsaved = self.direction * jnp.full(missing, jnp.inf, self.direction.dtype)
        ts = jnp.concatenate([jnp.stack(ts), unsaved]) if ts else unsaved
        return ts, jtu.tree_map(stack, struct, *ys)


def _move(t, s0, s1):
    """A node that keeps its place between `s0` and `s1` when these move."""
    t, v0, v1 = lax.stop_gradient((t, s0, s1))
    if v0 == v1 or not np.isfinite(v1):
        return t + (s0 - v0)
    place = (t - v0) / (v1 - v0)
    return t + (1 - place) * (s0 - v0) + place * (s1 - v1)


def unrolled(
    problem,
    p,
    t0,
    t1,
    dt0,
    y0,
    args,
    *,
    saveat=diffrax.SaveAt(t1=True),
    stepsize_controller=diffrax.ConstantStepSize(),
    max_steps=4096,
    solver_state=None,
    made_jump=False,
):
    """As `diffrax.diffeqsolve`, to be differentiated by `jax.grad` outside of `jax.jit`
    with respect to `p`, `y0`, `args` and times."""
    fixed = lax.stop_gradient
    given_steps = isinstance(stepsize_controller, diffrax.ConstantStepSize)
    # `ConstantStepSize` is differentiated as it is. All other nodes keep their places.
    seen = (lambda x: x) if given_steps else fixed
    y0 = jtu.tree_map(jnp.asarray, y0)
    saves = [x.ts for x in jtu.tree_leaves(saveat.subs, is_leaf=_is_sub)]
    given = [jnp.asarray(x) for x in (t0, t1, dt0, *saves) if x is not None]
    dtype = jnp.result_type(*given)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    time = lambda t: None if t is None else jnp.asarray(t, dtype)
    direction = time(1.0 if fixed(time(t0)) < fixed(time(t1)) else -1.0)
    s0, s1 = direction * time(t0), direction * time(t1)
    ds = None if dt0 is None else direction * time(dt0)
    floor = np.asarray(fixed(s1))
    for _ in range(100):
        floor = np.nextafter(floor, floor.dtype.type(-np.inf))

    terms, solver = problem.make(fixed(p), direction)
    controller = stepsize_controller.wrap(int(direction))
    order = solver.error_order(terms)
    start = seen((s0, s1)), *fixed((y0, args))
    (c0, c1), *start = start
    tnext, controller_state = controller.init(
        terms, c0, c1, start[0], seen(ds), start[1], solver.func, order
    )
    move = (lambda t: t) if given_steps else lambda t: _move(t, s0, s1)
    tprev, tnext = c0, tnext if tnext < c1 else c1

    def inside(method, step, t):
        return _inside(problem, method, p, direction, *step, t)

    subs, structure = jtu.tree_flatten(saveat.subs, is_leaf=_is_sub)
    saves = [_Saves(sub, direction, args, max_steps) for sub in subs]
    structs = [eqx.filter_eval_shape(sub.fn, fixed(s0), y0, args) for sub in subs]
    for save in saves:
        if save.sub.t0:
            save.save(s0, y0)
    y = y0
    if solver_state is None:
        solver_state = _init(problem, p, direction, s0, move(tnext), y0, args)
    steps, jumps, num_steps = [], [], 0
    while tprev < c1 and num_steps < max_steps:
        made_jump = bool(made_jump)
        at = (s0 if not steps else move(tprev)), move(tnext)
        state = (y, args, solver_state)
        new, error, dense_info, new_state = _step(
            problem, made_jump, p, direction, *at, *state
        )
        error = jtu.tree_map(lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), error)
        keep, next_tprev, next_tnext, next_jump, controller_state, _ = _adapt(
            controller,
            *(tprev, tnext),
            *fixed((y, new, args, error)),
            order,
            controller_state,
        )
        num_steps += 1
        if keep:
            y, solver_state = new, new_state
            steps.append(_Step(*at, dense_info))
            jumps.append(made_jump)
            made_jump = next_jump
            # Where it ends, which is not where the next one starts if there is a jump.
            after = next_tprev if next_tprev < c1 else c1
            for save in saves:
                save.inside(tnext, lambda t: inside("evaluate", steps[-1], t))
                if save.sub.steps and len(steps) % save.sub.steps == 0:
                    save.save(s1 if after == c1 else move(after), y)
        tprev = next_tprev if next_tprev < c1 else c1
        if next_tnext > floor:
            next_tnext = c1 if keep else tprev + 0.5 * (c1 - tprev)
        tnext = next_tnext
    for save in saves:
        if fixed(s0) == fixed(s1):
            save.inside(np.inf, lambda t: y0)
        by_steps = save.sub.steps and len(steps) % save.sub.steps == 0
        if save.sub.t1 and not by_steps:
            save.save(s1 if tprev == c1 else move(tprev), y)
    results = [save.result(struct) for save, struct in zip(saves, structs)]
    return Unrolled(
        t0=t0,
        t1=t1,
        ts=jtu.tree_unflatten(structure, [ts for ts, _ in results]),
        ys=jtu.tree_unflatten(structure, [ys for _, ys in results]),
        solver_state=solver_state if saveat.solver_state else None,
        steps=steps if saveat.dense else [],
        made_jump=jumps,
        num_steps=num_steps,
        inside=inside,
        direction=direction,
    )


def _is_sub(x):
    return isinstance(x, diffrax.SubSaveAt)
