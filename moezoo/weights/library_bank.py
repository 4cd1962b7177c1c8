"""Members of a library put on the layers of their base: one merged update, or a bank to route over.

Two published ways to combine adapters under weights w stand side by side: `outputs` adds up what
they give, sum of w A B, and `factors` mixes their factors, (sum of w A) (sum of w B), which has
products of different members' factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.nn import surgery
from moezoo.nn.injection import Adapted
from moezoo.nn.layers import Linear
from moezoo.nn.library_routers import PrototypeRouter, SharesRouter
from moezoo.nn.lowrank import LowRank
from moezoo.nn.routers import Router
from moezoo.ops import lowrank
from moezoo.ops.prototypes import ARROW, PHATGOOSE, PrototypeScore
from moezoo.weights.library import LayerForm, Library
from moezoo.weights.peft import Factors

# By name: how a bank is applied under gates, and its one pair of factors under constant weights.
COMBINATIONS: dict[str, lowrank.Combine] = {
    "outputs": lowrank.by_block,
    "factors": lowrank.by_factor,
    "downs": lowrank.by_down,
}
# Of these, where an adapter of weight 0 counts even so: its second factor is added as it is.
UNWEIGHED = frozenset({"downs"})


def _outputs(a_EDr: Array, b_ErO: Array, weights_E: Array) -> lowrank.FactorPair:
    if int((weights_E != 0).sum()) < len(weights_E):  # ranks of members that weigh nothing
        kept = np.flatnonzero(np.asarray(weights_E))
        # Where nobody weighs anything, one adds nothing: an update of no ranks is none.
        kept = kept if kept.size else np.arange(1)
        a_EDr, b_ErO, weights_E = a_EDr[kept], b_ErO[kept], weights_E[kept]
    return lowrank.concatenated(a_EDr, b_ErO, weights_E)


def _factors(a_EDr: Array, b_ErO: Array, weights_E: Array) -> lowrank.FactorPair:
    a_Dr = jnp.einsum("e,edr->dr", weights_E, a_EDr, precision="highest")
    return a_Dr, jnp.einsum("e,ero->ro", weights_E, b_ErO, precision="highest")


MERGED: dict[str, Callable[[Array, Array, Array], lowrank.FactorPair]] = {
    "outputs": _outputs,
    "factors": _factors,
    "downs": lowrank.down_sum,
}


def check_combination(name: str) -> None:
    """Raise UserError for a combination that is not known."""
    if name not in COMBINATIONS:
        raise unknown("combination of adapters", name, list(COMBINATIONS))


def _stacked(
    layers: Mapping[str, LayerForm], members: Sequence[Mapping[str, Factors]]
) -> dict[str, tuple[Array, Array]]:
    """Factors by layer, [E, D, r] and [E, r, O]."""
    return {
        path: (
            jnp.asarray(np.stack([one[path].down for one in members])),
            jnp.asarray(np.stack([one[path].up for one in members])),
        )
        for path in layers
    }


def check_base(library: Library, root: nnx.Module, base: str, sha256: str) -> None:
    """Raise UserError where a decoder is not the one that the library's members belong to."""
    linear = surgery.find(root, Linear)
    for path, form in library.layers.items():
        kernel = linear[path].kernel.get_value().shape if path in linear else None
        if kernel != (form.inputs, form.outputs):
            raise UserError(
                f"The library {library.folder} has updates {form.inputs} x {form.outputs} for "
                f"{path}, which {base} {'has not' if kernel is None else f'has as {kernel}'}: its "
                f"base is {library.base.name}."
            )
    if sha256 != library.base.sha256:
        raise UserError(
            f"The adapters of {library.folder} were trained on {library.base.name}, whose arrays "
            f"are others than those of {base}: name their own base."
        )


def attach_merged(
    root: nnx.Module, library: Library, weights: Mapping[str, float], combination: str = "outputs"
) -> None:
    """One plain update per layer that is the weighted members, in place; exact, float32."""
    weights_E = jnp.asarray(list(weights.values()), jnp.float32)
    held = [library.factors(name) for name in weights]
    for path, (a_EDr, b_ErO) in _stacked(library.layers, held).items():
        a_DR, b_RO = MERGED[combination](a_EDr, b_ErO, weights_E)
        form = library.layers[path]
        update = _update(form, a_DR.shape[1], scale=form.scale)
        _put(root, path, update, a_DR, b_RO)


def attach_fresh(root: nnx.Module, layers: Mapping[str, LayerForm]) -> None:
    """A plain adapter that adds nothing yet on every layer, in place; always the same one."""
    rngs = nnx.Rngs(0)
    for path, form in sorted(layers.items()):
        update = LowRank(form.inputs, form.outputs, form.rank, scale=form.scale, rngs=rngs)
        surgery.replace(root, path, Adapted(surgery.get(root, path), update))


MakeLibraryRouter = Callable[[str], Router]  # of a layer's path


def attach_bank(
    root: nnx.Module,
    library: Library,
    names: Sequence[str],
    make_router: MakeLibraryRouter,
    combination: str = "outputs",
) -> None:
    """All named members on every layer, under a router of the layer's own, in place."""
    held = [library.factors(name) for name in names]
    attach_factors(root, library.layers, held, make_router, combination)


def attach_factors(
    root: nnx.Module,
    layers: Mapping[str, LayerForm],
    members: Sequence[Mapping[str, Factors]],
    make_router: MakeLibraryRouter,
    combination: str = "outputs",
) -> None:
    """`attach_bank` of adapters that are given by their factors."""
    for path, (a_EDr, b_ErO) in _stacked(layers, members).items():
        form = layers[path]
        options: dict[str, Any] = {"experts": len(members), "router": make_router(path)}
        options |= {"scale": form.scale, "combine": COMBINATIONS[combination]}
        update = _update(form, len(members) * form.rank, **options)
        _put(root, path, update, *lowrank.stacked(a_EDr, b_ErO))


def prototype_routers(
    library: Library, names: Sequence[str], best: int, score: PrototypeScore = ARROW
) -> MakeLibraryRouter:
    """Routers by the members' stored prototypes; see `PrototypeRouter`."""
    return routers_by([library.prototypes(name) for name in names], best, score)


def gate_routers(library: Library, names: Sequence[str], best: int) -> MakeLibraryRouter:
    """Routers by the members' trained gates, as PHATGOOSE has them."""
    return routers_by([library.gates(name) for name in names], best, PHATGOOSE)


def routers_by(
    prototypes: Sequence[Mapping[str, np.ndarray]], best: int, score: PrototypeScore = ARROW
) -> MakeLibraryRouter:
    """Routers by prototypes [D] of each adapter's layers."""

    def make(path: str) -> Router:
        held_ED = jnp.asarray(np.stack([one[path] for one in prototypes]))
        return PrototypeRouter(held_ED, best, score)

    return make


def shares_routers(names: Sequence[str]) -> MakeLibraryRouter:
    """Routers that take each row's shares of the members from the context."""

    def make(path: str) -> Router:
        return SharesRouter(len(names))

    return make


def mean_factors(members: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """The mean of several adapters' factors, A and B apart."""
    first = members[0]
    return {
        path: Factors(
            np.mean([one[path].down for one in members], axis=0),
            np.mean([one[path].up for one in members], axis=0),
            first[path].scale,
            {},
        )
        for path in first
    }


def _update(form: LayerForm, ranks: int, **options: Any) -> LowRank:
    return LowRank(form.inputs, form.outputs, ranks, rngs=nnx.Rngs(0), **options)


def _put(root: nnx.Module, path: str, update: LowRank, a_DR: Array, b_RO: Array) -> None:
    update.down.set_value(a_DR)
    update.up.set_value(b_RO)
    surgery.replace(root, path, Adapted(surgery.get(root, path), update))
