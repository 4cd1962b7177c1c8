"""Selecting and replacing sub-modules by path; paths are those of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx


@runtime_checkable
class OfTask(Protocol):
    """A part of a model that knows what is left of it for one task."""

    def of_task(self, task: int) -> Any:
        """The part for the task of this number alone."""
        ...


class MixtureSize(NamedTuple):
    """Of a mixture: the kind of its decision, experts in all, experts at work."""

    decision: str
    experts: int
    chosen: int


@runtime_checkable
class ExpertMixture(Protocol):
    """A part that mixes experts which cannot be taken out one by one, as those of a MoE layer can.

    Where its decision is the task's, it becomes a dense part (`of_task`).
    """

    @property
    def mixture_size(self) -> MixtureSize: ...


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
    # Before anything is changed: a path that does not exist raises here.
    get(root, path)
    folder, _, name = path.rpartition("/")
    _put(get(root, folder), name, new)


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


def retype(
    root: nnx.Module,
    change: Callable[[str, nnx.Variable], nnx.Variable],
    keep: type,
    path: str = "",
) -> None:
    """Put `change(path, variable)` in the place of every variable that is in no `keep` module."""
    if isinstance(root, keep):
        return
    for name, value in _items(root):
        here = f"{path}/{name}" if path else name
        if isinstance(value, nnx.Variable):
            _put(root, name, change(here, value))
        elif isinstance(value, nnx.Module):
            retype(value, change, keep, here)


def _items(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, nnx.List):
        return [(str(i), child) for i, child in enumerate(node)]
    return list(node.items() if isinstance(node, nnx.Dict) else vars(node).items())


def _children(node: Any) -> list[tuple[str, Any]]:
    return [(name, child) for name, child in _items(node) if isinstance(child, nnx.Module)]


def _put(parent: Any, name: str, new: Any) -> None:
    if isinstance(parent, nnx.List):
        parent[int(name)] = new
    elif isinstance(parent, nnx.Dict):
        parent[name] = new
    else:
        setattr(parent, name, new)


def _child(node: Any, name: str) -> Any:
    if isinstance(node, nnx.List):
        return node[int(name)]
    return node[name] if isinstance(node, nnx.Dict) else getattr(node, name)
