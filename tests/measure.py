"""What the tests measure costs with."""

import math
import re
import statistics

import jax
import jax.numpy as jnp
import jax.random as jr

from diffrax_reversible._compare.measure import in_turn

from .reference import jit


def temp_memory(f, *args):
    """Of the compiled function, in bytes. How its loops are compiled does not matter."""
    compiled = jit(f).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def fastest(*fns, repeats=3):
    """The shortest time of each, taken in turn."""
    return [min(found) for found in in_turn(fns, repeats)]


def medians(*fns, repeats=5):
    """The median time of each, taken in turn."""
    return [statistics.median(found) for found in in_turn(fns, repeats)]


class Counter:
    def __init__(self):
        self.evaluations = 0
        self.vjps = 0

    def field(self):
        """A vector field that counts how often it is evaluated and pulled back."""

        def evaluated(_):
            self.evaluations += 1

        def pulled_back(_):
            self.vjps += 1

        @jax.custom_vjp
        def field(t, y, args):
            jax.debug.callback(evaluated, t)
            return jnp.sin(args * y + t)

        def forward(t, y, args):
            return field(t, y, args), (t, y, args)

        def backward(residuals, cotangent):
            t, y, args = residuals
            jax.debug.callback(pulled_back, t)
            _, vjp = jax.vjp(lambda y, a: jnp.sin(a * y + t), y, args)
            return jnp.zeros_like(t), *vjp(cotangent)

        field.defvjp(forward, backward)
        return field


def mlp(sizes, dtype=jnp.float64):
    """The weights of a network."""
    keys = jr.split(jr.PRNGKey(0), len(sizes))
    return [
        jr.normal(key, (m, n), dtype) / n**0.5
        for key, m, n in zip(keys, sizes[1:], sizes)
    ]


_collective = re.compile(
    r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def collectives(compiled):
    """What the devices tell each other, as pairs of an operation and the numbers of
    elements of its results: inside of the loops of a compiled function, and outside."""
    computations = {}
    for line in compiled.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            lines = computations[name] = []
        elif line.startswith(" "):
            lines.append(line)

    def called(lines):
        return {x for y in lines for x in re.findall(r"[\w.\-]+", y)} & set(
            computations
        )

    loops = [x for y in computations.values() for x in y if " while(" in x]
    inside, new = set(), called(loops)
    while new:
        inside |= new
        new = {x for name in new for x in called(computations[name])} - inside

    def found(names):
        for name in names:
            for match in filter(None, map(_collective.search, computations[name])):
                shapes = re.findall(r"\[([\d,]*)\]", match[1])
                sizes = [s.split(",") if s else [] for s in shapes]
                yield match[2], [math.prod(map(int, size)) for size in sizes]

    return list(found(inside)), list(found(set(computations) - inside))
