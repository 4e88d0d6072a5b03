"""Exact gradients of a reversible solve, without storing it."""

from typing import cast

import equinox as eqx
from diffrax import LeapfrogMidpoint

from ..._reversal.registry import as_reversible
from ..._reversal.sde import refuse_sde
from ..discrete.adjoint import AbstractSweepAdjoint
from .accuracy import OnInaccurate
from .sweep import ReversibleSweep


class ReversibleAdjoint(AbstractSweepAdjoint):
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
    close over, a `solver_state` that was passed in, and times: `t0`, `t1`,
    `SaveAt(ts=...)`, and `dt0` where steps are constant. When `t0` or `t1` moves,
    adaptive steps are held at their places relative to the two.

    Undoing the steps of a flow that contracts by `exp(-a T)` amplifies rounding by
    `exp(a T)`, so that a reversal is lost where `a T` comes near 16 in float32 or 36 in
    float64. The sweep compares the states that it finds with those that it should have
    found, and raises if the gradient could be wrong. `checkpoints` then helps; or, for
    a solver that can be damped, damping.

    **Cost** of a gradient: the evaluations of the vector field that the solve took, as
    many again in the reverse sweep, and one vector-Jacobian product for each. One more
    step is undone for each step with a save time where `SaveAt(ts=..., fn=...)` has an
    `fn` of its own, or where times are differentiated. Memory: that of one evaluation
    of the vector field, whatever the number of steps; the checkpoints; and, for
    adaptive steps, two numbers per step, with room for `max_steps`.

    **Batches.** Under `jax.vmap` the cotangents of parameters that the elements of the
    batch share are summed in every step of the sweep: memory and time are those of a
    solve with a batched state. `jax.grad` of `jax.vmap` is what profits;
    `jax.vmap` of `jax.grad` asks for one gradient per element, and gets it.

    **Derivatives.** Reverse mode, forward mode, and forward mode over reverse mode (so
    a Hessian is to be had as `jax.jacfwd(jax.grad(...))`). Reverse mode over reverse
    mode raises.

    **Raises:**

    - `ValueError` if the solver is not reversible, for an SDE that cannot be solved in
        reverse, and for adaptive steps with `max_steps=None` (which
        `RecordedSteps(controller, capacity=...)` allows).
    - `NotImplementedError` for derivatives with respect to parameters of the step-size
        controller, and for jumps that a controller other than
        [`diffrax.ClipStepSizeController`][] steps over.
    - `NotImplementedError` inside of `jax.shard_map(..., check_vma=True)`, unless with
        `diffeqsolve(..., throw=False)`.
    - `RuntimeError`, when it is run, if the reversal has lost the solution (see
        `on_inaccurate`).

    ??? cite "Reference"

        The idea is that of

        ```bibtex
        @inproceedings{zhuang2021mali,
            title={{MALI}: {A} memory efficient and reverse accurate integrator for
                   {N}eural {ODE}s},
            author={Zhuang, Juntang and Dvornek, Nicha C. and Tatikonda, Sekhar and
                    Duncan, James S.},
            booktitle={International Conference on Learning Representations},
            year={2021}
        }
        ```

        and for adaptive steps that are recorded and replayed in reverse

        ```bibtex
        @article{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen, Christian
                    and Singh, Pranav and Wembe, Boris},
            journal={arXiv preprint arXiv:2410.09537},
            year={2024}
        }
        ```
    """

    checkpoints: int | None = eqx.field(static=True, default=None)
    rtol: float | None = eqx.field(static=True, default=None)
    on_inaccurate: str = eqx.field(static=True, default="raise")

    def __check_init__(self):
        if self.checkpoints is not None and self.checkpoints < 1:
            raise ValueError(
                "`ReversibleAdjoint(checkpoints=...)` must be at least 1, the number of "
                f"states to keep, or `None`; got {self.checkpoints}."
            )
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(
                f"`ReversibleAdjoint(rtol=...)` must be positive; got {self.rtol}."
            )
        if self.on_inaccurate not in ("raise", "nan", "warn"):
            raise ValueError(
                '`ReversibleAdjoint(on_inaccurate=...)` must be "raise", "nan" or '
                f'"warn"; got {self.on_inaccurate!r}.'
            )

    def refuse(self, solver, terms, passed_solver_state):
        as_reversible(solver)
        refuse_sde(solver, terms)
        if passed_solver_state and type(solver) is LeapfrogMidpoint:
            # Its time is that of a step which is not in this solve.
            raise NotImplementedError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffeqsolve(LeapfrogMidpoint(), ..., solver_state=...)`. Leave out "
                "the solver state, and the first step is an explicit Euler step."
            )

    def room(self, max_steps):
        if max_steps is None:
            raise ValueError(
                "`adjoint=ReversibleAdjoint()` must know how many steps to make room "
                "for. Pass `diffeqsolve(..., max_steps=...)`, or "
                "`stepsize_controller=RecordedSteps(controller, capacity=...)`."
            )
        return max_steps

    def sweep(self, loop, static, problem, throw, passed_solver_state):
        del problem, passed_solver_state
        on_inaccurate = cast(OnInaccurate, self.on_inaccurate)
        if on_inaccurate == "raise" and not throw:
            on_inaccurate = "nan"
        name = type(self).__name__
        return ReversibleSweep(
            loop, static, name, self.checkpoints, self.rtol, on_inaccurate
        )


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: How many states of the solve to keep. The sweep restarts from each of
    them, so that rounding is amplified only in between. `None`: none.
- `rtol`: The largest accepted difference between the states that the sweep finds and
    those that it should have found (the initial state, and the checkpoints), relative
    to the largest entry of the solution. `None`: the square root of the machine epsilon
    `eps` of the state, 3e-4 in float32 and 1e-8 in float64, and `4 * eps` for every
    step, since each of them rounds; at most 0.01. With no more loss than that a gradient
    has kept two digits on the problems on which this was measured.
- `on_inaccurate`: What to do where the difference is larger: `"raise"` a
    `RuntimeError` at run time; make the gradient `"nan"`; or `"warn"`. With
    `diffeqsolve(..., throw=False)` the default is `"nan"`.
"""
