"""Cards of the package's models, computed once and kept, so that nobody waits for JAX to read one.

`python -m moezoo.front.card` writes `printed.json` anew; a test computes every card again. Where
configurations have changed since, nothing here is used and everything is computed when asked for.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from moezoo.train import zoo

FILE = Path(__file__).with_name("printed.json")
FACTS = {"command": "trained by", "hardware": "trained on", "licence": "licence of the weights"}

CardLines = list[tuple[str, str]]


class ModelCard(NamedTuple):
    """What `moezoo info` shows. lines: name and what is said of it.   about: the configuration's
    own words.   tensors: shapes by path.
    """

    title: str
    lines: CardLines
    about: str
    tensors: Mapping[str, tuple[int, ...]]


class Printed(NamedTuple):
    """What is kept of a model.

    reads: the name of its domain.   lines: of its card, without those of its weights.
    """

    reads: str
    tasks: tuple[str, ...]
    lines: CardLines


def sources() -> dict[str, Path]:
    """The files of the package's configurations, by name."""
    found = sorted(zoo.CONFIGS.rglob("*.py"))
    return {
        path.relative_to(zoo.CONFIGS).with_suffix("").as_posix(): path
        for path in found
        if not path.name.startswith("_")
    }


def state() -> str:
    """A checksum of all configurations, also of those that lie beside weights."""
    sums = hashlib.sha256()
    held = {name: zoo.ZOO / name / zoo.CONFIG for name in zoo.names()}
    for table in (sources(), held):
        for name, path in table.items():
            sums.update(f"{name}\n{path.read_text(encoding='utf-8')}\n".encode())
    return sums.hexdigest()


@cache
def cards() -> Mapping[str, Printed]:
    """What is kept, by name; nothing where configurations are others than they were then."""
    try:
        kept: Any = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a clone in which it is being made
        return {}
    if kept["sha256"] != state():
        return {}
    return {
        name: Printed(one["reads"], tuple(one["tasks"]), [(a, b) for a, b in one["lines"]])
        for name, one in kept["models"].items()
    }


def text(made: Mapping[str, Printed]) -> str:
    """The content of the file that keeps these cards."""
    models = {name: one._asdict() for name, one in made.items()}
    return json.dumps({"sha256": state(), "models": models}, indent=1, ensure_ascii=False) + "\n"


def card(name: str) -> ModelCard | None:
    """The card of one of the package's models by its whole name, without tensors; None where
    nothing is kept of it.
    """
    found = cards().get(name)
    if found is None:
        return None
    held = zoo.ZOO / name
    about = zoo.read_about(held) if zoo.holds(held) else None
    return ModelCard(name, [*found.lines, *trained(about)], words(name), {})


def trained(about: zoo.About | None) -> CardLines:
    """The lines of a card about its weights."""
    if about is None:
        return []
    lines = [("weights", about.origin)]
    lines += [(FACTS.get(name, name), said) for name, said in about.facts.items()]
    for task, scores in about.scores.items():
        for name, value in scores.items():
            lines.append((f"test: {task}", f"{name} {value:.4g}"))
    return lines


def words(name: str) -> str:
    """What the configuration file of this whole name says of itself; "" where there is none."""
    path = sources().get(name)
    if path is None:
        return ""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
