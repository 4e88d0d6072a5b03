"""The Hudson Bay lynx and hare pelts."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Pelts(NamedTuple):
    """Pelts that the Hudson's Bay Company took in per year, 1900 to 1920.

    The counts, in thousands, are those usually attributed to the Company's
    records as published by Hewitt (*The Conservation of the Wild Life of Canada*,
    1921) and by Elton and Nicholson ("The ten-year cycle in numbers of the lynx in
    Canada", Journal of Animal Ecology, 1942).

    A model sees the standardised logarithms of the counts: they may take any
    value, and both animals weigh the same.

    - `ts`: years since the first one.
    - `counts`: the hare (first column) and the lynx (second column) of each year.
    - `mean`, `scale`: of the logarithms of each column.
    """

    first_year: int
    ts: Float[Array, " years"]
    counts: Float[Array, "years 2"]
    mean: Float[Array, " 2"]
    scale: Float[Array, " 2"]

    def standardise(self, counts: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
        return (jnp.log(counts) - self.mean[None]) / self.scale[None]

    def unstandardise(self, states: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
        return jnp.exp(self.mean[None] + self.scale[None] * states)


def load_pelts() -> Pelts:
    """Read the table that the package carries."""
    table = Path(__file__).with_name("lynx_hare.csv")
    rows = np.loadtxt(table, delimiter=",", skiprows=1)
    years, counts = rows[:, 0], rows[:, 1:]
    logarithms = np.log(counts)
    return Pelts(
        first_year=int(years[0]),
        ts=jnp.asarray(years - years[0]),
        counts=jnp.asarray(counts),
        mean=jnp.asarray(logarithms.mean(axis=0)),
        scale=jnp.asarray(logarithms.std(axis=0)),
    )
