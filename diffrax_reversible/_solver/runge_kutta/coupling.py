"""The coupling that makes any explicit Runge-Kutta solver reversible."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractERK,
    AbstractItoSolver,
    AbstractSolver,
    AbstractStratonovichSolver,
    AbstractTerm,
    Euler,
    LeapfrogMidpoint,
    ReversibleHeun,
    SemiImplicitEuler,
    ThirdOrderHermitePolynomialInterpolation,
)
from jaxtyping import Array, PyTree

from ..._compat import is_sde, ω
from ..._types import Args, RealScalarLike, VF, Y
from ..updates.solver import AbstractReversibleSolver
from ..updates.update import AbstractShift, AbstractUpdate, State
from .tableau import combine, evaluate_stages, scale, tableau_of


class _Substep(eqx.Module):
    """One of the two base steps: from the start of the step to its end, or back.

    - `t`, `h`, `control`: where the base step starts, and what it is to step.
    - `damping`: the coupling parameter, or one.
    - `sign`: with which the increment is added.
    - `error`, `slope0`, `slope1`: the weights of the base step's error estimate and of
        the slope at its start in the sums.
    """

    t: Array
    h: Array
    control: PyTree
    damping: Array
    sign: Array
    error: Array
    error_end: Array
    slope0: Array
    slope1: Array


class _Couple(AbstractUpdate):
    solver: AbstractSolver

    def read(self, state):
        return state.solver_state

    def evaluate(self, terms, args, point, substep):
        tableau = tableau_of(self.solver)
        stages = evaluate_stages(
            tableau, terms, substep.t, substep.h, point, args, substep.control
        )
        return dict(
            increment=combine(tableau.b, stages),
            error=None if tableau.error is None else combine(tableau.error, stages),
            slope=jtu.tree_map(lambda x: x[0], stages),
        )

    def _sums(self, k, substep):
        slope0 = scale(substep.slope0, k["slope"])
        slope1 = scale(substep.slope1, k["slope"])
        if k["error"] is None:
            return dict(slope0=slope0, slope1=slope1)
        end = scale(substep.error_end, k["slope"])
        error = (scale(substep.error, k["error"]) ** ω + end**ω).ω
        return dict(error=error, slope0=slope0, slope1=slope1)

    def write(self, state, k, substep):
        y, z = state.y, state.solver_state
        y = (
            scale(substep.damping, y) ** ω
            + scale(1 - substep.damping, z) ** ω
            + scale(substep.sign, k["increment"]) ** ω
        ).ω
        return State(y, z, (state.sums**ω + self._sums(k, substep) ** ω).ω)

    def unwrite(self, state, k, substep):
        y, z = state.y, state.solver_state
        y = (
            y**ω
            - scale(1 - substep.damping, z) ** ω
            - scale(substep.sign, k["increment"]) ** ω
        ).ω
        y = scale(1 / substep.damping, y)
        return State(y, z, (state.sums**ω - self._sums(k, substep) ** ω).ω)


class _Swap(AbstractShift):
    def write(self, terms, state, substep):
        return State(state.solver_state, state.y, state.sums)

    def unwrite(self, terms, state, substep):
        return State(state.solver_state, state.y, state.sums)


class Reversible(AbstractReversibleSolver, AbstractStratonovichSolver):
    r"""Makes an explicit Runge-Kutta solver reversible, by coupling two copies of the
    solution: `y`, and the solver state $z$, which starts as a copy of `y`.

    With $\Psi_h(t, y)$ the increment of the base solver over a step $h$ from $t$, and
    $\lambda$ the coupling parameter, a step is

    $y \leftarrow \lambda y + (1 - \lambda) z + \Psi_h(t_0, z), \quad
     z \leftarrow z - \Psi_{-h}(t_1, y)$

    which can be undone line by line, whatever the base solver. It is of the order of
    the base solver, and has its error estimate for adaptive steps. `SaveAt(ts=...)` and
    dense output are cubic, of third order, from slopes that are known already.

    Use it to get the accuracy of a Runge-Kutta solver that has proved itself on the
    problem, together with exact gradients in constant memory. A composition like
    [`diffrax_reversible.ReversibleALF4`][] costs less per step than `Reversible(Tsit5())`
    does. Do not use it for long solves of strongly contracting problems: $y - z$ is
    damped only by $\lambda$, and the contraction of the flow amplifies it; a smaller
    coupling parameter is more stable forwards, and amplifies rounding by $1 / \lambda$
    in every step that is undone.

    With a base solver that converges to the Stratonovich solution of an SDE, as
    [`diffrax.Heun`][], [`diffrax.Midpoint`][] and [`diffrax.Ralston`][] do, so does
    this.

    **Cost** per step: with a base solver of `s` stages (not counting the last one of a
    solver like [`diffrax.Tsit5`][], which is the first of the next step; so `s = 6`),
    `2 s` evaluations of the vector field forward; `2 s` again in the reverse sweep, and
    a vector-Jacobian product for each. The cached first stage of such solvers is not
    used. Memory: that of one base step, independent of the number of steps.

    **Raises:** `ValueError` for solvers that are not explicit Runge-Kutta methods or
    are reversible already, for a coupling parameter outside of (0, 1], and for SDEs
    with a base solver that does not converge to the Stratonovich solution.

    ??? cite "Reference"

        ```bibtex
        @misc{mccallum2024efficient,
            title={Efficient, Accurate and Stable Gradients for Neural {ODE}s},
            author={McCallum, Sam and Foster, James},
            year={2024},
            eprint={2410.11648},
            archivePrefix={arXiv}
        }
        ```
    """

    solver: AbstractSolver
    coupling_parameter: float = eqx.field(static=True)

    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., ThirdOrderHermitePolynomialInterpolation]
    ] = ThirdOrderHermitePolynomialInterpolation

    def __init__(self, solver: AbstractSolver, coupling_parameter: float = 0.999):
        kind, name = type(solver), type(solver).__name__
        if issubclass(
            kind,
            AbstractReversibleSolver
            | ReversibleHeun
            | LeapfrogMidpoint
            | SemiImplicitEuler,
        ):
            raise ValueError(
                f"`Reversible({name}())`: `{name}` is reversible already. Use it as it "
                "is."
            )
        # Not `isinstance`, which would also ask the solver inside of a wrapped solver.
        if not issubclass(kind, AbstractERK | Euler):
            raise ValueError(
                f"`Reversible({name}())`: only explicit Runge-Kutta solvers can be made "
                "reversible, for example `Reversible(diffrax.Tsit5())`."
            )
        if not 0 < coupling_parameter <= 1:
            raise ValueError(
                "`Reversible(..., coupling_parameter=...)` must be larger than 0 and at "
                f"most 1; got {coupling_parameter}."
            )
        self.solver = solver
        self.coupling_parameter = float(coupling_parameter)

    def order(self, terms: PyTree[AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> Y:
        """As [`diffrax.AbstractSolver.init`][].

        **Raises:** `ValueError` for an SDE, if the base solver does not converge to its
        Stratonovich solution.
        """
        del t0, t1, args
        if is_sde(terms) and not isinstance(self.solver, AbstractStratonovichSolver):
            name = type(self.solver).__name__
            why = (
                "converges to the Itô solution of an SDE, whose coupling would not"
                if isinstance(self.solver, AbstractItoSolver)
                else "is not known to converge to the Stratonovich solution of an SDE"
            )
            raise ValueError(
                f"`Reversible({name}())`: `{name}` {why}. Use a Stratonovich solver, for "
                "example `Reversible(diffrax.Heun())`."
            )
        return y0

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return terms.vf(t0, y0, args)

    def updates(self, terms, t0, t1):
        tableau = tableau_of(self.solver)
        pair = lambda x, y: jtu.tree_map(lambda x, y: jnp.stack([x, y]), x, y)
        control, h = terms.contr(t0, t1), t1 - t0
        substeps = _Substep(
            t=pair(t0, t1),
            h=pair(h, -h),
            control=pair(control, jtu.tree_map(jnp.negative, control)),
            damping=jnp.array([self.coupling_parameter, 1.0]),
            sign=jnp.array([1.0, -1.0]),
            error=jnp.array([1.0, 0.0]),
            error_end=jnp.array([0.0, -tableau.error_end]),
            slope0=jnp.array([1.0, 0.0]),
            slope1=jnp.array([0.0, -1.0]),
        )
        return [((_Couple(self.solver), _Swap()), substeps)]

    def jump(self):
        return None

    def zero_sums(self, y, solver_state):
        del solver_state
        names = ["slope0", "slope1"]
        if tableau_of(self.solver).error is not None:
            names.append("error")
        return {name: jtu.tree_map(jnp.zeros_like, y) for name in names}

    def error(self, terms, t0, t1, state0, state1):
        del terms, t0, t1, state0
        return state1.sums.get("error")

    def dense_info_start(self, terms, t0, t1, state0):
        del terms, t0, t1
        return dict(y0=state0.y)

    def dense_info_end(self, terms, t0, t1, state1):
        del terms, t0, t1
        return dict(y1=state1.y, k0=state1.sums["slope0"], k1=state1.sums["slope1"])


Reversible.__init__.__doc__ = """**Arguments:**

- `solver`: The base solver: an explicit Runge-Kutta solver like [`diffrax.Tsit5`][].
- `coupling_parameter`: A float in (0, 1].
"""
