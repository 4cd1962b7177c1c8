"""From a dense network to one with experts that begins where the dense one stopped.

Komatsuzaki et al., "Sparse Upcycling" (arXiv:2212.05055): every expert starts as a copy of the MLP
that it replaces, routers start fresh. Where a token's weights add up to 1 and no choice is dropped
its experts then give exactly what the MLP gave: `softmax_then_top_k_renormalised`, at least two
experts for a token (a single one's weight would always be 1 and teach its router nothing) and a
dropless dispatch. With weights that are not renormalised, as in V-MoE's published code, the network
starts as another function; so does Soft MoE in any case, which mixes tokens before its experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.module import Tree

EXPERTS, ROUTER, BASE = "/experts/", "/router/", "/base/"
POSITIONS = "pos_embed"
PER_TASK = re.compile(r"/of/[^/]+/")


class Carried(NamedTuple):
    """Parameters to begin with; the paths that stayed fresh, and those found nowhere to go."""

    params: Tree
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def carry_over(learned: Mapping[str, Any], fresh: Tree) -> Carried:
    """`fresh` with everything that `learned`, `{path: array}`, has for it, as NumPy arrays.

    A parameter is taken from the same path and shape; positions also where only that of the class
    token is too many. Experts in the place of an MLP take E copies: an expert kernel [E, in, out]
    at ".../mlp/experts/fc1/kernel" those of ".../mlp/fc1/kernel". The base of an adapted layer,
    ".../q/base/kernel", takes what the layer had before, ".../q/kernel". A module of which every
    task has its own, ".../norm/of/depth/scale", takes that of all, ".../norm/scale".
    """
    kept, used, made = [], set(), {}
    shapes = {name: tuple(array.shape) for name, array in learned.items()}
    for path, leaf in module.flatten(fresh).items():
        name = _source(path, leaf.shape, shapes)
        if name is None:
            kept.append(path)
            made[path] = leaf
            continue
        used.add(name)
        array = np.asarray(learned[name], leaf.dtype)
        array = array[:, -leaf.shape[1] :] if path == POSITIONS else array
        # A view: E copies of an MLP take no memory until they are placed.
        made[path] = np.broadcast_to(array, leaf.shape)
    return Carried(module.unflatten(made), tuple(kept), tuple(sorted(set(learned) - used)))


def sources(
    learned: Mapping[str, tuple[int, ...]], fresh: Mapping[str, tuple[int, ...]]
) -> dict[str, str | None]:
    """What of `learned` every parameter of `fresh` begins with in `carry_over`, by shapes."""
    return {path: _source(path, shape, learned) for path, shape in fresh.items()}


def _source(
    path: str, shape: tuple[int, ...], learned: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The learned parameter that `path` begins with."""
    found = learned.get(path)
    # A model without a class token, which comes first, takes the positions of the patches.
    patches = path == POSITIONS and found and (1, found[1] - 1, found[2])
    if found is not None and shape in (found, patches):
        return path
    plain = PER_TASK.sub("/", path.replace(BASE, "/"))
    if plain != path and plain in learned and learned[plain] == shape:
        return plain
    name = path.replace(EXPERTS, "/")
    if EXPERTS in path and name in learned and learned[name] == shape[1:]:
        return name
    return None


def upcycle(dense: Tree, sparse: Tree) -> Tree:
    """Parameters of a sparse model that begins as the dense one: all of `carry_over`'s but routers.

    dense, sparse: nested dictionaries of parameters of two models of the same sizes, the sparse
    one freshly initialised.
    Raises UserError where a parameter has no counterpart of its shape, or is left over.
    """
    source, target = module.flatten(dense), module.flatten(sparse)
    params, fresh, unused = carry_over(source, sparse)
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
