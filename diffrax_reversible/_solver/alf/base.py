"""The asynchronous leapfrog method and its compositions: their lines and their step."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractTerm,
    ThirdOrderHermitePolynomialInterpolation,
)
from jaxtyping import Array, PyTree

from ..._compat import ω
from ..._types import Args, RealScalarLike, VF, Y
from ..updates.side_step import SideStepInterpolation
from ..updates.solver import AbstractReversibleSolver
from ..updates.update import AbstractShift, AbstractUpdate, State
from .composition import Composition
from .damping import Relax, relaxation
from .grid import check_grid, check_range, OnGrid, snap
from .interpolation import StageInterpolation
from .jump import Jump


class Substep(eqx.Module):
    """`drift`: the share of the control that moves `z`; `t`: the time at which the
    vector field is evaluated after it; `weights`: of that value in each of the sums."""

    drift: PyTree
    t: Array
    weights: Array | None


class Drift(AbstractShift):
    grid: float | None = eqx.field(default=None, static=True)

    def write(self, terms, state, substep):
        z, v = state.y, state.solver_state
        z = (z**ω + snap(terms.prod(v, substep.drift), self.grid) ** ω).ω
        z, v = check_range((z, v), self.grid)
        return State(z, v, state.sums)

    def unwrite(self, terms, state, substep):
        z, v = state.y, state.solver_state
        z = (z**ω - snap(terms.prod(v, substep.drift), self.grid) ** ω).ω
        return State(z, v, state.sums)


class Reflect(AbstractUpdate):
    grid: float | None = eqx.field(default=None, static=True)

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point, substep):
        return terms.vf(substep.t, point, args)

    def write(self, state, k, substep):
        v = (2 * snap(k, self.grid) ** ω - state.solver_state**ω).ω
        return State(state.y, v, add_weighted(state.sums, substep.weights, k))

    def unwrite(self, state, k, substep):
        v = (2 * snap(k, self.grid) ** ω - state.solver_state**ω).ω
        return State(state.y, v, add_weighted(state.sums, -substep.weights, k))


def add_weighted(sums: list[PyTree], weights: Array, k: PyTree) -> list[PyTree]:
    """Adds the multiples of a stage value to the sums; to none, if there are none."""
    return [
        jtu.tree_map(lambda s, k: s + weights[i].astype(k.real.dtype) * k, total, k)
        for i, total in enumerate(sums)
    ]


def shares(control: PyTree, parts: np.ndarray) -> PyTree:
    """The parts of a control, stacked along a leading axis."""
    return jtu.tree_map(
        lambda c: jnp.tensordot(parts.astype(jnp.result_type(c)), c, axes=0), control
    )


def fixed(composition: Composition) -> Any:
    """A field that every instance of a class has in common."""
    return eqx.field(default=composition, init=False, repr=False, static=True)


class AbstractALFComposition(AbstractReversibleSolver):
    r"""Base class of the compositions of asynchronous-leapfrog steps.

    One asynchronous-leapfrog step of a fraction $g$ of the step $h$ is

    $z \leftarrow z + \frac{g h}{2} v, \quad
     v \leftarrow 2 f(t, z) - v, \quad
     z \leftarrow z + \frac{g h}{2} v$

    with $t$ in the middle of the fraction. `y` is $z$ and the solver state is $v$, a
    second copy of the vector field, started at $v = f(t_0, z)$. Adjacent half drifts
    are done as one.

    A subclass is a composition: its fractions, order, error estimate, interpolant.

    With `diffrax.PIDController(rtol, atol)` the error estimates hold the tolerance as
    `diffrax.Tsit5` does: on our test problems the global error was at most three times
    its error. Add `pcoeff=0.8, icoeff=0.3` for fewer rejected steps, below 20% there.
    `PIDController` with its defaults rejects up to a third of them where the step has
    to change by much, with these solvers as with others.

    The parasitic mode: $v - f$ changes its sign with each stage, and where the flow
    contracts like $e^{-a t}$ it grows like $e^{a t}$. See `damping`.
    """

    composition: eqx.AbstractVar[Composition]
    damping: float = eqx.field(default=0.0, static=True)
    grid: float | None = eqx.field(default=None, static=True)
    interpolation: str | None = eqx.field(default=None, static=True)

    term_structure: ClassVar = AbstractTerm

    def __check_init__(self):
        name = type(self).__name__
        if not 0 <= self.damping < math.inf:
            raise ValueError(
                f"`{name}(damping={self.damping!r})` must be zero or a positive rate, "
                "in units of one over time."
            )
        if self.grid is not None:
            check_grid(name, self.grid)
            if self.damping > 0:
                raise ValueError(
                    f"`{name}(damping=..., grid=...)`: damping merges points of a "
                    "grid, and cannot be undone bit for bit. Use one of the two."
                )
        known = (None, "stages", "hermite", "side_step")
        if self.interpolation not in known:
            raise ValueError(
                f"`{name}(interpolation={self.interpolation!r})` must be "
                f"one of {known}."
            )
        if self.interpolation == "stages" and self.composition.interpolant is None:
            raise ValueError(
                f"`{name}(interpolation='stages')` needs a composition "
                "with an interpolant made of its stage values, and this one has none. "
                "Use `interpolation='hermite'`."
            )

    @property
    def _by_stages(self) -> bool:
        has_interpolant = self.composition.interpolant is not None
        return has_interpolant and self.interpolation in (None, "stages")

    @property
    def _weights(self) -> np.ndarray:
        """One row for each sum of stage values: first the interpolant's, then the error
        estimate's."""
        rows = self.composition.interpolant if self._by_stages else None
        e = self.composition.error_weights
        rows = np.array([*(() if rows is None else rows), *(() if e is None else (e,))])
        if e is not None:
            rows[-1] *= self.composition.error_scale
        return rows.reshape(-1, len(self.composition.fractions))

    @property
    def interpolates_from_start(self) -> bool:
        return self.interpolation == "side_step"

    @property
    def interpolation_cls(self) -> Callable:  # pyright: ignore
        if self.interpolates_from_start:
            return SideStepInterpolation
        if self._by_stages:
            return StageInterpolation
        return ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        del terms
        return self.composition.order

    def error_order(self, terms: PyTree[AbstractTerm]) -> int | None:
        if self.composition.error_order is None:
            return self.order(terms)
        return self.composition.error_order

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        del t1
        return snap(terms.vf(t0, y0, args), self.grid)

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        if self.composition.error_weights is None:
            # Only the choice of a first step asks for this.
            raise ValueError(
                f"`dt0=None` needs an error estimate, and `{type(self).__name__}` has "
                "none here. Give the steps, for example with "
                "`stepsize_controller=ConstantStepSize()` and `dt0=...`; or use a "
                "solver with an estimate (for `ALFComposition`, give "
                "`error_weights=..., error_order=...`)."
            )
        return terms.vf(t0, y0, args)

    def updates(self, terms, t0, t1):
        g = np.array(self.composition.fractions)
        drifts = (np.append(g, 0.0) + np.append(0.0, g)) / 2
        middles = np.cumsum(g) - g / 2
        control = terms.contr(t0, t1)
        h = t1 - t0
        t = jnp.asarray(t0 + jnp.asarray(middles, jnp.result_type(h)) * h)
        weights = jnp.asarray(self._weights.T)
        drift, reflect = Drift(self.grid), Reflect(self.grid)
        updates = [
            ((drift, reflect), Substep(shares(control, drifts[:-1]), t, weights)),
            ((drift,), Substep(shares(control, drifts[-1:]), t[-1:], None)),
        ]
        if self.grid is not None:
            updates = [((OnGrid(self.grid),), t[:1]), *updates]
        if self.damping > 0:
            relax = Relax(type(self).__name__)
            updates = [*updates, ((relax,), relaxation(self.damping, t0, t1))]
        return updates

    def jump(self):
        return Jump(self.grid)

    def zero_sums(self, y, solver_state):
        del y
        zeros = jtu.tree_map(jnp.zeros_like, solver_state)
        return [zeros for _ in self._weights]

    def error(self, terms, t0, t1, state0, state1):
        del state0
        if self.composition.error_weights is None:
            return None
        return terms.prod(state1.sums[-1], terms.contr(t0, t1))

    def dense_info_start(self, terms, t0, t1, state0):
        y0 = snap(state0.y, self.grid)
        if self._by_stages:
            return dict(y0=y0)
        k0 = terms.prod(state0.solver_state, terms.contr(t0, t1))
        return dict(y0=y0, k0=k0)

    def dense_info_end(self, terms, t0, t1, state1):
        control = terms.contr(t0, t1)
        if not self._by_stages:
            return dict(y1=state1.y, k1=terms.prod(state1.solver_state, control))
        assert self.composition.interpolant is not None
        rows = len(self.composition.interpolant)
        coefficients = tuple(terms.prod(s, control) for s in state1.sums[:rows])
        return dict(y1=state1.y, coefficients=coefficients)


# What the fields of all compositions mean.
options = r"""
- `damping`: $\gamma \geq 0$. If positive, every step ends with
    $v \leftarrow f + e^{-\gamma h} (v - f)$, $f = f(t_1, z)$, which takes the parasitic
    mode of the method down and keeps its order. For vector fields that contract, like
    $e^{-a t}$: there $v - f$ grows like $e^{a t}$ without it. The forward pass needs
    $\gamma \geq a$; the reverse sweep, which has to undo the damping, wants
    $\gamma \leq 2 a$, and loses digits over a time $T$ like $e^{a T}$ all the same.
    Costs one more evaluation per step.
- `grid`: a power of two $q$. If given, all increments are rounded to multiples of $q$
    (and so is the initial state), with the derivative of the identity: then a step is
    undone bit for bit, as long as the solution and the vector field are below
    $2^{24} q$ in float32 and $2^{53} q$ in float64, which is checked when it is run.
    See [`diffrax_reversible.propose_grid`][]. Not together with `damping`.
- `interpolation`: how `SaveAt(ts=...)` and `SaveAt(dense=True)` interpolate.
    `"stages"`: a polynomial of the stage values, which does not see the drift of $v$
    away from the vector field. `"hermite"`: the cubic through both ends with the
    slopes $v$. `"side_step"`: a shorter step of the method itself to every save time,
    which is as accurate as the steps, and takes the evaluations of a step for each
    save time, in the reverse sweep as well; for `SaveAt(ts=...)` only. `None`: the
    first where the composition has such a polynomial, else the second.
"""
