"""Every route over a library, by exact match: tasks that a member was trained on, and others.

Prompts are the test split of the generated instruction tasks. LoraHub searches its weights for each
task from examples of the training split, all other routes see no example.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from moezoo.backbones.generate import Settings
from moezoo.command import Positional, parse
from moezoo.domains.text.data.example import Instruction
from moezoo.domains.text.data.instruct import TASKS, Instructions
from moezoo.domains.text.library import BaseDecoder, open_base
from moezoo.domains.text.library_routes import (
    ROUTES,
    LibraryRoute,
    RouteOptions,
    StaticRoute,
    route,
)
from moezoo.domains.text.lorahub import composed
from moezoo.errors import UserError, unknown
from moezoo.json_text import json_text
from moezoo.timing import machine, versions
from moezoo.train.console import Console
from moezoo.train.files import check_file, write_atomically
from moezoo.weights.library import Library

LORAHUB, BASE = "lorahub", "base alone"


@dataclass(frozen=True)
class LibraryArguments:
    """Answer test prompts of all generated instruction tasks by every route over a library.

    Example: moezoo bench library library runs/skills_tiny --json library.json
    """

    library: Annotated[Path, Positional]
    """Folder of the library."""
    base: Annotated[Path, Positional]
    """Folder of its base, a run or a Hugging Face decoder."""
    count: int = 40
    """Test prompts of each task."""
    shots: int = 8
    """Examples that LoraHub sees of a task."""
    routes: tuple[str, ...] = ()
    """Routes to compare; default: all that this library has what they need for."""
    seed: int = 0
    """Seed of the prompts and of LoraHub's search."""
    json: Path | None = None
    """File for the numbers."""


def examples_of(task: str, split: str, count: int, seed: int) -> list[Instruction]:
    """Generated examples of one task."""
    made = Instructions(count, seed, split, (task,))
    return [made[i] for i in range(count)]


def prompt_of(example: Instruction) -> str:
    """What a user asks."""
    return example.turns[0].content


class Bare(LibraryRoute):
    """The base without any adapter."""

    def answers(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[str]:
        from moezoo.domains.text.inference import complete

        return complete(self.speaker(self.base.model), prompts, settings, seed)


class Searched(LibraryRoute):
    """LoraHub, with weights for every task that it is asked."""

    def __init__(self, base: BaseDecoder, library: Library, shots: int, seed: int):
        super().__init__(base, library, RouteOptions("factors"))
        self.shots, self.seed = shots, seed

    def answers(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[str]:
        found: dict[int, str] = {}
        for task in dict.fromkeys(tasks):
            shown = examples_of(task, "train", self.shots, self.seed)
            pairs = [(prompt_of(one), one.output) for one in shown]
            weights = composed(self.base, self.library, pairs, self.seed)
            own = StaticRoute(self.base, self.library, self.options, weights)
            places = [i for i, name in enumerate(tasks) if name == task]
            given = own.answers([prompts[i] for i in places], settings, seed)
            found |= dict(zip(places, given, strict=True))
        return [found[i] for i in range(len(prompts))]


def routes_of(a: LibraryArguments, base: BaseDecoder, library: Library) -> dict[str, LibraryRoute]:
    """The routes to compare, by name; those whose needs the library does not meet are left out
    where none was asked for by name."""
    found: dict[str, LibraryRoute] = {BASE: Bare(base, library, RouteOptions())}
    if LORAHUB in (a.routes or (LORAHUB,)):
        found[LORAHUB] = Searched(base, library, a.shots, a.seed)
    for name in (n for n in a.routes or ROUTES if n != LORAHUB):
        try:
            found[name] = route(name, base, library)
        except UserError:
            if a.routes:
                raise
    if not a.routes:  # both published combinations
        found["arrow, factors"] = route("arrow", base, library, RouteOptions("factors"))
        found["uniform, factors"] = route("uniform", base, library, RouteOptions("factors"))
    return found


def scores(
    chosen: LibraryRoute, tasks: Iterable[str], a: LibraryArguments
) -> tuple[dict[str, float], float]:
    """Exact match by task, and seconds for all answers."""
    examples = [e for task in tasks for e in examples_of(task, "test", a.count, a.seed)]
    prompts, names = [prompt_of(e) for e in examples], [e.task for e in examples]
    settings = Settings(new=24)
    began = time.perf_counter()
    answers = chosen.answers(prompts, settings, a.seed, names)
    took = time.perf_counter() - began
    right: dict[str, list[bool]] = {}
    for example, answer in zip(examples, answers, strict=True):
        right.setdefault(example.task, []).append(answer == example.output)
    return {task: float(np.mean(found)) for task, found in right.items()}, took


def run(words: list[str]) -> int:
    """Answer, compare, print a table, write the file."""
    a = parse(LibraryArguments, words, prog="moezoo bench library")
    if a.count < 1 or a.shots < 1:
        raise UserError("--count and --shots must be at least 1.")
    for name in a.routes:
        if name not in ROUTES and name != LORAHUB and not name.startswith("task:"):
            raise unknown("route over a library", name, [*ROUTES, LORAHUB])
    check_file(a.json)
    library, base = Library(a.library), open_base(a.base)
    seen = tuple(t for t in TASKS if any(t in m.tasks for m in library.members.values()))
    others = tuple(t for t in TASKS if t not in seen)
    rows: list[dict[str, Any]] = []
    console = Console()
    for name, chosen in routes_of(a, base, library).items():
        # Nobody is an oracle of a task that the library has not.
        wanted = seen if name == "oracle" else (*seen, *others)
        found, took = scores(chosen, wanted, a)
        rows.append({"route": name, "seconds": took, "tasks": found})
        rows[-1] |= _means(found, seen, others)
        reached = rows[-1]["tasks of members"]
        console.say(f"{name}: {reached} in {took:.0f} s")
    _show(a, rows, library, console)
    return 0


def _means(
    found: Mapping[str, float], seen: Sequence[str], others: Sequence[str]
) -> dict[str, float | None]:
    def mean(tasks: Sequence[str]) -> float | None:
        held = [found[t] for t in tasks if t in found]
        return float(np.mean(held)) if held else None

    return {"tasks of members": mean(seen), "other tasks": mean(others)}


def _show(
    a: LibraryArguments, rows: Sequence[Mapping[str, Any]], library: Library, console: Console
) -> None:
    columns = ("route", "tasks of members", "other tasks", "seconds")
    table = [tuple("-" if row[c] is None else row[c] for c in columns) for row in rows]
    title = f"Exact match, {a.count} prompts of each task, {len(library.names)} adapters"
    console.table(title, columns, table)
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib")}
        write_atomically(a.json, json_text(facts | {"rows": rows}, 2))
