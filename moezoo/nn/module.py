"""A module is split once into a static definition and plain dictionaries of arrays.

Modules are built eagerly and changed by ordinary Python before the split. After it everything is
a function of plain nested dictionaries with string keys, so that `jax.jit`, Optax, Orbax and path
rules need to know nothing about modules. This is the only file that knows how Flax holds state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

Tree = dict[str, Any]
V = TypeVar("V")


class ModuleParts(NamedTuple):
    """What a module consists of.

    Attributes:
      definition: hashable structure without arrays; static in a jit closure.
      params: nested dictionary of what an optimiser trains.
      stats: nested dictionary of everything else (batch statistics), threaded explicitly.
    """

    definition: Any
    params: Tree
    stats: Tree


def split(module: nnx.Module) -> ModuleParts:
    """The module's definition, parameters and statistics; lists become keys "0", "1", ..."""
    # Everything that is no parameter is a statistic: no optimiser can get hold of it by accident.
    definition, params, stats = nnx.split(module, nnx.Param, ...)
    return ModuleParts(definition, _plain(params), _plain(stats))


def merge(definition: Any, params: Tree, stats: Tree) -> Any:
    """The module again, holding exactly these arrays (or tracers)."""
    return nnx.merge(definition, _indexed(params), _indexed(stats))


def updated_stats(module: nnx.Module) -> Tree:
    """The statistics a module holds now, for example after a forward pass in training."""
    return split(module).stats


def abstract(build: Callable[[], nnx.Module]) -> ModuleParts:
    """The parts of `build()` with `jax.ShapeDtypeStruct` leaves; allocates no array."""
    # A definition is no array, so it cannot be a result of `eval_shape`: it leaves by the side.
    definitions = []

    def shapes() -> tuple[Tree, Tree]:
        parts = split(build())
        definitions.append(parts.definition)
        return parts.params, parts.stats

    params, stats = jax.eval_shape(shapes)
    return ModuleParts(definitions[0], params, stats)


def create(build: Callable[[], nnx.Module]) -> ModuleParts:
    """The parts of `build()`, initialised in one compiled program instead of array by array."""
    definition = abstract(build).definition
    init = jax.jit(lambda: split(build())[1:], compiler_options=init_compiler_options())
    return ModuleParts(definition, *init())


def init_compiler_options() -> dict[str, int]:
    """For compiling an initialisation, which runs once: less optimisation, half the wait on CPU.

    The values are the same bit for bit.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionary -> `{"blocks/0/attn/qkv/kernel": leaf}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def in_order(by_path: Mapping[str, V]) -> dict[str, V]:
    """The same, sorted as people count: `blocks/3` before `blocks/11`.

    What comes out of a compiled program is sorted letter by letter.
    """

    def counted(path: str) -> list[tuple[bool, int, str]]:
        return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in path.split("/")]

    return dict(sorted(by_path.items(), key=lambda item: counted(item[0])))


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten` (empty dictionaries do not survive)."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def count(tree: Mapping[str, Any]) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in flatten(tree).values())


def _plain(state: Any) -> Tree:
    def strings(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {str(key): strings(value) for key, value in node.items()}
        return node

    return strings(nnx.to_pure_dict(state))


def _indexed(tree: Mapping[str, Any]) -> dict[str | int, Any]:
    """Flax indexes lists by integers; a key of digits is always a list index here."""
    return {
        int(key) if key.isdigit() else key: _indexed(node) if isinstance(node, Mapping) else node
        for key, node in tree.items()
    }
