"""Exact gradients of any Runge-Kutta solve, explicit or implicit, one stage at a
time."""

import equinox as eqx
import lineax as lx
from diffrax import Euler, ImplicitEuler

from ..._checks import check_integer
from ..._reversal.diagonal_runge_kutta import LinearSystems
from ..discrete.adjoint import AbstractDiscreteAdjoint
from .refusal import refuse_linear_options, refuse_unsupported
from .sweep import SymplecticSweep


class SymplecticAdjoint(AbstractDiscreteAdjoint):
    r"""Exact gradients for any Runge-Kutta solver of diffrax, explicit, diagonally
    implicit or both (IMEX), with the memory of the steps and of *one* evaluation of the
    vector field: the symplectic adjoint method. Differentiates the numerical solution
    itself ("discretise-then-optimise") and gives the gradients of
    [`diffrax.RecursiveCheckpointAdjoint`][] up to rounding.

    The state at the start of every accepted step is remembered. On the way back the
    stages of the step are computed again, and then pulled back one by one, the last one
    first, so that there is never more than one evaluation of the vector field whose
    intermediate values are kept.

    Use it where the state is small and the vector field is a large network, and
    wherever a reversal would lose the solution: nothing is undone here, so that
    contraction, however strong and long, does no harm. It is the one to take with a
    Runge-Kutta solver of diffrax then; and with implicit solvers, for stiff problems, it
    is the only exact one of this package. Where the state is large
    itself, and steps are many, [`diffrax_reversible.ReversibleAdjoint`][] needs no
    memory for them; or pass `checkpoints`.

    Everything else stays as it was: `SaveAt` in all its forms, constant and adaptive
    steps, events, jumps of the vector field, derivatives in `t0`, `t1` and
    `SaveAt(ts=...)`, `t1 < t0`, SDEs driven by a [`diffrax.VirtualBrownianTree`][] (Itô
    or Stratonovich, as the solver has it), CDEs, `throw=False`.

    ```python
    diffrax.diffeqsolve(
        ..., solver=diffrax.Tsit5(), adjoint=SymplecticAdjoint()
    )
    ```

    **Method.** For the step

    $Y_i = y_0 + \sum_{j<i} a_{ij} k_j, \quad k_i = h f(t_0 + c_i h, Y_i), \quad
     y_1 = y_0 + \sum_i b_i k_i$

    and the cotangent $\lambda_1$ of $y_1$, the paper solves the adjoint equation with a
    second Runge-Kutta method, such that the pair is a partitioned symplectic one and so
    conserves $\lambda^\top \delta$, $\delta$ being any variation of the solution: with
    $\Lambda_i$ the adjoint at stage $i$ and $l_i = -h\, (\partial f / \partial Y_i)^\top
    \Lambda_i$,

    $\lambda_1 = \lambda_0 + \sum_i b_i l_i, \quad \Lambda_i = \lambda_0 + \sum_j \left(
    b_j - \frac{b_j a_{ji}}{b_i} \right) l_j = \lambda_1 - \sum_{j>i} \frac{b_j a_{ji}}
    {b_i} l_j$

    which is explicit backwards. Where $b_i = 0$ this divides by zero, and the paper
    replaces $b_i$ by $h$ there. Neither is needed for $g_i = b_i \Lambda_i$,
    the cotangent of $k_i$: multiplied by $b_i$, the second equation reads

    $g_i = b_i \lambda_1 + \sum_{j>i} a_{ji} m_j, \quad m_j = h \left( \frac{\partial f}
    {\partial Y_j} \right)^\top g_j, \quad \lambda_0 = \lambda_1 + \sum_j m_j$

    since $m_j = -b_j l_j$. There is nothing to divide by any more, and if $b_i = 0$ then
    $g_i = \sum_{j>i} a_{ji} m_j$ is the limit. This is what is computed here; the
    cotangents of parameters are $\sum_i h\, (\partial f / \partial \theta)^\top g_i$.

    **Implicit solvers.** Stage $i$ of [`diffrax.ImplicitEuler`][], [`diffrax.Kvaerno3`][],
    [`diffrax.KenCarp4`][] and their relatives solves $k_i = h f(Y_i)$ with $Y_i = P_i +
    a_{ii} k_i$, where $P_i$ is known from the stages before. It is pulled back by the
    implicit function theorem, whatever iterations found it: with $J_i = h\, \partial f /
    \partial Y_i$,

    $(I - a_{ii} J_i)^\top w_i = g_i, \quad m_i = J_i^\top w_i$

    and the cotangents of parameters are $\sum_i h\, (\partial f / \partial \theta)^\top
    w_i$. That takes one linear system for each stage, solved by lineax (`linear_solver`,
    `linear_tags`). Of several terms with a tableau each (IMEX) the explicit ones need no
    system. The stages are found again by the root finder of the solver, or kept. Solvers
    that hand their last stage on to the next step have it kept with each state, so that
    the steps that are made again are those of the solve.

    The theorem holds at a root, and the stages are roots up to the tolerance of the root
    finder: the gradient is exact up to that. By default it is the tolerance of the
    step-size controller, times the 0.01 with which [`diffrax.VeryChord`][] asks for more,
    so that what is missing is smaller than the error of the solution. Where gradients are
    compared more closely than this, pass `root_finder=diffrax.VeryChord(rtol=1e-12,
    atol=1e-12)` or the like to the solver.

    Where a root finder has failed, or a system could not be solved, the gradient is NaN,
    or there is an error; an element of a batch that has failed and that the loss leaves
    out adds zero. A `linear_solver` that answers singular systems, such as
    `lineax.SVD()`, hides that they are.

    **Cost** of a gradient, with a solver of `s` stages (not counting the last one of a
    solver like [`diffrax.Tsit5`][], which is the first of the next step): per accepted
    step `s` evaluations of the vector field to find the stages again, and another `s`
    together with their vector-Jacobian products. Memory: the states at the starts of up
    to `K = checkpoints` steps; twice the stages of one step; what one evaluation of the
    vector field keeps to be pulled back; and, for adaptive steps, one number for each of
    up to 512 of them (see `capacity`). In a solve of more than `K` steps the states are
    thinned, and the steps between two of them made again, by all elements of a batch at
    once, for which there is room for up to `K` states more: that costs `s` evaluations
    more per step for up to about `K * K` steps, and goes on to grow with the number of
    steps beyond.

    With `keep="stages"` the first `s` evaluations are not needed, and there are `s + 1`
    states (or `s + 3` where the solver has the first stage from the step before) instead
    of each. With `keep="residuals"` nothing is evaluated again in a solve of up to `K`
    steps, and of each there is what all its `s` evaluations keep to be pulled back, but
    for what is the same in every step, as the parameters are, and for what is elementwise,
    which is computed again: of a layer of a network only its matrix product.

    An implicit stage costs what its root finder takes to find it, as in the solve, unless
    stages are kept; and to pull it back two evaluations of the vector field with their
    derivatives, and the solution of a linear system. By default its matrix is made, of
    the size of the state squared, from one Jacobian-vector product for each component of
    the state, and is gone before the next stage. With `linear_solver=lineax.GMRES(rtol,
    atol)` there is no matrix. Of solvers that hand on their last stage two states are
    kept for each.

    **Batches.** Under `jax.vmap` the cotangents of parameters that the elements of the
    batch share are summed in every stage: memory and time are those of a solve with a
    batched state.

    **Derivatives.** Reverse mode, forward mode, and forward mode over reverse mode.
    Reverse mode over reverse mode raises.

    **Raises:**

    - `ValueError` if the solver is not a Runge-Kutta one with a tableau, explicit or
        diagonally implicit (the stochastic ones of diffrax are not), for Brownian motion
        that cannot be looked up again, for `linear_solver` or `linear_tags` with an
        explicit solver, for `linear_tags` with a complex state, and where a solve with
        adaptive steps and `max_steps=None` is differentiated without `capacity`.
    - `RuntimeError`, when it is traced, for derivatives with respect to parameters of
        the step-size controller, and for reverse mode over another derivative.
    - `NotImplementedError` for ordered effects in the vector field; and with
        `keep="residuals"` for a `jax.custom_vjp` in it, and for implicit solvers.
    - `RuntimeError`, when a gradient is run, if more than `capacity` adaptive steps are
        accepted, or if steps that were made again came out otherwise.

    ??? cite "Reference"

        ```bibtex
        @inproceedings{matsubara2021symplectic,
            title={Symplectic Adjoint Method for Exact Gradient of Neural {ODE} with
                   Minimal Memory},
            author={Matsubara, Takashi and Miyatake, Yuto and Yaguchi, Takaharu},
            booktitle={Advances in Neural Information Processing Systems},
            volume={34},
            year={2021}
        }
        ```
    """

    capacity: int | None = eqx.field(static=True, default=None, kw_only=True)
    keep: str = eqx.field(static=True, default="states", kw_only=True)
    checkpoints: int | None = eqx.field(static=True, default=None, kw_only=True)
    linear_solver: lx.AbstractLinearSolver | None = eqx.field(
        default=None, kw_only=True
    )
    linear_tags: frozenset[object] = eqx.field(
        static=True, default=frozenset(), kw_only=True
    )

    def __check_init__(self):
        for name in ("capacity", "checkpoints"):
            check_integer("SymplecticAdjoint", name, getattr(self, name), 1, None)
        kinds = ("states", "stages", "residuals")
        if self.keep not in kinds:
            raise ValueError(
                f"`SymplecticAdjoint(keep=...)` must be one of {kinds}; got "
                f"{self.keep!r}."
            )

    def refuse(self, solver, terms, passed_solver_state):
        del passed_solver_state
        refuse_unsupported(solver, terms, self.keep)
        refuse_linear_options(solver, self.linear_solver, self.linear_tags)

    def _keeps(self, solver) -> str:
        # These have one stage, which nothing is computed from, or the end of the step
        # tells.
        has_one_stage = issubclass(type(solver), Euler | ImplicitEuler)
        return "states" if has_one_stage and self.keep == "stages" else self.keep

    def sweep(self, loop, static, problem, throw, call_site, passed_solver_state):
        return SymplecticSweep(
            loop,
            static,
            type(self).__name__,
            self.capacity,
            throw,
            call_site,
            self.checkpoints,
            self._keeps(problem.parameters.solver),
            passed_solver_state,
            LinearSystems(self.linear_solver, self.linear_tags),
        )


SymplecticAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: How many states to keep at most, for each element of a batch; an even
    number, at least 2, unless there is a place for each step. The number of steps, if
    there is memory for it, is fastest; about the square root of it needs least memory.
    `None`: 64, or the square root of `max_steps` if that is more, so that no step is made
    more than three times; 128 where `max_steps` is `None`.
- `capacity`: How many adaptive steps to make room for: a gradient that takes more is
    refused. `None`: none is refused, and there is room for the times of 512 of them, or
    of a 32nd of `max_steps` if that is more. In a solve of more steps than that, those
    before are made again with the step-size controller, which costs up to two solves.
- `keep`: What to keep of each of these steps: its `"states"`, which is least; its
    `"stages"`, too; or the `"residuals"` of their derivatives, which takes most. That is
    fastest where a single solve of a small vector field takes many steps. In a large
    batch, to write and to read them takes about as long on a CPU as to evaluate the
    vector field again. [`diffrax.Euler`][] has one stage, which nothing is
    computed from: for it `"stages"` are no more than `"states"`. So it is for
    [`diffrax.ImplicitEuler`][]. Implicit solvers have no `"residuals"`; with their
    `"stages"` no root is looked for again.
- `linear_solver`: How the linear system of an implicit stage is solved, for example
    `lineax.GMRES(rtol, atol)` for large states, where its matrix is never made. `None`:
    with the linear solver of the solver's root finder, which solves the same systems,
    but for the transpose; by default that is
    `lineax.AutoLinearSolver(well_posed=None)`.
- `linear_tags`: What is known of the matrices of these systems, $I - a_{ii} J_i$, for
    example `frozenset({lineax.tridiagonal_tag})`, so that `lineax.AutoLinearSolver` can
    make use of it. It is not checked. Not for complex states. Neither of the two is
    for explicit solvers.
"""
