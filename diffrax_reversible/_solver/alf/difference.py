"""How far `v` is from the vector field, from the stage values of a step alone."""

import functools as ft
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from .composition import Composition


# A rooted tree is the tuple of its subtrees.
Tree: TypeAlias = tuple


def _forests(order: int, largest: int) -> Iterator[Tree]:
    """The multisets of trees with `order` vertices in all, none with more than
    `largest`, each once: from the last of `_trees(largest)` downwards."""
    if order == 0:
        yield ()
    for n in range(min(order, largest), 0, -1):
        for i, tree in enumerate(_trees(n)):
            for forest in _forests(order - n, n):
                is_sorted = forest == () or _place(forest[0]) <= (n, i)
                if is_sorted:
                    yield (tree, *forest)


def _place(tree: Tree) -> tuple[int, int]:
    n = _order(tree)
    return n, _trees(n).index(tree)


def _order(tree: Tree) -> int:
    return 1 + sum(map(_order, tree))


@ft.cache
def _trees(order: int) -> tuple[Tree, ...]:
    """The rooted trees with so many vertices, of which the Taylor series of a numerical
    method is made."""
    return tuple(_forests(order - 1, order - 1))


@ft.cache
def difference_weights(composition: Composition) -> np.ndarray:
    """Weights `c` with which `sum c_i (f_i - v_i)`, of the stage values and of what `v`
    was before each of them, estimates the difference of `v` from the vector field.

    That difference changes its sign with every stage, and nothing else does. The weights
    are the smallest ones that give 1 for a difference of 1, and that give nothing for a
    difference of zero, as far as the error estimate sees nothing either: for every tree
    of lower order.
    """
    g = np.array(composition.fractions)
    s = len(g)
    drifts = (np.append(g, 0.0) + np.append(0.0, g)) / 2
    # `v` before each stage, and the point of each, as combinations of `f(z0)` and `f_i`.
    v = np.eye(s + 1)[:s]
    for i in range(1, s):
        v[i] = 2 * v[i] - v[i - 1]
    points = np.cumsum(drifts[:s, None] * v, axis=0)

    @ft.cache
    def elementary(tree: Tree) -> np.ndarray:
        """The elementary weight of `f(z0)` and of each `f_i`."""
        subtrees = [points @ elementary(subtree) for subtree in tree]
        return np.append(float(tree == ()), np.prod([np.ones(s), *subtrees], axis=0))

    rows = [(-1.0) ** np.arange(1, s + 1)]
    for order in range(2, min(composition.error_order or composition.order, s + 1)):
        values = map(elementary, _trees(order))
        rows.extend(f[1:] - v @ f for f in values)
    weights, *_ = np.linalg.lstsq(np.array(rows), np.eye(len(rows))[0], rcond=1e-10)
    return weights
