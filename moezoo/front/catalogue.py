"""What there is to choose from: the configurations that come with the package, by name.

A name is that of its file below `configs/`, such as `rooms/m3vit_tiny`; the part behind the slash
is enough where one configuration only has it, or one only is about the tasks that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from moezoo.errors import UserError, unknown
from moezoo.front import printed
from moezoo.train import zoo

if TYPE_CHECKING:
    from moezoo.train.config import Config


class Entry(NamedTuple):
    """What a configuration reads, by the name of its domain, and its tasks."""

    reads: str
    tasks: tuple[str, ...]


@cache
def entries() -> Mapping[str, Entry]:
    """Every configuration that comes with the package, by name; without JAX where that can be."""
    kept = printed.cards()
    if kept:
        return {name: Entry(one.reads, one.tasks) for name, one in kept.items()}
    from moezoo.models.shared.config import traits

    return {
        name: Entry(traits(config.model).reads, config.tasks)
        for name, config in ((name, configuration(name)) for name in printed.sources())
    }


@cache
def configuration(name: str) -> Config:
    """The configuration of this whole name."""
    from moezoo.train import config_file

    return config_file.read(printed.sources()[name]).config


def row(name: str) -> tuple[str, ...]:
    """A line of the list of models: name, size of its weights, what it reads, tasks."""
    entry, held = entries()[name], zoo.ZOO / name
    size = f"{(held / zoo.WEIGHTS).stat().st_size / 1e6:.1f} MB" if zoo.holds(held) else "-"
    return name, size, entry.reads, ", ".join(entry.tasks)


WORDS = {str: "a name", bool: "True or False"}


def list_models(
    domain: str | None = None, task: str | None = None, pretrained: bool = False
) -> list[str]:
    """The names of all models that `create` knows, those with weights first.

    domain: only those that read images, text, audio or pairs.   task: only those trained on it.
    pretrained: only those whose weights come with the package. Raises UserError for a domain or a
    task that there is none of.
    """
    for what, value, kind in (
        ("domain", domain, str),
        ("task", task, str),
        ("pretrained", pretrained, bool),
    ):
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{what} is {value!r:.60}; it must be {WORDS[kind]}.")
    found = entries()
    _check_known(found, domain, task)
    held = zoo.names()
    chosen = [
        name
        for name, entry in found.items()
        if domain in (None, entry.reads)
        and (task is None or task in entry.tasks)
        and (not pretrained or name in held)
    ]
    return sorted(chosen, key=lambda name: (name not in held, name))


def _check_known(found: Mapping[str, Entry], domain: str | None, task: str | None) -> None:
    """UserError for a domain or a task that there is none of."""
    reads = {entry.reads for entry in found.values()}
    trained = {name for entry in found.values() for name in entry.tasks}
    if domain in (None, *reads) and task in (None, *trained):
        return
    from moezoo.registry import DOMAINS  # imports JAX

    sections: tuple[Any, ...] = DOMAINS.all()
    domains = {one.name: one for one in (section().domain for section in sections)}
    if domain is not None and domain not in domains:
        raise unknown("domain", domain, list(domains))
    tasks = {name for one in domains.values() for name in one.tasks}
    if task is not None and task not in tasks:
        raise unknown("task", task, sorted(tasks))


def full_name(name: str, tasks: Iterable[str] | None = None) -> str:
    """The whole name that a name means; among several the only one that has all of `tasks`, or
    of those the only one that has no others.

    Raises UserError with the nearest names where there is none, and with all where several fit.
    """
    known = entries()
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
    names = list(known) if "/" in plain else list(dict.fromkeys(short))
    if not get_close_matches(name, names):
        raise UserError(
            f"Unknown model '{name}': moezoo list shows all; a run, a saved model or an export is "
            "named by its folder, and there is none of that name."
        )
    raise unknown("model", name, names)
