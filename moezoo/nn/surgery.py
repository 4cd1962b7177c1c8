"""Selecting and replacing sub-modules by path; paths are those of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx


def get(root: nnx.Module, path: str) -> Any:
    """The sub-module at `path`, such as "blocks/1/mlp"; "" is the module itself.

    Raises KeyError naming the part of the path that does not exist.
    """
    node: Any = root
    for name in path.split("/") if path else []:
        try:
            node = _child(node, name)
        except (AttributeError, KeyError, IndexError, ValueError):
            raise KeyError(f"no '{name}' of '{path}' in {type(node).__name__}") from None
    return node


def replace(root: nnx.Module, path: str, new: Any) -> None:
    """Put `new` in the place of the sub-module at `path`, which must exist."""
    get(root, path)
    folder, _, name = path.rpartition("/")
    parent = get(root, folder)
    if isinstance(parent, nnx.List):
        parent[int(name)] = new
    elif isinstance(parent, nnx.Dict):
        parent[name] = new
    else:
        setattr(parent, name, new)


def remove(root: nnx.Module, path: str) -> None:
    """Take the entry at `path` out of its dictionary (a head of another task, for example)."""
    get(root, path)
    folder, _, name = path.rpartition("/")
    parent = get(root, folder)
    if not isinstance(parent, nnx.Dict):
        raise TypeError(f"'{path}' is no entry of a dictionary, it can only be replaced")
    del parent[name]


def find(root: nnx.Module, wanted: type | Callable[[Any], bool]) -> dict[str, Any]:
    """All sub-modules of a type, or for which a predicate holds, by path; outermost first."""
    holds = (lambda m: isinstance(m, wanted)) if isinstance(wanted, type) else wanted
    return {path: m for path, m in _walk(root, "") if holds(m)}


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, node
    for name, child in _children(node):
        yield from _walk(child, f"{path}/{name}" if path else name)


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, nnx.List):
        items = [(str(i), child) for i, child in enumerate(node)]
    elif isinstance(node, nnx.Dict):
        items = list(node.items())
    else:
        items = list(vars(node).items())
    return [(name, child) for name, child in items if isinstance(child, nnx.Module)]


def _child(node: Any, name: str) -> Any:
    if isinstance(node, nnx.List):
        return node[int(name)]
    return node[name] if isinstance(node, nnx.Dict) else getattr(node, name)
