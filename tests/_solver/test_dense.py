"""Dense output: the order of the interpolants, and their error at save times."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible import (
    ALFComposition,
    ReversibleALF2,
    ReversibleALF4,
    ReversibleALF6,
    ReversibleALF8,
    ReversibleYoshida4,
)

from ..problems import KEPLER, LOTKA_VOLTERRA, NON_AUTONOMOUS, VAN_DER_POL


@eqx.filter_jit
def _errors(solver, problem, number, ts, exact):
    """The largest errors at the nodes and at the times."""
    subs = [diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(ts=jnp.linspace(0, ts[-1], 9))]
    del subs
    raise NotImplementedError
