"""Every route over a library, by exact match on four groups of tasks.

Tasks that a member was trained on; compositions of two of them in one instruction; tasks that
neither members nor base have seen; and the other generated ones, which a base may know. Prompts are
test examples. LoraHub searches its weights for each
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
from moezoo.bench.claims import Claim, claim_lines, score_of
from moezoo.command import Positional, parse
from moezoo.domains.text.data.example import Instruction
from moezoo.domains.text.data.instruct import COMPOSED, PAIRS, TASKS, UNSEEN, Instructions
from moezoo.domains.text.inference import MadeAnswer, answered
from moezoo.domains.text.library import BaseDecoder, open_base
from moezoo.domains.text.library_routes import (
    ROUTES,
    TASK,
    LibraryRoute,
    RouteOptions,
    StaticRoute,
    check_route,
    kind_of,
    route,
)
from moezoo.domains.text.lorahub import composed
from moezoo.errors import UserError, unknown
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.timing import machine, versions
from moezoo.train.console import Console
from moezoo.weights.library import Library

LORAHUB, BASE = "lorahub", "base alone"
MEMBERS, PAIRED, NEVER, OTHER = "tasks of members", "compositions", "unseen tasks", "other tasks"
# Their columns in a table of 80 letters, and what they are.
COLUMNS = {
    MEMBERS: ("members", "tasks that a member was trained on"),
    PAIRED: ("pairs", "two tasks of members in one instruction"),
    NEVER: ("unseen", "tasks that neither members nor the base have seen"),
    OTHER: ("other", "tasks of no member, which the base may know"),
}

# By the group of tasks on which the papers make them.
CLAIMS: dict[str, tuple[Claim, ...]] = {
    MEMBERS: (
        Claim("Arrow comes near the oracle on tasks seen", "arrow", "oracle", level=True),
        Claim("PHATGOOSE comes near the oracle on tasks seen", "phatgoose", "oracle", level=True),
        Claim("token-level adaptation is better than the base", "tle", BASE),
        Claim("MoCLE is better than even shares", "mocle", "uniform"),
    ),
    NEVER: (
        Claim("Arrow is better than even shares on unseen tasks", "arrow", "uniform"),
        Claim("Arrow over groups is better than over all on unseen tasks", "mbc", "arrow"),
        Claim("PHATGOOSE is better than even shares on unseen tasks", "phatgoose", "uniform"),
        Claim("LoraHub is better than the base on unseen tasks", LORAHUB, BASE),
        Claim("ELREA is better than even shares on unseen tasks", "elrea", "uniform"),
    ),
    PAIRED: (
        Claim("Arrow is better than even shares on compositions", "arrow", "uniform"),
        Claim("LoraHub is better than the base on compositions", LORAHUB, BASE),
    ),
}


@dataclass(frozen=True)
class LibraryArguments:
    """Answer test prompts of all generated instruction tasks by every route over a library.

    Beside tasks that members were trained on: two of them in one instruction, and unseen ones.

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
    seeds: tuple[int, ...] = (0,)
    """Seeds of the prompts and of LoraHub's search."""
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

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        return answered(self.speaker(self.base.model), prompts, settings, seed)


class Searched(LibraryRoute):
    """LoraHub, with weights for every task that it is asked."""

    def __init__(self, base: BaseDecoder, library: Library, shots: int, seed: int):
        super().__init__(base, library, RouteOptions("factors"))
        self.shots, self.seed = shots, seed

    def answered(
        self, prompts: Sequence[str], settings: Settings, seed: int = 0, tasks: Sequence[str] = ()
    ) -> list[MadeAnswer]:
        found: dict[int, MadeAnswer] = {}
        for task in dict.fromkeys(tasks):
            shown = examples_of(task, "train", self.shots, self.seed)
            pairs = [(prompt_of(one), one.output) for one in shown]
            weights = composed(self.base, self.library, pairs, self.seed)
            own = StaticRoute(self.base, self.library, self.options, weights)
            places = [i for i, name in enumerate(tasks) if name == task]
            given = own.answered([prompts[i] for i in places], settings, seed)
            found |= dict(zip(places, given, strict=True))
        return [found[i] for i in range(len(prompts))]


def routes_of(
    a: LibraryArguments, base: BaseDecoder, library: Library, seed: int
) -> dict[str, LibraryRoute]:
    """The routes to compare, by name; those whose needs the library does not meet are left out
    where none was asked for by name."""
    found: dict[str, LibraryRoute] = {BASE: Bare(base, library, RouteOptions())}
    if LORAHUB in (a.routes or (LORAHUB,)):
        found[LORAHUB] = Searched(base, library, a.shots, seed)
    for name in (n for n in a.routes or ROUTES if n != LORAHUB):
        try:
            check_asked(name, library)
        except UserError:
            if a.routes:
                raise
            continue
        found[name] = route(name, base, library)
    if not a.routes:  # both published combinations
        found["arrow, factors"] = route("arrow", base, library, RouteOptions("factors"))
        found["uniform, factors"] = route("uniform", base, library, RouteOptions("factors"))
    return found


def check_asked(name: str, library: Library) -> None:
    """Raise UserError for a route that is not known, or that this library gives nothing to do."""
    if name == LORAHUB:
        return
    if name not in ROUTES and not name.startswith(TASK):
        raise unknown("route over a library", name, [*ROUTES, LORAHUB])
    check_route(name, library, RouteOptions())
    if kind_of(name).told and not groups_of(library)[MEMBERS]:
        raise UserError(
            f"Route {name} is told tasks, but no member of {library.folder} was trained on one of "
            "the generated tasks that are asked here: leave it out."
        )


def groups_of(library: Library) -> dict[str, tuple[str, ...]]:
    """The tasks to ask, by group; of compositions those of which the library has both halves."""
    held = {task for member in library.members.values() for task in member.tasks}
    pairs = zip(COMPOSED, PAIRS, strict=True)
    return {
        MEMBERS: tuple(t for t in TASKS if t in held),
        PAIRED: tuple(name for name, both in pairs if held.issuperset(both)),
        NEVER: tuple(t for t in UNSEEN if t not in held),
        OTHER: tuple(t for t in TASKS if t not in held),
    }


def scores(
    chosen: LibraryRoute, tasks: Iterable[str], a: LibraryArguments, seed: int
) -> tuple[dict[str, float], float]:
    """Exact match by task, and seconds for all answers."""
    examples = [e for task in tasks for e in examples_of(task, "test", a.count, seed)]
    prompts, names = [prompt_of(e) for e in examples], [e.task for e in examples]
    settings = Settings(new=24)
    began = time.perf_counter()
    answers = chosen.answers(prompts, settings, seed, names)
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
    if not a.seeds or len(set(a.seeds)) < len(a.seeds):
        raise UserError(f"--seeds are {a.seeds}: give at least one, each once.")
    check_file(a.json)
    library = Library(a.library)
    for name in a.routes:
        check_asked(name, library)
    base = open_base(a.base, library.base.template)
    groups, console = groups_of(library), Console()
    found: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    for seed in a.seeds:
        for name, chosen in routes_of(a, base, library, seed).items():
            # Nobody is an oracle of a task that the library has not.
            told = name in ROUTES and kind_of(name).told
            wanted = {MEMBERS: groups[MEMBERS]} if told else groups
            asked = [task for tasks in wanted.values() for task in tasks]
            by_task, took = scores(chosen, asked, a, seed)
            found.setdefault(name, []).append(by_task)
            seconds[name] = seconds.get(name, 0.0) + took
            console.say(f"{name}, seed {seed}: {_told(by_task, groups)}; {took:.0f} s")
    rows = [_row(name, by_seed, groups, a) for name, by_seed in found.items()]
    _show(a, [row | {"seconds": seconds[row["route"]]} for row in rows], library, console)
    return 0


def _means(found: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The mean exact match of each group that was asked."""
    held = {name: [found[t] for t in tasks if t in found] for name, tasks in groups.items()}
    return {name: float(np.mean(values)) for name, values in held.items() if values}


def _told(found: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{COLUMNS[g][0]} {mean:.2f}" for g, mean in _means(found, groups).items())


def _row(
    name: str,
    by_seed: Sequence[Mapping[str, float]],
    groups: Mapping[str, Sequence[str]],
    a: LibraryArguments,
) -> dict[str, Any]:
    """A route's means, their standard errors and the exact match of each task, over the seeds."""
    tasks = {task: float(np.mean([found[task] for found in by_seed])) for task in by_seed[0]}
    means = [_means(found, groups) for found in by_seed]
    scored = {
        # Prompts differ from seed to seed, so all of them count.
        group: score_of([one[group] for one in means], len(by_seed) * a.count * len(groups[group]))
        for group in means[0]
    }
    told = {group: {"exact_match": m, "error": e} for group, (m, e) in scored.items()}
    return {"route": name, "groups": told, "tasks": tasks}


def _show(
    a: LibraryArguments, rows: Sequence[Mapping[str, Any]], library: Library, console: Console
) -> None:
    groups = {group: tasks for group, tasks in groups_of(library).items() if tasks}
    columns = ("route", *(COLUMNS[group][0] for group in groups), "s")
    table = [(row["route"], *_cells(row, groups), f"{row['seconds']:.0f}") for row in rows]
    title = f"Exact match and its standard error, {len(library.names)} adapters"
    console.table(title, columns, table)
    for group, tasks in groups.items():
        short, what = COLUMNS[group]
        prompts = len(tasks) * a.count * len(a.seeds)
        console.say(f"{short}: {what}; {len(tasks)} tasks, {prompts} prompts")
    console.say("s: seconds for all answers, LoraHub's with its search")
    told = []
    for group, claims in CLAIMS.items():
        held = (row for row in rows if group in row["groups"])
        scored = {
            row["route"]: (row["groups"][group]["exact_match"], row["groups"][group]["error"])
            for row in held
        }
        told += claim_lines(claims, scored, len(a.seeds))
    if told:
        console.table("What papers say", ("claim", "difference", "here"), told)
    if a.json is not None:
        facts = {"machine": machine(), "versions": versions("jax", "jaxlib"), "rows": rows}
        facts["claims"] = [{"claim": c, "difference": d, "verdict": v} for c, d, v in told]
        write_atomically(a.json, json_text(facts, 2))


def _cells(row: Mapping[str, Any], groups: Iterable[str]) -> list[str]:
    held = row["groups"]
    return [f"{held[g]['exact_match']:.2f}±{held[g]['error']:.2f}" if g in held else "-"
            for g in groups]  # fmt: skip
