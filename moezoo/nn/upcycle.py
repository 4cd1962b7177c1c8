"""From a dense network to one with experts that begins where the dense one stopped: its arrays.

Komatsuzaki et al., "Sparse Upcycling" (arXiv:2212.05055): every expert starts as a copy of the MLP
that it replaces, routers start fresh. Where a token's weights add up to 1 and no choice is dropped
its experts then give exactly what the MLP gave: `softmax_then_top_k_renormalised`, at least two
experts for a token (a single one's weight would always be 1 and teach its router nothing) and a
dropless dispatch. With weights that are not renormalised, as in V-MoE's published code, the network
starts as another function; so does Soft MoE in any case, which mixes tokens before its experts.

Or smaller experts start as parts of the MLP (`split`): F hidden units are cut into G groups of
F / G, expert e gets group e mod G, and with E > G experts there are E / G copies of each group, as
in M3ViT's practice of four experts a token. What the layer's second map gives is multiplied by G,
its bias is not:

    MLP(x) = b2 + sum over groups g of W2_g a(W1_g x + b1_g)     expert_g(x) = b2 + G W2_g a(...)

so the mean of the G experts of one copy is the MLP, and weights that add up to 1 and are equal
within each copy give the dense function. Which copies a token chooses is its router's matter
(`nn.upcycled`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.module import Tree

EXPERTS, ROUTER, BASE = "/experts/", "/router/", "/base/"
POSITIONS = "pos_embed"
PER_TASK = re.compile(r"/of/[^/]+/")

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
# (shapes learned, shapes wanted) -> {path of a layer: groups of hidden units its experts begin as}
Beginning = Callable[[Shapes, Shapes], dict[str, int]]


class Carried(NamedTuple):
    """Parameters to begin with; the paths that stayed fresh, and those found nowhere to go.

    layers: the paths of layers whose experts begin as an MLP, with the groups of its hidden units.
    """

    params: Tree
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    layers: Mapping[str, int] = MappingProxyType({})


def copied(learned: Shapes, fresh: Shapes) -> dict[str, int]:
    """The layers whose every expert can be the whole MLP: one group each."""
    return {
        layer: 1
        for layer, parts in _experts(learned, fresh).items()
        if all(shape[1:] == given for shape, given in parts)
    }


def split(learned: Shapes, fresh: Shapes) -> dict[str, int]:
    """The layers whose experts can be G > 1 equal parts of the MLP's hidden units, with G.

    The number of experts must be a multiple of G.
    """
    found = {}
    for layer, parts in _experts(learned, fresh).items():
        cuts = [_cut(shape[1:], given) for shape, given in parts]
        groups = {cut.groups for cut in cuts if cut is not None and cut.axis is not None}
        if None not in cuts and len(groups) == 1 and parts[0][0][0] % min(groups) == 0:
            found[layer] = groups.pop()
    return found


# By the names of `--upcycle.experts`.
BEGINNINGS: dict[str, Beginning] = {"copy": copied, "split": split}


def _experts(learned: Shapes, fresh: Shapes) -> dict[str, list[tuple[Shape, Shape]]]:
    """By layer, the shapes of its experts' arrays, and of the arrays of the MLP in its place.

    Layers for which an array is missing are left out.
    """
    found: dict[str, list[tuple[Shape, Shape]]] = {}
    for path, shape in fresh.items():
        layer, inside, _ = path.partition(EXPERTS)
        if inside:
            found.setdefault(layer, []).append((shape, learned.get(path.replace(EXPERTS, "/"), ())))
    return {layer: parts for layer, parts in found.items() if all(given for _, given in parts)}


class _Cut(NamedTuple):
    """How an array of an MLP is cut into groups: along `axis`, or not at all (None)."""

    axis: int | None
    groups: int


def _cut(shape: Shape, given: Shape) -> _Cut | None:
    """How an array of shape `given` becomes `groups` of shape `shape`; None where it cannot."""
    if shape == given:
        return _Cut(None, 1)
    other = [axis for axis, (a, b) in enumerate(zip(shape, given, strict=False)) if a != b]
    if len(shape) != len(given) or len(other) != 1 or given[other[0]] % shape[other[0]]:
        return None
    return _Cut(other[0], given[other[0]] // shape[other[0]])


def _parts_of(array: np.ndarray, shape: Shape) -> np.ndarray:
    """E experts [E, ...] out of an MLP's array: group e mod G for expert e, or all of it."""
    cut = _cut(shape[1:], array.shape)
    assert cut is not None  # `split` has seen to it
    if cut.axis is None:
        return np.broadcast_to(array, shape)
    parts = np.stack(np.split(array, cut.groups, cut.axis))
    if array.ndim == 2 and cut.axis == 0:  # a matrix that reads hidden units
        parts = parts * np.asarray(cut.groups, array.dtype)
    return np.tile(parts, (shape[0] // cut.groups, *[1] * array.ndim))


def carry_over(learned: Mapping[str, Any], fresh: Tree, beginning: Beginning = copied) -> Carried:
    """`fresh` with everything that `learned`, `{path: array}`, has for it, as NumPy arrays.

    A parameter is taken from the same path and shape; positions also where only that of the class
    token is too many. Experts in the place of an MLP take E copies: an expert kernel [E, in, out]
    at ".../mlp/experts/fc1/kernel" those of ".../mlp/fc1/kernel". The base of an adapted layer,
    ".../q/base/kernel", takes what the layer had before, ".../q/kernel". A module of which every
    task has its own, ".../norm/of/depth/scale", takes that of all, ".../norm/scale".
    beginning: how experts begin where an MLP was; `split` cuts it where copies do not fit.
    """
    kept, used, made = [], set(), {}
    shapes = {name: tuple(array.shape) for name, array in learned.items()}
    leaves = module.flatten(fresh)
    layers = beginning(shapes, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    for path, leaf in leaves.items():
        name = _source(path, leaf.shape, shapes, layers)
        if name is None:
            kept.append(path)
            made[path] = leaf
            continue
        used.add(name)
        array = np.asarray(learned[name], leaf.dtype)
        array = array[:, -leaf.shape[1] :] if path == POSITIONS else array
        if layers.get(path.partition(EXPERTS)[0], 1) > 1 and EXPERTS in path:
            made[path] = _parts_of(array, leaf.shape)
            continue
        # A view: E copies of an MLP take no memory until they are placed.
        made[path] = np.broadcast_to(array, leaf.shape)
    unused = tuple(sorted(set(learned) - used))
    return Carried(module.unflatten(made), tuple(kept), unused, layers)


def sources(learned: Shapes, fresh: Shapes, beginning: Beginning = copied) -> dict[str, str | None]:
    """What of `learned` every parameter of `fresh` begins with in `carry_over`, by shapes."""
    layers = beginning(learned, fresh)
    return {path: _source(path, shape, learned, layers) for path, shape in fresh.items()}


def _source(path: str, shape: Shape, learned: Shapes, layers: Mapping[str, int]) -> str | None:
    """The learned parameter that `path` begins with."""
    found = learned.get(path)
    # A model without a class token, which comes first, takes the positions of the patches.
    patches = path == POSITIONS and found and len(found) == 3 and (1, found[1] - 1, found[2])
    if found is not None and shape in (found, patches):
        return path
    plain = PER_TASK.sub("/", path.replace(BASE, "/"))
    if plain != path and plain in learned and learned[plain] == shape:
        return plain
    layer, inside, _ = path.partition(EXPERTS)
    name = path.replace(EXPERTS, "/")
    if inside and name in learned and (learned[name] == shape[1:] or layer in layers):
        return name
    return None


def upcycle(dense: Tree, sparse: Tree) -> Tree:
    """Parameters of a sparse model that begins as the dense one: all of `carry_over`'s but routers.

    dense, sparse: nested dictionaries of parameters of two models of the same sizes, the sparse
    one freshly initialised.
    Raises UserError where a parameter has no counterpart of its shape, or is left over.
    """
    source, target = module.flatten(dense), module.flatten(sparse)
    params, fresh, unused, _ = carry_over(source, sparse)
    for path in fresh:
        if ROUTER in path:
            continue
        name = path.replace(EXPERTS, "/")
        if name not in source:
            raise UserError(f"Upcycling found no {name} in the dense model for {path}.")
        shape = target[path].shape[1:] if EXPERTS in path else target[path].shape
        raise UserError(
            f"Upcycling found {name} of shape {source[name].shape} in the dense model, where the "
            f"sparse model needs {shape} for {path}."
        )
    if unused:
        raise UserError(
            f"Upcycling has no place for {unused[0]} of the dense model"
            f"{f' and {len(unused) - 1} more' if unused[1:] else ''}: build the sparse model with "
            "the same sizes and tasks."
        )
    return params
