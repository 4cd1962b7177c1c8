"""The card of a model: what it is, what its paper claims, what was measured, what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moezoo.deploy.runtime.forms import ExportError
from moezoo.deploy.runtime.load import Predictor, load_export
from moezoo.errors import UserError
from moezoo.front import catalogue
from moezoo.models.shared.card import Card
from moezoo.models.shared.config import traits
from moezoo.nn import module, surgery
from moezoo.nn.moe import MoE
from moezoo.ops.expert import count_experts
from moezoo.train import restore, saved, start
from moezoo.train.config import Config
from moezoo.train.config_file import read
from moezoo.train.setup import make_builder, make_tasks
from moezoo.weights.tensor_file import TensorFile

LICENCE = "Apache-2.0"
PROGRAM, MANIFEST = start.PROGRAM, "manifest.json"

FACTS = {"command": "trained by", "hardware": "trained on", "licence": "licence of the weights"}


class ModelCard(NamedTuple):
    """What `moezoo info` shows. lines: name and what is said of it.   about: the configuration's
    own words.   tensors: shapes by path.
    """

    title: str
    lines: list[tuple[str, str]]
    about: str
    tensors: dict[str, tuple[int, ...]]


def row(name: str) -> tuple[str, ...]:
    """A line of the list of models: name, size of its weights, what it reads, tasks."""
    config = catalogue.configurations()[name]
    held = saved.ZOO / name
    size = f"{(held / saved.WEIGHTS).stat().st_size / 1e6:.1f} MB" if saved.holds(held) else "-"
    return name, size, traits(config.model).reads, ", ".join(config.tasks)


def title_of(config: Config) -> str:
    """The name of a configuration's system."""
    card: Card | None = traits(config.model).card
    return card.title if card else type(config.model).__name__.removesuffix("Config")


def of(model: Path | str) -> ModelCard:
    """The card of a configuration by name, a run, saved model or export; UserError for nothing."""
    about, path = None, saved.located(model)
    if exported(path):
        return _of_export(path)
    if path.exists() and not path.suffix == ".py":
        config = restore.read_config(path)
        about = saved.read_about(path) if saved.holds(path) else None
    else:
        config = catalogue.configurations()[catalogue.full_name(str(model))]
    lines = [*_paper(config), *_sizes(config), *_trained(about)]
    return ModelCard(str(model), lines, _words(str(model)), _tensors(config))


def exported(folder: Path) -> bool:
    """Whether a folder is an export, perhaps a damaged one."""
    # Checkpoints have a manifest, too.
    sealed = (folder / MANIFEST).is_file() and not (folder / restore.ARRAYS).is_dir()
    return (folder / PROGRAM).is_file() or sealed


def open_export(folder: Path) -> Predictor:
    """The export in a folder, verified; UserError where it is damaged."""
    try:
        return load_export(folder)
    except ExportError as error:
        raise UserError(str(error)) from error


def _of_export(folder: Path) -> ModelCard:
    found = open_export(folder)
    certificate = found.manifest["certificate"]
    lines = list(found.facts().items())
    test = certificate.get("test", {})
    if "metric" in test:
        metric = test["metric"]
        own, full = (test[of][metric] for of in ("path", "full"))
        said = f"{own:.4g}, whole model {full:.4g}, on {test['examples']}"
        lines.append((f"test: {metric}", said))
    held = TensorFile(folder / "model.safetensors").entries
    tensors = {name: tuple(entry.shape) for name, entry in held.items()}
    return ModelCard(str(folder), lines, str(certificate.get("statement", "")), tensors)


def _words(name: str) -> str:
    """What the configuration file of this name says of itself; "" where there is none."""
    try:
        full = catalogue.full_name(name)
    except UserError:
        return ""
    return (read(catalogue.OWN / f"{full}.py").__doc__ or "").strip()


def _paper(config: Config) -> list[tuple[str, str]]:
    card: Card | None = traits(config.model).card
    if card is None:
        return [("system", title_of(config))]
    return [
        ("system", card.title),
        ("paper", card.paper or "a baseline of nobody's"),
        ("what it is", card.kind),
        ("numbers compared with", card.parity),
        ("measured, of the system", card.headline),
        ("trained configurations", ", ".join(card.trained) or "none"),
    ]


def _parts(config: Config) -> Any:
    classes = config.data.domain.example(config)[1]
    return make_builder(config, make_tasks(config, classes))


def _sizes(config: Config) -> list[tuple[str, str]]:
    domain = config.data.domain
    classes = domain.example(config)[1]
    tasks = make_tasks(config, classes)
    shapes: dict[str, Any] = {}

    def build() -> Any:
        made = make_builder(config, tasks)()
        shapes["idle"] = sum(_idle(layer) for layer in surgery.find(made, MoE).values())
        return made

    parts = module.abstract(build)
    total, fixed = module.count(parts.params), module.count(parts.stats)
    lines = [
        ("reads", f"{traits(config.model).reads} {domain.describe(config)}"),
        ("tasks", ", ".join(f"{task.name} ({task.channels})" for task in tasks)),
        ("parameters, trained", f"{total:,}"),
        ("fixed: a frozen base, running means", f"{fixed:,}"),
    ]
    if shapes["idle"]:
        lines.append(("active for a token", f"{total - shapes['idle']:,}"))
    macs = traits(config.model).macs(domain.size(config), {t.name: t.channels for t in tasks})
    if macs is not None:
        lines.append(("multiply-accumulates", f"{macs.total / 1e9:.4g} billion, all tasks"))
    return [*lines, ("licence of the code", LICENCE)]


def _idle(layer: MoE) -> int:
    """Parameters of a layer's experts that a token does not pass."""
    held: Any = layer
    experts = count_experts(held.experts.stacked())
    numbers = module.count(module.split(held.experts).params)
    return numbers * (experts - min(held.router.k, experts)) // experts


def _trained(about: saved.About | None) -> list[tuple[str, str]]:
    if about is None:
        return []
    lines = [("weights", about.origin)]
    lines += [(FACTS.get(name, name), said) for name, said in about.facts.items()]
    for task, scores in about.scores.items():
        for name, value in scores.items():
            lines.append((f"test: {task}", f"{name} {value:.4g}"))
    return lines


def _tensors(config: Config) -> dict[str, tuple[int, ...]]:
    parts = module.abstract(_parts(config))
    flat = {**module.flatten(parts.params), **module.flatten(parts.stats)}
    return {name: tuple(leaf.shape) for name, leaf in module.in_order(flat).items()}
