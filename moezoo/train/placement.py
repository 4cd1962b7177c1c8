"""Where every parameter lies: one table of path patterns, used by init, restore and export."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moezoo.errors import UserError
from moezoo.ops.exchange import dimension_to_split

MOMENTS = "optimiser"  # the entry of a state with the optimiser's arrays
Axes = tuple[str | None, ...]
Wish = Callable[[tuple[int, ...], Mesh], Axes]


class PlacementRule(NamedTuple):
    """Arrays whose path matches `pattern` anywhere are placed as `wish(shape, mesh)` says."""

    pattern: str
    wish: Wish


Rules = Sequence[PlacementRule]


class Placement(NamedTuple):
    """Shardings with the tree's structure, and what had to stay whole, `{path: reason}`."""

    shardings: Any
    kept_whole: dict[str, str]


def whole(shape: tuple[int, ...], mesh: Mesh) -> Axes:
    """The same whole array on every device."""
    return ()


def largest(shape: tuple[int, ...], mesh: Mesh) -> Axes:
    """The largest dimension that the fsdp axis divides, else the largest."""
    if not shape:
        return ()
    best = dimension_to_split(shape, mesh.shape["fsdp"])
    return tuple("fsdp" if i == best else None for i in range(len(shape)))


def stacked(shape: tuple[int, ...], mesh: Mesh) -> Axes:
    """Stacked experts [E, ...]: E over expert, then the largest other dimension over fsdp."""
    if not shape:
        return ()
    return ("expert", *(largest(shape[1:], mesh) if len(shape) > 2 else ()))


def columns(shape: tuple[int, ...], mesh: Mesh) -> Axes:
    """A kernel [in, out] whose outputs are split over tensor, then its inputs over fsdp.

    Every tensor device computes some features of all tokens; no communication follows
    (Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3).
    """
    return largest(shape, mesh) if mesh.shape["tensor"] == 1 else ("fsdp", "tensor")


def rows(shape: tuple[int, ...], mesh: Mesh) -> Axes:
    """A kernel [in, out] whose inputs are split over tensor as `columns` left them.

    The sum over tensor devices follows. Also a table [vocabulary, D].
    """
    return largest(shape, mesh) if mesh.shape["tensor"] == 1 else ("tensor", "fsdp")


def features(shape: tuple[int, ...], mesh: Mesh) -> Axes:
    """A bias behind `columns`, split like the features that it is added to."""
    return ("tensor",)


# A decoder's layers, plain or as the base of an adapter.
DECODER: Rules = (
    PlacementRule(r"(^|/)(attn/[qkv]|mlp/(gate|up)|lm_head)(/base)?/kernel$", columns),
    PlacementRule(r"(^|/)(attn/[qkv]|mlp/(gate|up))(/base)?/bias$", features),
    PlacementRule(r"(^|/)(attn/o|mlp/down)(/base)?/kernel$", rows),
    PlacementRule(r"(^|/)embed/table$", rows),
)

# The first that matches decides: experts' kernels are stacks before they are kernels.
DEFAULT: Rules = (
    PlacementRule(r"(^|/)experts/", stacked),
    *DECODER,
    PlacementRule(r"(^|/)(bias|scale|mean|var)$", whole),
    PlacementRule(r"(^|/)kernel$", largest),
    PlacementRule(r"", whole),
)


def spread(wish: Wish) -> Wish:
    """`wish`, and over data the largest dimension that it leaves whole and that data divides."""

    def over(shape: tuple[int, ...], mesh: Mesh) -> Axes:
        parts = mesh.shape["data"]
        asked = wish(shape, mesh)
        axes = [*asked, *(None,) * (len(shape) - len(asked))]
        # What does not divide its dimension is left out later, and data may have it.
        free = [
            i
            for i, axis in enumerate(axes)
            if shape[i] % parts == 0 and (axis is None or shape[i] % mesh.shape[axis])
        ]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "data"
        return tuple(axes)

    return over


def over_data(rules: Rules) -> Rules:
    """`rules`, with the optimiser's arrays split over data too.

    Each of the devices that hold the same parameters then holds, and updates, a part of the moments
    (ZeRO's first stage: Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 5.1).
    """
    return (
        *(
            PlacementRule(rf"^{MOMENTS}/(?=.*?(?:{one.pattern}))", spread(one.wish))
            for one in rules
        ),
        *rules,
    )


# By `optimiser.split`.
TABLES: dict[str, Rules] = {"with_parameters": DEFAULT, "over_data": over_data(DEFAULT)}


def like_moments(mesh: Mesh, rules: Rules) -> Callable[[Any], Any]:
    """A function that lays gradients where the optimiser's moments of them lie.

    Devices then sum gradients only for the part that each updates: a reduce-scatter in the place
    of an all-reduce.
    """

    def lay(grads: Any) -> Any:
        places = shardings(mesh, {MOMENTS: grads}, rules)[MOMENTS]
        return jax.lax.with_sharding_constraint(grads, places)

    return lay


def shardings(mesh: Mesh, tree: Any, rules: Rules = DEFAULT) -> Any:
    """A tree of NamedShardings like `tree`, which holds arrays or ShapeDtypeStructs.

    Works for parameters, statistics and optimiser state alike, because rules look at the end of
    a path: the momentum of `blocks/0/mlp/kernel` lies where the kernel lies.

    Raises UserError where the expert axis does not divide the number of experts.
    """
    return place(mesh, tree, rules).shardings


def place(mesh: Mesh, tree: Any, rules: Rules = DEFAULT) -> Placement:
    """`shardings` together with the list of arrays that an axis did not divide."""
    kept: dict[str, str] = {}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        wanted = _match(rules, name).wish(leaf.shape, mesh)
        return NamedSharding(mesh, _fitting(mesh, name, leaf.shape, wanted, kept))

    return Placement(jax.tree_util.tree_map_with_path(one, tree), kept)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as `params/blocks/0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _match(rules: Rules, name: str) -> PlacementRule:
    for rule in rules:
        if re.search(rule.pattern, name):
            return rule
    raise UserError(
        f"No placement rule matches {name}; end the table with PlacementRule('', whole)."
    )


def _fitting(
    mesh: Mesh, name: str, shape: tuple[int, ...], wanted: Axes, kept: dict[str, str]
) -> PartitionSpec:
    """`wanted` without the axes that do not divide their dimension, which `kept` collects."""
    spec: list[str | None] = []
    for size, axis in zip(shape, wanted, strict=False):
        parts = mesh.shape[axis] if axis else 1
        if size % parts == 0:
            spec.append(axis)
            continue
        # Dispatch needs whole experts on every device; other axes only save memory.
        if axis == "expert":
            raise UserError(
                f"{name} has {size} experts, which do not split evenly over "
                f"mesh.expert={parts} devices."
            )
        kept[name] = f"{size} is not a multiple of {axis}={parts}"
        spec.append(None)
    # JAX takes P("fsdp") and P("fsdp", None) for two different shardings.
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)
