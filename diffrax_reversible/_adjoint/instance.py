"""Adjoint methods that are given as a class, without parentheses."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from .._checks import required_arguments


class needs_instance:
    """A method that says so where it is called on the class. `diffeqsolve` does that,
    and knows of nothing wrong, if it is given a class for an adjoint method."""

    def __init__(self, method: Callable):
        self._method = method

    def __get__(self, instance: Any, owner: type) -> Callable:
        if instance is not None:
            return MethodType(self._method, instance)

        def refuse(*args, **kwargs):
            del args, kwargs
            required = [f"{name}=..." for name in required_arguments(owner)]
            call = f"{owner.__name__}({', '.join(required)})"
            raise ValueError(
                f"`diffeqsolve(..., adjoint={owner.__name__})` was given a class, and "
                f"not an instance of it. Use `adjoint={call}`."
            )

        return refuse
