"""From a dense network to one with experts that begins where the dense one stopped.

Komatsuzaki et al., "Sparse Upcycling" (arXiv:2212.05055): every expert starts as a copy of the MLP
that it replaces, routers start fresh. Where a token's weights add up to 1 and no choice is dropped
its experts then give exactly what the MLP gave: `softmax_then_top_k_renormalised` and a dropless
dispatch. With weights that are not renormalised, as in V-MoE's published code, the network starts
as another function; so does Soft MoE in any case, which mixes tokens before its experts.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.module import Tree

EXPERTS, ROUTER = "/experts/", "/router/"


def upcycle(dense: Tree, sparse: Tree) -> Tree:
    """Parameters of a sparse model that begins as the dense one.

    dense, sparse: nested dictionaries of parameters of two models of the same sizes, the sparse
    one freshly initialised. An expert kernel [E, in, out] at ".../mlp/experts/fc1/kernel" takes E
    copies of ".../mlp/fc1/kernel"; routers stay; everything else is taken over.
    Raises UserError where a parameter has no counterpart of its shape, or is left over.
    """
    source, target = module.flatten(dense), module.flatten(sparse)
    made = {path: _start(path, leaf, source) for path, leaf in target.items()}
    unused = sorted(set(source) - {path.replace(EXPERTS, "/") for path in target})
    if unused:
        raise UserError(
            f"Upcycling has no place for {unused[0]} of the dense model"
            f"{f' and {len(unused) - 1} more' if unused[1:] else ''}: build the sparse model with "
            "the same sizes and tasks."
        )
    return module.unflatten(made)


def _start(path: str, fresh: Any, source: dict[str, Any]) -> Array:
    if ROUTER in path:
        return fresh
    name = path.replace(EXPERTS, "/")
    if name not in source:
        raise UserError(f"Upcycling found no {name} in the dense model for {path}.")
    array = jnp.asarray(source[name], fresh.dtype)
    shape = fresh.shape[1:] if EXPERTS in path else fresh.shape
    if array.shape != shape:
        raise UserError(
            f"Upcycling found {name} of shape {array.shape} in the dense model, where the sparse "
            f"model needs {shape} for {path}."
        )
    return jnp.broadcast_to(array, fresh.shape)
