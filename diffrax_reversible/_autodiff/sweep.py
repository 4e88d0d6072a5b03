"""The interface of a function with a reverse sweep."""

import abc

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._types import FloatScalarLike, IntScalarLike
from .batch import Batch


class Inputs(eqx.Module):
    """The inputs of a function with a reverse sweep, all of them arrays.

    - `state`: differentiated; the sweep ends with its cotangent.
    - `parameters`: differentiated; the sweep adds up their cotangent on its way.
    - `rest`: not differentiated.
    """

    state: PyTree[Array]
    parameters: PyTree[Array]
    rest: PyTree[Array]

    @staticmethod
    def split(
        state: PyTree, parameters: PyTree, rest: PyTree
    ) -> tuple["Inputs", PyTree]:
        """The arrays in all three, and what is not an array."""
        floating, others = eqx.partition((state, parameters), eqx.is_inexact_array)
        rest, static = eqx.partition((*others, rest), eqx.is_array)
        # Functions may close over arrays of NumPy, and before jax 0.8 `stop_gradient`
        # makes some.
        arrays = (*floating, lax.stop_gradient(rest))
        return Inputs(*jtu.tree_map(jnp.asarray, arrays)), static

    def join(self, static: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """The inverse of `split`."""
        state, parameters, rest = eqx.combine(self.rest, static)
        return (
            eqx.combine(self.state, state),
            eqx.combine(self.parameters, parameters),
            rest,
        )


class Residuals(eqx.Module):
    """What a reverse sweep knows of the evaluation that it reverses."""

    inputs: Inputs
    outputs: PyTree[Array]
    memory: PyTree[Array]


class AbstractSweep(abc.ABC):
    """A function, and the reverse sweep that finds its cotangents. Every method is called
    for a single element of a batch.

    - `refusal`: the message of the error raised where a value is differentiated that is
        not among the inputs, but that `evaluate` closes over.
    - `refusal_twice`: of the one raised where the derivative, whether of the sweep or of
        forward mode, is itself differentiated in reverse mode.
    """

    # Annotated only: a field, a class variable or a property, as suits the subclass.
    refusal: str
    refusal_twice: str

    @abc.abstractmethod
    def evaluate(self, inputs: Inputs) -> PyTree[Array]:
        """The function, where nobody differentiates."""

    @abc.abstractmethod
    def evaluate_with_memory(
        self, inputs: Inputs, perturbed: Inputs
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The function, and what it keeps for the sweep. Traced only where somebody
        differentiates, in whichever mode. `perturbed` is like the inputs: whether each
        of them is differentiated."""

    @abc.abstractmethod
    def start(
        self, residuals: Residuals, cotangents: PyTree, batch: Batch
    ) -> PyTree[Array]:
        """The carry at the start of the sweep. `cotangents` is like the outputs, and
        `None` where those are not floating-point numbers. Called in reverse mode only,
        so what cannot be swept is to be refused here."""

    @abc.abstractmethod
    def length(self, carry: PyTree[Array]) -> IntScalarLike | Int[Array, ""]:
        """How many steps there are, given the carry at the start."""

    @abc.abstractmethod
    def step(
        self,
        residuals: Residuals,
        cotangents: PyTree,
        carry: PyTree[Array],
        total: PyTree,
        batch: Batch,
    ) -> tuple[PyTree[Array], PyTree]:
        """One step of the sweep: the new carry, and `total` with what the step adds to
        the cotangent of the parameters. `total` is like the parameters, and `None` for
        those that are not perturbed. Called also for elements of a batch that have no
        steps left."""

    @abc.abstractmethod
    def finish(
        self, residuals: Residuals, cotangents: PyTree, carry: PyTree[Array]
    ) -> tuple[PyTree[Array], FloatScalarLike]:
        """The cotangent of `inputs.state`; and zero or NaN, which is added to all
        cotangents."""
