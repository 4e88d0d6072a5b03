"""What the tests' settings keep from a user."""

import contextlib

import jax


@contextlib.contextmanager
def as_a_user():
    """Without the settings of `conftest.py`, which find errors of this package."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        # The one of a thread would not reach callbacks, which run in others.
        x64 = jax.config.read("jax_enable_x64")
        stack.callback(jax.config.update, "jax_enable_x64", x64)
        jax.config.update("jax_enable_x64", False)
        yield
