"""A function and the walk from its outputs back to its inputs."""

import abc
import dataclasses
from collections.abc import Callable, Hashable

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree

from .._types import BoolScalarLike
from .batched_vjp import shared_vjp


class Inputs(eqx.Module):
    """The inputs of a function with a reverse sweep, all of them arrays.

    - `state`: differentiated; the sweep ends with its cotangent.
    - `parameters`: differentiated; the sweep adds their cotangent up on its way.
    - `rest`: not differentiated.
    """

    state: PyTree[Array]
    parameters: PyTree[Array]
    rest: PyTree[Array]


class Summed(eqx.Module):
    """The cotangent of the parameters, already summed over the batch."""

    cotangent: PyTree


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a sweep must know of the axes over which it is vmapped.

    - `names`: of these axes.
    - `summed`: a pytree with the structure of the perturbed parameters; for each the
        names of the axes that it does not carry.
    """

    names: tuple[Hashable, ...]
    summed: PyTree

    def any(self, pred: BoolScalarLike) -> BoolScalarLike:
        """Whether `pred` holds for any element of the batch; not batched itself."""
        if len(self.names) == 0:
            return pred
        return lax.pmax(jnp.asarray(pred, jnp.int32), self.names) > 0

    def pull_back(
        self,
        fn: Callable[[PyTree, PyTree], PyTree],
        point: PyTree,
        parameters: PyTree,
        cotangent: PyTree,
    ) -> tuple[PyTree, PyTree, "Summed"]:
        """`fn(point, parameters)`, and the cotangents of the point and of the parameters,
        of those already the sum over the elements of the batch that share them."""
        found = shared_vjp(fn, point, parameters, cotangent, self.names)
        value, cotangent_point, cotangent_parameters = found
        return value, cotangent_point, Summed(cotangent_parameters)

    def accumulate(self, total: PyTree[Array], increment: PyTree[Array]):
        """Adds the increments of all elements of the batch that share a parameter."""
        if isinstance(increment, Summed):
            return jtu.tree_map(jnp.add, total, increment.cotangent)

        def add(total, increment, names):
            return total + (lax.psum(increment, names) if names else increment)

        return jtu.tree_map(add, total, increment, self.summed)


class AbstractSweep(abc.ABC):
    """A function and the walk that finds its cotangents. Every method is called for a
    single element of a batch.

    - `refusal`: the message of the error raised where a value is differentiated that is
        not among the inputs, but that `evaluate` closes over.
    - `refusal_twice`: of the one raised where the walk is itself walked back.
    """

    # Annotated only: a field, a class variable or a property, as suits the subclass.
    refusal: str
    refusal_twice: str

    @abc.abstractmethod
    def evaluate(self, inputs: Inputs) -> PyTree[Array]:
        """The function."""

    @abc.abstractmethod
    def start(self, inputs: Inputs, outputs: PyTree, cotangents: PyTree) -> PyTree:
        """What the walk carries at its start. `cotangents` has the structure of
        `outputs`, and `None` where those are not floating-point numbers."""

    @abc.abstractmethod
    def length(self, carry: PyTree) -> Int[ArrayLike, "..."]:
        """How many steps there are to walk, from this carry on."""

    @abc.abstractmethod
    def step(
        self,
        inputs: Inputs,
        outputs: PyTree,
        cotangents: PyTree,
        carry: PyTree,
        cotangent_parameters: PyTree,
        batch: Batch,
    ) -> tuple[PyTree, PyTree]:
        """One step of the walk: the new carry and the new cotangent of the parameters,
        which has the structure of `inputs.parameters`, with `None` for those that are
        not perturbed. Called also for elements of a batch that have none left."""

    @abc.abstractmethod
    def finish(
        self, inputs: Inputs, outputs: PyTree, cotangents: PyTree, carry: PyTree
    ) -> tuple[PyTree, Bool[Array, ""]]:
        """The cotangent of `inputs.state`, and whether the cotangents are to be
        trusted: they become NaN if not."""
