"""Upcycling as configured (`schema.UpcycleConfig`): what may be asked for, and doing it.

`nn.upcycle` says what experts begin as, `nn.upcycled` how routers, weights and noise follow. Step 0
computes what the dense model did (in evaluation, by float32, without noise on the experts) where

- tokens choose, by a dispatch that drops none of their choices,
- their weights add up to 1, or `gates` is rescaled, and
- `experts` is copy, or is split and K is a multiple of the number of groups.

With split and any other K a token misses some groups and has others twice: equal to the dense model
is then only the mean over all choices, and the start says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple
from zlib import crc32

import jax
import numpy as np

from moezoo.errors import UserError
from moezoo.models.shared.config import traits
from moezoo.nn import module, surgery, upcycled
from moezoo.nn.module import Tree
from moezoo.nn.upcycle import BEGINNINGS, Beginning, Shapes
from moezoo.ops.exchange import DROPPING
from moezoo.train.evaluate import to_host
from moezoo.train.schema import Config, UpcycleConfig

BATCHES = 4  # of the training data, whose tokens are clustered
TOKENS = 8192  # of a layer in one batch, at most

FirstBatches = Callable[[], Iterable[Mapping[str, Any]]]


def changed(options: UpcycleConfig) -> list[str]:
    """The options that are not the defaults, by their whole names."""
    names = [field.name for field in fields(options)]
    default = UpcycleConfig()
    return [f"upcycle.{n}" for n in names if getattr(options, n) != getattr(default, n)]


def beginning(config: Config) -> Beginning:
    """How experts begin where the start has an MLP."""
    return BEGINNINGS[config.upcycle.experts]


def shapes_of(parts: module.ModuleParts) -> dict[str, tuple[int, ...]]:
    """Of all parameters and statistics, by path."""
    leaves = module.flatten(parts.params) | module.flatten(parts.stats)
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def check(config: Config, parts: module.ModuleParts, learned: Shapes, what: str) -> None:
    """UserError for options that make no sense for this model and this start.

    parts: of the configured model, shapes for arrays. learned: the shapes that the start has, by
    path. what: the start, for the messages.
    """
    asked = changed(config.upcycle)
    if not asked:
        return
    layers = beginning(config)(learned, shapes_of(parts))
    if not layers:
        _refuse_sizes(config, learned, shapes_of(parts), what, asked[0])
    model = module.merge(*parts)
    for path, groups in layers.items():
        layer = surgery.get(model, path)
        _check_router(config, layer, path, groups)
        if config.upcycle.gates == "rescaled":
            _check_gates(config, layer, path, groups)


def _refuse_sizes(config: Config, learned: Shapes, own: Shapes, what: str, asked: str) -> None:
    said = f"{asked} is {getattr(config.upcycle, asked.partition('.')[2])}"
    none = f"{said}, but no experts of {config.name} begin as"
    other = {"copy": "split", "split": "copy"}[config.upcycle.experts]
    if BEGINNINGS[other](learned, own):
        instead = {
            "copy": "they are as large as those: take upcycle.experts copy",
            "split": "they are smaller: take upcycle.experts split",
        }[other]
        part = "parts of MLPs" if other == "copy" else "copies of MLPs"
        raise UserError(f"{none} {part} of {what}, because {instead}.")
    if config.upcycle.experts == "split":
        raise UserError(
            f"{none} parts of MLPs of {what}: their hidden units must divide those of the MLPs, "
            "and their number must be a multiple of the parts that this makes."
        )
    raise UserError(
        f"{none} copies of MLPs of {what}: take experts of the MLPs' size in their place, or leave "
        "the option out."
    )


def _check_router(config: Config, layer: Any, path: str, groups: int) -> None:
    """UserError where a layer's router cannot begin as asked."""
    options = config.upcycle
    if not upcycled.sees_tokens(layer):
        told = f"{path} of {config.name}, where no router of its own decides by single tokens"
        if options.experts == "split":
            raise UserError(f"upcycle.experts is split, which cannot be in {told}: take copy.")
        if options.router == "clusters":
            raise UserError(f"upcycle.router is clusters, which cannot be in {told}: take fresh.")
        return
    experts = layer.router.kernel.get_value().shape[-1]
    whole = upcycled.takes_whole_copies(layer, groups)
    if options.router == "clusters" and whole and experts == groups:
        raise UserError(
            f"upcycle.router is clusters, but {path} of {config.name} has one expert for each of "
            f"{groups} groups, and all of them are chosen: there is nothing to tell apart; take "
            "fresh, or more experts."
        )


def _check_gates(config: Config, layer: Any, path: str, groups: int) -> None:
    """UserError where no scale makes a layer the dense MLP, or none is needed."""
    said, where = "upcycle.gates is rescaled", f"in {path} of {config.name}"
    if gap := _gap(config, layer, groups):
        raise UserError(
            f"{said}, but {where} {gap.why}, so no scale makes step 0 the dense model: "
            f"{gap.instead}leave it as_is."
        )
    if upcycled.adds_up(layer):
        raise UserError(f"{said}, but {where} weights add up to 1 already: leave it as_is.")
    if config.upcycle.router == "clusters":
        raise UserError(
            f"{said}, for which routers begin near 0, and upcycle.router is clusters, which the "
            "first update would then replace: take one of them, or a selection whose weights add "
            "up to 1."
        )


class _Gap(NamedTuple):
    """Why a layer cannot begin as the dense MLP whatever its weights, and what to take instead."""

    why: str
    instead: str = ""


def _gap(config: Config, layer: Any, groups: int) -> _Gap | None:
    dispatch = traits(config.model).dispatch
    if upcycled.weight_sum(layer) is None or layer.experts.last is None:
        return _Gap("tokens do not choose their experts")
    if not upcycled.takes_whole_copies(layer, groups):
        return _Gap(
            f"a token's {layer.router.k} experts cannot be all {groups} parts equally often",
            f"take model.top_k {groups}, or ",
        )
    if dispatch in DROPPING:
        return _Gap(f"dispatch {dispatch} may drop choices", "take model.dispatch auto, or ")
    return None


def finished(
    config: Config,
    definition: Any,
    state: Tree,
    layers: Mapping[str, int],
    batches: FirstBatches | None,
) -> tuple[Tree, str]:
    """The state with routers, weights and noise as configured, and what was done, in one sentence.

    definition: of the model. layers: whose experts begin as an MLP, with their groups. batches: of
    training data on the model's devices; None: there are none to be had.
    Raises UserError where clusters are asked for without.
    """
    if not changed(config.upcycle):
        return state, ""
    kernels: dict[str, np.ndarray] = {}
    if config.upcycle.router == "clusters":
        if batches is None:
            raise UserError(
                "upcycle.router is clusters, for which there are no training data here: train the "
                "model, or take fresh."
            )
        kernels = _kernels(config, definition, state, layers, batches())
    model = module.merge(definition, state["params"], state["stats"])
    totals = {path: upcycled.weight_sum(surgery.get(model, path)) for path in layers}

    def change(params: Tree, stats: Tree, kernels: Mapping[str, jax.Array]) -> Tree:
        model = module.merge(definition, params, stats)
        for path, groups in layers.items():
            layer = surgery.get(model, path)
            _change(config.upcycle, layer, path, groups, kernels.get(path), totals[path], key)
        return module.split(model).params

    key = jax.random.fold_in(jax.random.key(config.seed), crc32(b"upcycle"))
    placed = jax.tree.map(lambda leaf: leaf.sharding, state["params"])
    change_jit = jax.jit(change, out_shardings=placed)
    params = change_jit(state["params"], state["stats"], kernels)
    return state | {"params": params}, told(config, model, layers)


def _change(
    options: UpcycleConfig,
    layer: Any,
    path: str,
    groups: int,
    kernel: jax.Array | None,
    total: float | None,
    key: jax.Array,
) -> None:
    """One layer as configured."""
    if kernel is not None:
        upcycled.set_kernel(layer.router, kernel)
    elif groups > 1 and upcycled.takes_whole_copies(layer, groups):
        own = layer.router.kernel
        own.set_value(upcycled.whole_copies(own.get_value(), groups))
    if options.gates == "rescaled":
        assert total is not None  # `check` refuses it
        upcycled.rescale(layer, total)
    if options.noise:
        count = max(1, round(options.noise_share * layer.experts.count))
        key = jax.random.fold_in(key, crc32(path.encode()))
        upcycled.disturb(layer.experts, options.noise, count, key)


def _kernels(
    config: Config,
    definition: Any,
    state: Tree,
    layers: Mapping[str, int],
    batches: Iterable[Mapping[str, Any]],
) -> dict[str, np.ndarray]:
    """Routers' matrices out of the tokens of the dense model: [D, E], or [J, D, E] of each task."""
    read = config.data.domain.read

    @jax.jit
    def seen(params: Tree, stats: Tree, batch: Mapping[str, Any]) -> dict[str, Any]:
        model, dense = module.merge(definition, params, stats), upcycled.DensePass(TOKENS)
        for path, groups in layers.items():
            dense.watch(surgery.get(model, path), path, groups)
        read(model, batch, train=False)
        return dense.seen

    found = [to_host(seen(state["params"], state["stats"], batch)) for batch in batches]
    model = module.merge(definition, state["params"], state["stats"])
    kernels = {}
    for path, groups in layers.items():
        x_ND, task_N = (np.concatenate([one[path][i] for one in found]) for i in range(2))
        layer = surgery.get(model, path)
        tasks, experts = layer.router.kernel.get_value().shape[:-2], layer.experts.count
        together = groups if upcycled.takes_whole_copies(layer, groups) else 1
        made = []
        for task in range(tasks[0] if tasks else 1):
            own = x_ND[task_N == task] if tasks and (task_N == task).any() else x_ND
            rng = np.random.default_rng([config.seed, crc32(path.encode()), task])
            made.append(upcycled.kernel_of(own, experts, together, rng))
        kernels[path] = np.stack(made) if tasks else made[0]
    return kernels


def told(config: Config, model: Any, layers: Mapping[str, int]) -> str:
    """What was done with the layers, in one further sentence."""
    options, (path, groups) = config.upcycle, next(iter(layers.items()))
    layer = surgery.get(model, path)
    whole = f"{groups} parts of the MLP, {layer.experts.count // groups} experts of each"
    parts = [f"experts in {', '.join(layers)} begin as {'the MLP' if groups == 1 else whole}"]
    parts += ["routers begin with clusters of tokens"] if options.router == "clusters" else []
    parts += ["weights begin equal and experts are scaled"] if options.gates == "rescaled" else []
    if options.noise:
        share = "" if options.noise_share == 1 else f" on {options.noise_share:.0%} of the experts"
        parts.append(f"with noise of {options.noise} deviations{share}")
    gap = _gap(config, layer, groups)
    if gap is None and options.gates == "as_is" and not upcycled.adds_up(layer):
        gap = _Gap("weights do not add up to 1")
    same = "there, noise apart, step 0 computes" if options.noise else "there step 0 computes"
    parts.append(
        f"{same} what the MLP did" if gap is None else f"step 0 is not the MLP, because {gap.why}"
    )
    return f" Upcycled: {'; '.join(parts)}."
