"""A network's layers one after the other: written out, or as one layer in a loop.

Both compute the same. Written out, the compiled program grows with depth, and so does the time to
compile it; in a loop it holds each kind of layer once, at the price of one more copy of the layers'
parameters while it runs. Layers keep their own parameters and paths either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn import module
from moezoo.nn.context import Context

LayerStep = Callable[[Any, Array, Context], Array]  # (layer, x, context) to x
Remember = Callable[[Callable[..., Any]], Callable[..., Any]]


class RunLayers(Protocol):
    """Takes x through layers.

    step: one layer's computation. name: where the layers are: layer 3 is `name/3`.
    remember: `jax.checkpoint`, or `everything` to keep all that the backward pass needs.
    Records and randomness are those of `context`: a layer is handed a key of its own.
    """

    def __call__(
        self,
        layers: Sequence[nnx.Module],
        step: LayerStep,
        x: Array,
        context: Context,
        *,
        name: str = "layers",
        remember: Remember = ...,
    ) -> Array: ...


def everything(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves a function as it is: its intermediate values stay for the backward pass."""
    return function


def unrolled(
    layers: Sequence[nnx.Module],
    step: LayerStep,
    x: Array,
    context: Context,
    *,
    name: str = "layers",
    remember: Remember = everything,
) -> Array:
    """Every layer written out; see `RunLayers`."""
    for i, layer in enumerate(layers):

        def one(x: Array, i: Array, layer: nnx.Module = layer) -> tuple[Array, dict[str, Any]]:
            return _apply(step, layer, x, context, i)

        x, records = remember(one)(x, jnp.asarray(i))
        context.records.update(_named(records, f"{context.within(name).path}/{i}"))
    return x


def scanned(
    layers: Sequence[nnx.Module],
    step: LayerStep,
    x: Array,
    context: Context,
    *,
    name: str = "layers",
    remember: Remember = everything,
) -> Array:
    """Neighbours of one structure as a loop over their stacked parameters; see `RunLayers`."""
    parts = [module.split(layer) for layer in layers]
    # Neighbours only: the order of layers must stay.
    for _, group in groupby(range(len(layers)), key=lambda i: _structure(parts[i])):
        indices = list(group)
        definition = parts[indices[0]].definition
        stacked = _stack([(parts[i].params, parts[i].stats) for i in indices])

        def one(x: Array, own: Any, definition: Any = definition) -> tuple[Array, Any]:
            i, (params, stats) = own
            return _apply(step, module.merge(definition, params, stats), x, context, i)

        x, records = jax.lax.scan(remember(one), x, (jnp.asarray(indices), stacked))
        for place, i in enumerate(indices):
            here = jax.tree.map(lambda a, place=place: a[place], records)
            context.records.update(_named(here, f"{context.within(name).path}/{i}"))
    return x


def _apply(
    step: LayerStep, layer: nnx.Module, x: Array, context: Context, i: Array
) -> tuple[Array, dict[str, Any]]:
    """One layer under a path of its own, so that a loop's body is the same for all of them."""
    key = None if context.key is None else jax.random.fold_in(context.key, i)
    here = replace(context, path="", key=key, records={})
    # Records leave as results: `jax.checkpoint` and `jax.lax.scan` trace the layer apart.
    return step(layer, x, here), here.records


def _structure(parts: module.ModuleParts) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten((parts.params, parts.stats))
    return parts.definition, tree, tuple((a.shape, a.dtype) for a in leaves)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _named(records: dict[str, Any], path: str) -> dict[str, Any]:
    return {f"{path}/{own}": record for own, record in records.items()}
