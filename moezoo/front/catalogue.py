"""What there is to choose from: the configurations that come with the package, by name.

A name is that of its file below `configs/`, such as `rooms/m3vit_tiny`; the part behind the slash
is enough where one configuration only has it, or one only is about the tasks that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from moezoo.errors import UserError, unknown
from moezoo.models.shared.config import traits
from moezoo.registry import DOMAINS
from moezoo.train import config_file, saved
from moezoo.train.config import Config

OWN = config_file.FOLDERS[-1]  # those of the package; a folder `configs` here is somebody's own


@cache
def configurations() -> dict[str, Config]:
    """Every configuration that comes with the package, by name."""
    files = {path.relative_to(OWN).with_suffix("").as_posix(): path for path in _files()}
    return {name: config_file.read(path).config for name, path in files.items()}


def _files() -> list[Path]:
    return [path for path in sorted(OWN.rglob("*.py")) if not path.name.startswith("_")]


def list_models(
    domain: str | None = None, task: str | None = None, pretrained: bool = False
) -> list[str]:
    """The names of all models that `create` knows, those with weights first.

    domain: only those that read images, text, audio or pairs.   task: only those trained on it.
    pretrained: only those whose weights come with the package. Raises UserError for a domain or a
    task that there is none of.
    """
    found = configurations()
    sections: tuple[Any, ...] = DOMAINS.all()
    every = [section().domain for section in sections]
    domains = {one.name: one for one in every}
    if domain is not None and domain not in domains:
        raise unknown("domain", domain, list(domains))
    tasks = {name for one in domains.values() for name in one.tasks}
    if task is not None and task not in tasks:
        raise unknown("task", task, sorted(tasks))
    chosen = [
        name
        for name, config in found.items()
        if domain in (None, traits(config.model).reads)
        and (task is None or task in config.tasks)
        and (not pretrained or name in saved.names())
    ]
    return sorted(chosen, key=lambda name: (name not in saved.names(), name))


def full_name(name: str, tasks: Iterable[str] | None = None) -> str:
    """The whole name that a name means; among several the only one that has all of `tasks`, or
    of those the only one that has no others.

    Raises UserError with the nearest names where there is none, and with all where several fit.
    """
    known = configurations()
    plain = name.removesuffix(".py").removeprefix("configs/")
    if plain in known:
        return plain
    same = [one for one in known if one.rpartition("/")[2] == plain]
    wanted = set(tasks or ())
    fitting = [one for one in same if wanted <= set(known[one].tasks)] if wanted else same
    exact = [one for one in fitting if wanted == set(known[one].tasks)]
    fitting = exact if len(exact) == 1 else fitting
    if len(fitting) == 1:
        return fitting[0]
    if len(same) > 1:
        raise UserError(f"'{name}' may be {' or '.join(fitting or same)}: give the whole name.")
    if same:
        return same[0]
    short = [one.rpartition("/")[2] for one in known]
    raise unknown("model", name, list(known) if "/" in plain else list(dict.fromkeys(short)))
