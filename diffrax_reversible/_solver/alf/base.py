"""The asynchronous leapfrog method and its compositions: their lines and their step."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from diffrax import (
    AbstractTerm,
    ThirdOrderHermitePolynomialInterpolation,
)
from jaxtyping import Array, PyTree

from ..._compat import is_sde, ω
from ..._tree import outer, scale
from ..updates.restart import check_ratio, RestartState
from ..updates.solver import AbstractUpdateSolver
from ..updates.update import AbstractUpdate, Repeat, Restart, State, Step
from .composition import Composition
from .difference import difference_weights
from .grid import check_grid, check_range, OnGrid, propose_grid, snap
from .interpolation import StageInterpolation
from .jump import jumps


class Drift(AbstractUpdate):
    """`z += v dX`"""

    control: PyTree
    grid: float | None = eqx.field(static=True, default=None)

    def read(self, state):
        return state.solver_state

    def evaluate(self, terms, args, point):
        return snap(terms.prod(point, self.control), self.grid)

    def write(self, state, k):
        z = check_range((state.y**ω + k**ω).ω, state.solver_state, self.grid)
        return State(z, state.solver_state), None

    def unwrite(self, state, k):
        return State((state.y**ω - k**ω).ω, state.solver_state)


class Reflect(AbstractUpdate):
    """`v = 2 f(t, z) - v`. Contributes `f` times each of the weights, and `f - v` times
    another one."""

    t: Array
    weights: Array
    difference: Array | None = None
    grid: float | None = eqx.field(static=True, default=None)

    def read(self, state):
        return state.y

    def evaluate(self, terms, args, point):
        return terms.vf(self.t, point, args)

    def write(self, state, k):
        sums = [scale(w, k) for w in self.weights]
        if self.difference is not None:
            difference = (k**ω - state.solver_state**ω).ω
            sums.append(scale(self.difference, difference))
        return self.unwrite(state, k), sums

    def unwrite(self, state, k):
        v = (2 * snap(k, self.grid) ** ω - state.solver_state**ω).ω
        return State(state.y, v)


def fixed(composition: Composition) -> Any:
    """A field that every instance of a class has in common."""
    return eqx.field(default=composition, init=False, repr=False, static=True)


class AbstractALFComposition(AbstractUpdateSolver):
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

    Where the vector field has kinks at known times, as along the cubic path of a neural
    CDE at its knots, land on them: `diffrax.ClipStepSizeController(PIDController(...),
    step_ts=ts)`; where it jumps, as along a [`diffrax.LinearInterpolation`][], with
    `jump_ts=ts`. A step over a kink is rejected again and again, or is accepted although
    it is wrong, with any solver. In diffrax's example of a neural CDE (100 knots,
    `rtol=1e-3, atol=1e-6`) `ReversibleALF4` makes 110 steps on the knots, with an error
    of 2e-4, and 257 with one of 3e-2 without; [`diffrax.Tsit5`][] 101 with 7e-6, and 47
    with 0.15. Restarts do not change that.

    The difference $v - f$ changes its sign with each stage, and where the flow contracts
    like $e^{-a t}$ it grows like $e^{a t}$. Before it can shorten the steps, or spoil the
    solution, the solver restarts: it makes $v = f(t, z)$ anew, at the start of a step,
    for one evaluation. What tells that it is time costs none. See `restart`.

    The solver state is a `RestartState`, of which $v$ is the `copy`. Solves along a
    Brownian motion, and those with `grid`, never restart; their solver state is $v$.

    ```python
    grid = ReversibleALF4.propose_grid(10.0)  # solution and vector field are below 10
    solver = ReversibleALF4(grid=grid)
    ```

    ??? cite "Reference"

        ```bibtex
        @misc{maslovskaya2024adaptive,
            title={Adaptive higher order reversible integrators for memory efficient
                   deep learning},
            author={Maslovskaya, Sofya and Ober-Bl{\"o}baum, Sina and Offen,
                    Christian and Singh, Pranav and Wembe, Boris},
            year={2024},
            eprint={2410.09537},
            archivePrefix={arXiv}
        }
        ```
    """

    composition: eqx.AbstractVar[Composition]
    restart: float | None = eqx.field(default=0.2, static=True)
    grid: float | None = eqx.field(default=None, static=True)
    interpolation: Literal["stages", "hermite"] | None = eqx.field(
        default=None, static=True
    )

    term_structure: ClassVar = AbstractTerm

    def __check_init__(self):
        name = type(self).__name__
        check_ratio(name, self.restart)
        if self.grid is not None:
            check_grid(name, self.grid)
        known = (None, "stages", "hermite")
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
    def interpolation_cls(self) -> Callable:  # pyright: ignore
        if self._by_stages:
            return StageInterpolation
        return ThirdOrderHermitePolynomialInterpolation

    @staticmethod
    def propose_grid(bound: float, dtype: Any = None) -> float:
        r"""The finest grid for `grid=...` on which the state can be twice as large as
        `bound`.

        **Arguments:**

        - `bound`: of the absolute value of every component of the solution and of the
            vector field, at the stages of the steps as well.
        - `dtype`: of the state. Defaults to JAX's default floating-point dtype.

        **Returns:**

        The power of two $q$ with $2 \cdot \text{bound} \leq q\, 2^p$, in which $p$ is
        the number of digits of the dtype: 24 for float32, 53 for float64. So the grid is
        about as fine as the rounding at the bound itself.

        **Raises:** `ValueError` if `bound` is not a positive number.
        """
        return propose_grid(bound, dtype)

    def order(self, terms):
        del terms
        return self.composition.order

    def error_order(self, terms):
        if self.composition.error_order is None:
            return self.order(terms)
        return self.composition.error_order

    def _is_watched(self, terms) -> bool:
        """Whether the difference of `v` from the vector field is estimated."""
        several = len(self.composition.fractions) > 1
        return several and self.grid is None and not is_sde(terms)

    def init(self, terms, t0, t1, y0, args):
        del t1
        v = snap(terms.vf(t0, y0, args), self.grid)
        if not self._is_watched(terms):
            return v
        has_error = self.composition.error_weights is not None
        return RestartState.fresh(v, y0, self.restart if has_error else None)

    def func(self, terms, t0, y0, args):
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

    def updates(self, terms, t0, t1, made_jump):
        g = np.array(self.composition.fractions)
        drifts = (np.append(g, 0.0) + np.append(0.0, g)) / 2
        middles = np.cumsum(g) - g / 2
        dX = terms.contr(t0, t1)
        h = t1 - t0
        t = jnp.asarray(t0 + jnp.asarray(middles, jnp.result_type(h)) * h)
        drift = Drift(outer(drifts[:-1], dX), self.grid)
        weights, restart, difference = self._weights, None, None
        if self._is_watched(terms):
            effect = lambda _, sums, __: terms.prod(sums[-1], dX)
            restart = Restart(effect, self.restart, self.error_order(terms), True)
            difference = jnp.asarray(difference_weights(self.composition))
        reflect = Reflect(t, jnp.asarray(weights.T), difference, self.grid)
        updates = [
            *jumps(t0, made_jump, self.grid),
            Repeat((drift, reflect)),
            Drift(scale(drifts[-1], dX), self.grid),
        ]
        if self.grid is not None:
            updates = [OnGrid(self.grid), *updates]

        def dense_info(state0, state1, sums):
            ends = dict(y0=snap(state0.y, self.grid), y1=state1.y)
            if self._by_stages:
                assert self.composition.interpolant is not None
                sums = sums[: len(self.composition.interpolant)]
                return ends | dict(coefficients=tuple(terms.prod(s, dX) for s in sums))
            k0 = terms.prod(state0.solver_state, dX)
            return ends | dict(k0=k0, k1=terms.prod(state1.solver_state, dX))

        has_error = self.composition.error_weights is not None
        error = lambda sums: terms.prod(sums[len(weights) - 1], dX)
        return Step(updates, error if has_error else None, dense_info, restart)


# What the fields of all compositions mean.
options = r"""
- `restart`: a step that follows one with
    $h |v - f| \cdot (|e| / |z|)^{1 / p} > \text{restart} \cdot |e|$ starts with a
    restart, with $e$ the error estimate and $p$ its order. `None`: never; then
    [`diffrax_reversible.ReversibleAdjoint`][] raises if the solution came to be wrong.
    The estimate of $|v - f|$ is not zero where there is no difference; so four times as
    much is allowed, until it has grown threefold since the last restart. The default was
    chosen on eight problems: the number of steps stays within 1.05 times that of a
    restart after every step, and the number of restarts nearly independent of the
    tolerance. With `ReversibleALF4` and tolerances 1e-3, 1e-6 and 1e-9 there were 59, 51
    and 34 restarts in 446, 1924 and 10026 steps of van der Pol's oscillator with mu = 5
    to T = 40, 17, 10 and 6 in 160, 782 and 4044 of a relaxation of rate 1 to T = 40, and
    4, none and none in 544, 2781 and 15048 of a pendulum to T = 200: about 0.1 to 0.4
    restarts per unit of contraction times time. A smaller number costs restarts without
    need, and a larger one steps.
- `grid`: a power of two $q$. If given, all increments are rounded to multiples of $q$
    (and so is the initial state), with the derivative of the identity: then a step is
    undone bit for bit, as long as the solution and the vector field are below
    $2^{24} q$ in float32 and $2^{53} q$ in float64, which is checked when it is run.
    `propose_grid` of the solver proposes one. There are no restarts then.
- `interpolation`: how `SaveAt(ts=...)` and `SaveAt(dense=True)` interpolate.
    `"stages"`: a polynomial of the stage values, which does not see the drift of $v$
    away from the vector field. `"hermite"`: the cubic through both ends with the
    slopes $v$. `None`: the first where the composition has such a polynomial, else the
    second. Where neither is accurate enough, land on the save times with
    `diffrax.ClipStepSizeController(..., step_ts=ts)`.
"""
