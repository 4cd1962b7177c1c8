"""A run's model as a folder with its card: what made it, and what it scores as it was stored."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from moezoo.errors import UserError
from moezoo.front import catalogue
from moezoo.front.build import load
from moezoo.front.model import ZooModel
from moezoo.nn import module
from moezoo.train import origin, restore, saved, zoo
from moezoo.train.config import Config
from moezoo.train.scoring import score_run
from moezoo.weights.files import check_new

FREE = ("name", "directory", "mesh", "hosts", "log", "checkpoint")  # nothing is learned from these


def save_run(run: Path, folder: Path, hardware: str = "", by: str = "", licence: str = "") -> Path:
    """Write the model of a run's newest valid checkpoint, with the scores of what was written.

    hardware: what it was trained on.   by: the command that did.   licence: of the weights; without
    one the card says none, because that is for who trained them to say. Raises UserError where
    there is no run, or `folder` exists.
    """
    check_new(folder)
    model = load(run)
    if not isinstance(model, ZooModel):
        raise UserError(f"{run} is an export, which holds one task's program: name its run.")
    # Folders of the place where it was trained say nothing to others.
    config = replace(model.config, directory="runs", start_from=_named(model.config.start_from))
    facts = {"command": by or command(model.config), "hardware": hardware, "seed": str(config.seed)}
    facts |= {"data": config.data.name, "licence": licence}
    facts = {name: said for name, said in facts.items() if said}
    about = model.about._replace(facts=facts)
    parts = module.split(model._loaded.model)
    with tempfile.TemporaryDirectory() as place:
        rounded = saved.write(Path(place) / "model", config, parts.params, parts.stats, about)
        scores = score_run(rounded).scores
    about = about._replace(scores=scores)
    return saved.write(folder, config, parts.params, parts.stats, about, _own_code(run))


def _own_code(run: Path) -> dict[str, bytes]:
    """The file that defines what the configuration names, where it is none of the package's."""
    path = zoo.located(run)
    found = path if zoo.holds(path) else restore.find(path, say=lambda _: None).parent.parent
    # What the package defines needs nobody's file, whose place is nobody's business.
    return {} if origin.of_package(found) else origin.kept(found)


def _named(start: str | None) -> str | None:
    """What a run began with, without the folders around it."""
    return None if start is None else Path(start).name


def command(config: Config) -> str:
    """What trains this configuration, where it is one of the package's."""
    for name in catalogue.entries():
        known = catalogue.configuration(name)
        same = replace(known, **{field: getattr(config, field) for field in (*FREE, "start_from")})
        if same == config:
            return f"moezoo train {name}"
    return "a configuration of its own, see config.json"
