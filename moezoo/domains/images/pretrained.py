"""Runs on images that start from a pretrained vision transformer: does it fit, and what would."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flax import nnx

from moezoo.domains.images.data.transforms import MEAN, STD
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.embed import grid_of
from moezoo.tasks import registry
from moezoo.train import upcycling
from moezoo.train.domain import Pretrained
from moezoo.train.schema import Config
from moezoo.train.setup import make_tasks
from moezoo.weights import ranks, vit, vit_config, vit_source, vit_tasks
from moezoo.weights.fold import Normalisation
from moezoo.weights.vit import Misfit, Target
from moezoo.weights.vit_source import COUNTERS, ViTSource

OURS = Normalisation(tuple(map(float, MEAN)), tuple(map(float, STD)))
USUAL_HEAD = 64  # features of a head in the published sizes


class VisionTransformers(Pretrained):
    """Files of augreg, timm and DeiT, of M3ViT's and MLoRE's code, and folders of transformers."""

    what = wanted = "a pretrained vision transformer"
    has_options = True

    def knows(self, path: Path) -> bool:
        """Every file, folders that contain one, and those with a file for each rank."""
        return not path.is_dir() or vit_config.is_folder_of_vit(path) or ranks.is_folder(path)

    def look(self, path: Path) -> None:
        """Raise UserError for files of another form, and for damaged ones."""
        vit_source.source(path)

    def check(self, path: Path, config: Config) -> None:
        """Raise UserError if the weights and the configured model do not fit together.

        Called before data is generated; names the options that make them fit, after trying them.
        """
        source = vit_source.source(path)
        wrong = vit.misfits(source, target(config), config.start_without)
        if wrong:
            raise UserError(
                f"'{path}' does not fit the model: {vit.told(wrong)}{_way(source, config)}"
            )

    def shapes(self, path: Path) -> Mapping[str, tuple[int, ...]]:
        """Those of the trunk's parameters."""
        return vit_source.source(path).shapes

    def arrays(
        self, path: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """The trunk's parameters for a model whose parameters have these shapes."""
        given = _target(config, shapes)
        return dict(vit.read(vit_source.source(path), given, config.start_without, OURS))

    def left_behind(self, path: Path, config: Config) -> str:
        """What in the weights is not part of the trunk, as an extra sentence; "" for nothing."""
        source, without = vit_source.source(path), config.start_without
        beyond = [name for name in source.beyond if not name.endswith(COUNTERS)]
        parts = sorted({name.rpartition(".")[0] or name for name in beyond})
        told = [source.weights.note] if source.weights.note else []
        told += [f"used only in pre-training, and ignored: {', '.join(parts)}"] if parts else []
        told += _of_tasks(source, config)
        told += [f"left out as asked: {', '.join(without)}"] if without else []
        if source.pixels is None:
            told.append(
                "their normalisation of pixels is not told: ImageNet's mean and deviation are used"
            )
        return f" Its weights: {'; '.join(told)}." if told else ""


def _of_tasks(source: ViTSource, config: Config) -> list[str]:
    """What became of the routers and heads of a whole model."""
    wanted = target(config)
    left = vit.left(source, wanted)
    told = [f"of no use for these tasks, and ignored: {', '.join(left)}"] if left else []
    if len(wanted.tasks) > 1 and vit_tasks.in_order(source, wanted.shapes):
        tasks = ", ".join(wanted.tasks)
        told.append(f"routers are taken in the order of these tasks: {tasks}")
    return told


def target(config: Config) -> Target:
    """What the configured model requires of weights; no data is opened."""
    return _target(config, model_shapes(config))


def model_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of the configured model's parameters and statistics; no data is opened."""
    domain = config.data.domain
    tasks = make_tasks(config, domain.known_classes())
    model: Any = config.model
    channels = {task.name: task.channels for task in tasks}
    size = domain.size(config)
    parts = module.abstract(lambda: model.build(channels, size, nnx.Rngs(config.seed)))
    leaves = module.flatten(parts.params) | module.flatten(parts.stats)
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _target(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Target:
    model: Any = config.model
    size = config.data.domain.size(config)
    tasks = tuple(registry.in_order(config.tasks, config.data.domain.tasks))
    grid, begins = grid_of(size, model.patch), upcycling.beginning(config)
    return Target(shapes, grid, model.heads, config.start_heads, tasks, begins)


def _way(source: ViTSource, config: Config) -> str:
    """The end of the sentence: the options that make it fit, if there are any."""
    changes = _changes(source, config)
    try:
        better = _changed(config, changes)
        left = vit.misfits(source, target(better), config.start_without)
        without = _patterns(left, source)
        if without:
            changes["start_without"] = (*config.start_without, *without)
            better = _changed(config, changes)
            left = vit.misfits(source, target(better), better.start_without)
    except UserError as error:
        return f"; with its sizes ({words(changes)}) there is another problem: {error}"
    if left:
        return f"; the model cannot take it: {vit.told(left)}. Use another file."
    out = "" if "start_without" in changes else "; name what is to be left out in start_without"
    return f": add {words(changes)}{out}."


def _changes(source: ViTSource, config: Config) -> dict[str, Any]:
    """Options in which the model differs from the weights."""
    wanted = vit.options(source)
    width: Any = wanted["width"]
    heads = source.heads or config.start_heads or max(1, width // USUAL_HEAD)
    wanted["heads"] = heads
    ratio = wanted.get("mlp_ratio")
    model: Any = config.model
    names = {field.name for field in fields(model)}
    split = config.upcycle.experts == "split"  # any ratio that divides the MLP's fits there
    if "expert_ratio" in names and ratio is not None and "expert_ratio" not in wanted and not split:
        wanted["expert_ratio"] = ratio
    changes = {
        f"model.{name}": value
        for name, value in wanted.items()
        if name in names and getattr(config.model, name) != value
    }
    if source.heads is None and config.start_heads is None:
        changes = {"start_heads": heads} | changes
    elif source.heads is not None and config.start_heads not in (None, source.heads):
        changes = {"start_heads": source.heads} | changes
    patch: Any = wanted.get("patch")
    size = config.data.domain.size(config)
    if patch and (size[0] % patch or size[1] % patch):
        changes["data.resolution"] = tuple(max(patch, round(n / patch) * patch) for n in size)
    return changes


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    parts = {"model": {}, "data": {}, "": {}}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        parts[section][field] = value
    model: Any = config.model
    section: Any = config.data
    data = replace(section, **parts["data"])
    return replace(config, model=replace(model, **parts["model"]), data=data, **parts[""])


def _patterns(left: list[Misfit], source: ViTSource) -> list[str]:
    """The parts that the model cannot take whatever its options, as patterns over whole modules.

    Only parts that the weights have and the model lacks: the reverse cannot be left out.
    """
    paths = [one.path for one in left if one.path in source.shapes or one.path in source.unknown]
    if len(paths) < len(left):
        return []
    parts = dict.fromkeys(_part(path) for path in paths if path)
    by_block: dict[str, list[str]] = {}
    for part in parts:
        first, *rest = part.split("/")
        inner = "/".join(rest[1:]) if first == "blocks" else ""
        by_block.setdefault(f"blocks/*/{inner}" if inner else part, []).append(part)
    every = source.depth
    found = (
        [general] if len(some) == every or general in some else some
        for general, some in by_block.items()
    )
    return [pattern for some in found for pattern in some]


def _part(path: str) -> str:
    """The module of ours that a parameter belongs to, as far as it can be left out as a whole."""
    parts = path.split("/")
    inside = 4 if parts[3:4] == ["router"] else 3
    return "/".join(parts[:inside] if parts[0] == "blocks" else parts[:1])


def words(changes: Mapping[str, Any]) -> str:
    """Options as one types them."""
    made = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else (value,)
        made += [f"--{name}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(made)
