"""Encoding and decoding by a flow: from one end of it to the other, and back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractAdjoint,
    AbstractSolver,
    AbstractStepSizeController,
    AbstractTerm,
    ConstantStepSize,
    diffeqsolve,
    NoProgressMeter,
    SaveAt,
)
from jaxtyping import PyTree

from .._adjoint import ReversibleAdjoint
from .._autodiff.report import Action
from .._loop.steps import knows_its_steps
from .._solver.updates.recorded import without_restarts
from .._solver.updates.restart import copy_of, RestartState, with_copy
from .._types import Args, RealScalarLike, Y
from .finished import refuse, state_like
from .solver import in_direction
from .undo import go_back


class Encoding(eqx.Module):
    """What has to be kept of the end of a solve, to go back to its start.

    - `y`: the solution.
    - `copy`: what the solver carries besides: the second copy of the solution, or of the
        vector field. `None` for a solver that carries nothing.

    ```python
    encoding = encode(terms, ALF(), 0.0, 1.0, 0.05, y0, args)
    numpy.savez("encoding.npz", y=encoding.y, copy=encoding.copy)
    ```
    """

    y: PyTree
    copy: PyTree


def _check_steps(name: str, controller: AbstractStepSizeController) -> None:
    if not knows_its_steps(controller):
        kind = type(controller).__name__
        raise ValueError(
            f"`{name}` needs steps that are known beforehand, since nothing is kept of "
            f"them: `ConstantStepSize()`, `diffrax.StepTo(...)` or `ReplayedSteps(...)`, "
            f"and not `{kind}(...)`. For adaptive steps, use `undo` with "
            "`RecordedSteps`."
        )


def encode(
    terms: PyTree[AbstractTerm],
    solver: AbstractSolver,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    y0: Y,
    args: Args = None,
    *,
    stepsize_controller: AbstractStepSizeController = ConstantStepSize(),
    adjoint: AbstractAdjoint = ReversibleAdjoint(),
    max_steps: int | None = None,
) -> Encoding:
    """Solves from `t0` to `t1`, and returns the end as an
    [`diffrax_reversible.Encoding`][], from which [`diffrax_reversible.decode`][] finds
    `y0` again, to rounding.

    Use it for inverting a flow: an image is encoded as noise, and decoded. There is no
    solution to keep, and no record of steps, which have to be constant or given. For
    adaptive steps, and for flows that contract, use [`diffrax_reversible.undo`][]: here
    the solver never restarts.

    ```python
    encoding = encode(terms, ALF(), 0.0, 1.0, 0.05, y0, args)
    y0 = decode(terms, ALF(), 0.0, 1.0, 0.05, encoding, args)
    ```

    **What has to be kept** is the `Encoding`, two arrays of the size of `y0`, and not its
    `y` alone. There is no start of a solver, however clever, that would make `y` alone
    enough. For `y' = a y`, whatever a finite number of evaluations and sums makes of `y0`
    is `R(h a) y0` with a polynomial `R`. What finds `y0` again by the same means
    multiplies with a polynomial `S`, and `R S = 1` leaves only constants, which solve
    nothing. (So no explicit Runge-Kutta method is symmetric, and a reversible solver is
    one of a larger state.) With a pair of terms the argument does not hold, since
    polynomials become matrices of determinant one: [`diffrax_reversible.StormerVerlet`][]
    and the other symplectic solvers keep nothing but `y`. Where nearly is
    enough, put `f(t1, y)` in the place of `copy`, or `y` for a coupled solver, and pass
    `reversal_rtol=math.inf` to `decode`: what it finds was off by an error of order 4 in
    the step with [`diffrax_reversible.ALF`][] and
    [`diffrax_reversible.ReversibleALF2`][], 8 with
    [`diffrax_reversible.ReversibleALF4`][], and 3 with `Reversible(diffrax.Heun())`.

    **Arguments:** as [`diffrax.diffeqsolve`][].

    **Cost:** that of the solve.

    **Raises:** `ValueError` for a solver that is not reversible, and for steps that are
    not known beforehand. An error at run time, in `decode`, if the two copies have drifted
    apart too far to find `y0`.
    """
    refuse(solver, terms, "encode")
    _check_steps("encode", stepsize_controller)
    solution = diffeqsolve(
        terms,
        without_restarts(solver),
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=SaveAt(t1=True, solver_state=True),
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=max_steps,
    )
    y1 = jtu.tree_map(lambda x: x[-1], solution.ys)
    return Encoding(y1, copy_of(solution.solver_state))


def decode(
    terms: PyTree[AbstractTerm],
    solver: AbstractSolver,
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    encoding: Encoding,
    args: Args = None,
    *,
    stepsize_controller: AbstractStepSizeController = ConstantStepSize(),
    adjoint: AbstractAdjoint = ReversibleAdjoint(),
    max_steps: int | None = None,
    reversal_rtol: float | None = None,
    on_failure: Action | None = None,
) -> Y:
    """The inverse of [`diffrax_reversible.encode`][]: `y0`, from the encoding.

    To edit what was encoded, decode with other `args`. For a solver whose `copy` is one
    of the vector field, like [`diffrax_reversible.ALF`][], add to it by how much the
    vector field changes at the end, `f(t1, y, new_args) - f(t1, y, args)`, and pass
    `reversal_rtol=math.inf`, since what is then found is not what was started from.

    ```python
    encoding = encode(terms, ALF(), 0.0, 1.0, 0.05, y0, args)
    edited = decode(terms, ALF(), 0.0, 1.0, 0.05, encoding, new_args)
    ```

    **Arguments:** as `encode`, and

    - `encoding`: what that returned.
    - `reversal_rtol`, `on_failure`: as [`diffrax_reversible.undo`][].

    **Returns:** the solution at `t0`.

    **Cost**, derivatives and errors: as [`diffrax_reversible.undo`][].
    """
    refuse(solver, terms, "decode")
    _check_steps("decode", stepsize_controller)
    with jax.numpy_dtype_promotion("standard"):
        times = [t0, t1] if dt0 is None else [t0, t1, dt0]
        dtype = jnp.result_type(*times)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(float)
        promote = lambda x: jnp.asarray(x, jnp.result_type(x, dtype))
        y1, copy = jtu.tree_map(promote, (encoding.y, encoding.copy))
    start, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    solver = without_restarts(solver)
    direction = jnp.where(start < end, 1, -1)
    forward = in_direction(terms, direction)
    like = state_like(solver, forward, start * direction, y1, args)
    state = copy
    if type(like) is RestartState:
        state = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        state = with_copy(state, copy)
    options = dict(
        saveat=SaveAt(t1=True),
        adjoint=adjoint,
        max_steps=max_steps,
        throw=True,
        progress_meter=NoProgressMeter(),
    )
    found = go_back(
        "decode",
        terms,
        solver,
        (start, end, end),
        y1,
        state,
        dt0,
        args,
        None,
        None,
        options,
        stepsize_controller,
        reversal_rtol,
        on_failure,
    )
    return jtu.tree_map(lambda x: x[-1], found.ys)
