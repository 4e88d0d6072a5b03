"""Exact gradients of a reversible solve, without storing it."""

import equinox as eqx
from diffrax import LeapfrogMidpoint

from ..._autodiff.report import Action, check_action, OnFailure
from ..._checks import check_integer
from ..._reversal.registry import reversal_of
from ..._reversal.sde import refuse_sde
from ..discrete.adjoint import AbstractDiscreteAdjoint
from .monitor import Monitor
from .sweep import ReversibleSweep


class ReversibleAdjoint(AbstractDiscreteAdjoint):
    """Exact gradients at constant memory, for reversible solvers. Differentiates the
    numerical solution itself ("discretise-then-optimise"), as
    [`diffrax.RecursiveCheckpointAdjoint`][] does, and gives the same gradients up to
    rounding; but instead of storing the solve, or checkpoints of it, it undoes the
    steps one by one, and differentiates each at the state that it has found.

    Use it with a reversible solver, for example

    ```python
    diffrax.diffeqsolve(
        ..., solver=ReversibleALF4(), adjoint=ReversibleAdjoint()
    )
    ```

    whenever the memory or the time of a gradient matters. Everything else stays as it
    was: `SaveAt` in all its forms, constant and adaptive steps, events, jumps of the
    vector field, `t1 < t0`, `throw=False`.

    Differentiated are `y0`, `args`, `terms`, what the vector field and `SaveAt(fn=...)`
    close over, arrays of the solver, a `solver_state` that was passed in, and times:
    `t0`, `t1`, `SaveAt(ts=...)`, and `dt0` where steps are constant. When `t0` or `t1`
    moves, adaptive steps are held at their places relative to the two.

    A flow that contracts by `exp(-a T)` forgets its past, and nothing can undo it without
    being told. So the solvers of this package restart now and then where the flow
    contracts, [`diffrax_reversible.ReversibleALF4`][] 0.1 to 0.4 times per unit of `a T`
    and a coupled solver about once; and the state before each restart is kept, from which
    the sweep goes on. If there are more restarts than room for them, the error says how
    much it takes. What room is left goes to states in between, which cut the loss of
    digits in the same way.

    Besides, the sweep compares the states that it finds with those that it should have
    found, and raises if the gradient could be wrong. It raises as well if the two copies
    of the solution that a reversible solver carries have drifted apart so far that the
    solution itself is wrong: with `restart=None`, with [`diffrax.ReversibleHeun`][],
    [`diffrax.LeapfrogMidpoint`][], and solvers without an error estimate. With those keep
    `a T` well below 16 in float32 and 36 in float64. Where nothing else helps,
    `solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()` does, which undoes nothing.

    **Cost** of a gradient: the evaluations of the vector field that the solve took, as
    many again in the reverse sweep, and one vector-Jacobian product for each. One more
    step is undone for each step with a save time where `SaveAt(ts=..., fn=...)` has an
    `fn` of its own, or where times are differentiated. Memory: that of one evaluation
    of the vector field, whatever the number of steps; the sizes of the components of
    solution and solver state; the kept states; and, for adaptive steps, one number for
    each of up to 512 of them (see `capacity`). Where nobody differentiates, nothing is
    kept.

    **Batches.** Under `jax.vmap` the cotangents of parameters that the elements of the
    batch share are summed in every step of the sweep: memory and time are those of a
    solve with a batched state. `jax.grad` of `jax.vmap` is what profits;
    `jax.vmap` of `jax.grad` asks for one gradient per element, and gets it.

    **Derivatives.** Reverse mode, forward mode, and forward mode over reverse mode (so
    a Hessian is to be had as `jax.jacfwd(jax.grad(...))`). Reverse mode over reverse
    mode raises.

    **Raises:**

    - `ValueError` if the solver is not reversible, for an SDE that cannot be solved in
        reverse, and where a solve with adaptive steps and `max_steps=None` is
        differentiated without `capacity`.
    - `RuntimeError`, when it is traced, for derivatives with respect to parameters of
        the step-size controller, and for reverse mode over another derivative.
    - `NotImplementedError` for ordered effects in the vector field.
    - `NotImplementedError` for a solver with a `backward_step` that is made of one that
        restarts.
    - `RuntimeError`, when it is run, if the reversal has lost the solution, if there were
        more restarts than `checkpoints`, if the solution is wrong (see `on_failure`), if a
        gradient takes more steps than `capacity`, and if steps that were made again came
        out otherwise.

    The idea is that of MALI, and for adaptive steps that of Maslovskaya et al.: see
    [`diffrax_reversible.ALF`][] and [`diffrax_reversible.AbstractALFComposition`][] for
    the references.
    """

    checkpoints: int | None = eqx.field(static=True, default=None, kw_only=True)
    capacity: int | None = eqx.field(static=True, default=None, kw_only=True)
    reversal_rtol: float | None = eqx.field(static=True, default=None, kw_only=True)
    on_failure: Action = eqx.field(static=True, default="raise", kw_only=True)
    monitor: Monitor | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        for name in ("checkpoints", "capacity"):
            check_integer("ReversibleAdjoint", name, getattr(self, name), 1, None)
        if self.reversal_rtol is not None and not self.reversal_rtol > 0:
            raise ValueError(
                "`ReversibleAdjoint(reversal_rtol=...)` must be positive; got "
                f"{self.reversal_rtol}."
            )
        check_action("ReversibleAdjoint", self.on_failure)

    def refuse(self, solver, terms, passed_solver_state):
        refuse_sde(solver, terms)
        reversal_of(solver)
        if passed_solver_state and type(solver) is LeapfrogMidpoint:
            # Its time is that of a step which is not in this solve.
            raise NotImplementedError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffeqsolve(LeapfrogMidpoint(), ..., solver_state=...)`. Leave out "
                "the solver state, and the first step is an explicit Euler step."
            )

    def sweep(self, loop, static, problem, throw, call_site, passed_solver_state):
        del passed_solver_state
        raises = self.on_failure == "raise"
        return ReversibleSweep(
            loop,
            static,
            type(self).__name__,
            self.capacity,
            throw,
            call_site,
            self.checkpoints,
            self.reversal_rtol,
            OnFailure("nan" if raises and not throw else self.on_failure, call_site),
            self.monitor,
        )


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: How many states of the solve to keep, for each element of a batch: those
    before restarts first, and others, evenly spread, as long as there is room. The sweep
    goes on from each of them, so that rounding is amplified only in between. `None`: 32
    (at most `max_steps`) with a solver that restarts, or that is undone only nearly
    ([`diffrax_reversible.EES25`][]); 8 with one that carries a second copy of the solution
    and knows of no restarts, as [`diffrax.ReversibleHeun`][] and every solver of an SDE;
    and none with a single copy, or with `restart=None`.
- `capacity`: How many adaptive steps to make room for: a gradient that takes more is
    refused. `None`: none is refused, and there is room for the times of 512 of them, or
    of a 32nd of `max_steps` if that is more. In a solve of more steps than that, those
    before are made again with the step-size controller, which costs up to two solves.
- `reversal_rtol`: The largest accepted difference between the states that the sweep
    reconstructs and those that are known (the initial state, and the checkpoints), of
    every component relative to its largest absolute value in the course of the solve.
    Of a second copy in the solver state the square root of it is accepted. Derivatives
    of the states, for second derivatives, may differ by a tenth of it. `None`: a
    tenth of the square root of the machine epsilon `eps` of the state, 3e-5 in float32
    and 1e-9 in float64, and `4 * eps` for every step, since each of them rounds; at most
    0.01; and what the solver says of itself, if it is undone only nearly. With no more
    loss than that a gradient has kept two digits on the problems on which this was
    measured.
- `on_failure`: What to do where the difference is larger: `"raise"` a `RuntimeError` at
    run time; make the gradient `"nan"`; or `"warn"`. With `diffeqsolve(...,
    throw=False)` the default is `"nan"`.
- `monitor`: A function that is called with a [`diffrax_reversible.ReversalReport`][] for
    every gradient, when it is run: what the difference was, how many restarts there
    were. Under `jax.vmap` it is called once, with the figures of all elements. It is
    not called where nobody differentiates. What it raises ends the program; what it
    returns is dropped. A function that is another one in every step of a training makes
    JAX compile anew. `None`: nobody is told, and nothing is added to the program.
"""
