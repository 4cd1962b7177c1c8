"""The card of a model: what it is, what its paper claims, what was measured, what it costs.

`python -m moezoo.front.card` keeps those of the package's models in a file (`printed`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.deploy.runtime.forms import ExportError
from moezoo.deploy.runtime.load import Predictor, load_export
from moezoo.errors import UserError
from moezoo.front import catalogue, printed
from moezoo.front.printed import ModelCard, Printed
from moezoo.models.shared.card import Card
from moezoo.models.shared.config import traits
from moezoo.nn import module, surgery
from moezoo.nn.moe import MoE
from moezoo.ops.expert import count_experts
from moezoo.train import log, restore, start, zoo
from moezoo.train.config import Config
from moezoo.train.setup import make_builder, make_tasks
from moezoo.weights import library
from moezoo.weights.tensor_file import TensorFile

CODE = ("licence of the code", "Apache-2.0")
PROGRAM, MANIFEST = start.PROGRAM, "manifest.json"


def title_of(config: Config) -> str:
    """The name of a configuration's system."""
    card: Card | None = traits(config.model).card
    return card.title if card else type(config.model).__name__.removesuffix("Config")


def of(model: Path | str) -> ModelCard:
    """The card of a configuration by name, of a run, saved model, export or library of adapters.

    UserError where there is nothing.
    """
    path, given = Path(model), str(model)
    if exported(path):
        return _of_export(path)
    if (path / library.MANIFEST).is_file():
        return _of_library(path)
    if path.is_file() and path.suffix != ".py":
        raise UserError(
            f"{path} is a file: name a model (moezoo list), or the folder of a run, a saved model "
            "or an export."
        )
    if path.exists() and path.suffix != ".py":
        words = ""
    else:
        given = catalogue.full_name(given)
        path, words = zoo.ZOO / given, printed.words(given)
    config = restore.read_config(path) if path.exists() else catalogue.configuration(given)
    about = _about(path)
    lines = [*paper(config), *_sizes(config), *printed.trained(about)]
    return ModelCard(given, lines, words, _tensors(config))


def _about(path: Path) -> zoo.About | None:
    """What is known of the weights of a saved model, or of a run as far as it has come."""
    if zoo.holds(path):
        return zoo.read_about(path)
    if not path.is_dir():
        return None
    try:
        newest = restore.find(path, say=lambda sentence: None)
    except UserError:  # a run that has not saved yet
        return None
    step = int(newest.name)
    return zoo.About(step, f"step {step} of this run", scores=scores_of(path, step))


def scores_of(run: Path, step: int) -> dict[str, dict[str, float]]:
    """By task what a run scored on its test data after this step; {} where it has not yet."""
    rows = log.read(run / log.NAME)
    row = next((r for r in rows if r.get("split") == "test" and r["step"] == step), {})
    found: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        task, slash, score = name.partition("/")
        if slash and isinstance(value, float):
            found.setdefault(task, {})[score] = value
    return found


def config_of(name: str) -> Config:
    """The configuration of a model of the package, by its whole name: that of its weights."""
    held = zoo.ZOO / name
    return restore.read_config(held) if zoo.holds(held) else catalogue.configuration(name)


def to_print(name: str) -> Printed:
    """What `printed` keeps of a model of the package, computed."""
    config = config_of(name)
    lines = [*paper(config), *_sizes(config)]
    return Printed(traits(config.model).reads, config.tasks, lines)


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


def _of_library(folder: Path) -> ModelCard:
    found = library.Library(folder)
    more = ", ..." if found.names[8:] else ""
    ranks = sorted({form.rank for form in found.layers.values()})
    lines = [
        ("what it is", "a library of LoRAs of one base (moezoo generate --library)"),
        ("base", found.base.name),
        ("members", f"{len(found.names)}: {', '.join(found.names[:8])}{more}"),
        ("layers", f"{len(found.layers)}, rank {', '.join(map(str, ranks))}"),
    ]
    about = f"Tasks and groups of its members: moezoo library list {folder}"
    return ModelCard(str(folder), lines, about, {})


def paper(config: Config) -> list[tuple[str, str]]:
    """The lines of a card about the system."""
    card: Card | None = traits(config.model).card
    if card is None:
        return [("system", title_of(config))]
    variant = traits(config.model).variant()
    if variant is not None:  # what was measured of the paper's system says nothing of this one
        return [
            ("system", card.title),
            ("what it is", variant),
            ("numbers compared with", card.parity),
        ]
    return [
        ("system", card.title),
        ("paper", card.paper or "none: a baseline"),
        ("what it is", card.kind),
        ("numbers compared with", card.parity),
        ("measured, of the system", card.headline),
        ("trained configurations", ", ".join(card.trained) or "none"),
    ]


def _sizes(config: Config) -> list[tuple[str, str]]:
    domain = config.data.domain
    reads = f"{traits(config.model).reads} {domain.describe(config)}"
    begun = [
        ("begins with", config.start_from or "fresh parameters"),
        ("data", domain.told_data(config)),
    ]
    try:
        classes = domain.example(config)[1]
    except UserError as missing:  # such as files of one's own that decide the tasks
        return [*begun, ("reads", reads), ("sizes", f"not known yet: {missing}"), CODE]
    tasks = make_tasks(config, classes)
    shapes: dict[str, Any] = {}

    def build() -> Any:
        made = make_builder(config, tasks)()
        shapes["idle"] = sum(_idle(layer) for layer in surgery.find(made, MoE).values())
        return made

    questions = domain.questions(config)
    parts = module.abstract(build)
    total, fixed = module.count(parts.params), module.count(parts.stats)
    lines = [
        *begun,
        ("reads", reads),
        ("tasks", ", ".join(f"{task.name} ({task.channels})" for task in tasks)),
        ("parameters, trained", f"{total:,}"),
        ("fixed: a frozen base, running means", f"{fixed:,}"),
    ]
    if questions:
        asked = " ".join(f"${one!r}" for one in questions)
        lines.append(("prompts, as bash has them", asked))
    if shapes["idle"]:
        lines.append(("active for a token", f"{total - shapes['idle']:,}"))
    macs = traits(config.model).macs(domain.size(config), {t.name: t.channels for t in tasks})
    if macs is not None:
        lines.append(("multiply-accumulates", f"{macs.total / 1e9:.4g} billion, all tasks"))
    return [*lines, CODE]


def _idle(layer: MoE) -> int:
    """Parameters of a layer's experts that a token does not pass."""
    held: Any = layer
    experts = count_experts(held.experts.stacked())
    numbers = module.count(module.split(held.experts).params)
    return numbers * (experts - min(held.router.k, experts)) // experts


def _tensors(config: Config) -> dict[str, tuple[int, ...]]:
    try:
        classes = config.data.domain.example(config)[1]
    except UserError:  # `_sizes` has said it
        return {}
    parts = module.abstract(make_builder(config, make_tasks(config, classes)))
    flat = {**module.flatten(parts.params), **module.flatten(parts.stats)}
    return {name: tuple(leaf.shape) for name, leaf in module.in_order(flat).items()}


if __name__ == "__main__":
    cards = {name: to_print(name) for name in printed.sources()}
    printed.FILE.write_text(printed.text(cards), encoding="utf-8")
