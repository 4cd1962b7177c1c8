"""Answering with a library of adapters: who answers a prompt, without any training.

    static   the same weights for every prompt: `uniform`, `task:NAME`, weights that were searched;
             one plain update, exactly, which can be written as a PEFT or a Hugging Face folder
    row      weights of each prompt: `oracle` (its task is told), `nearest` and `mocle` (the mean
             embedding or cluster that the prompt's own embedding is nearest to)
    token    weights of each token in each layer: `arrow`, `mbc`, Arrow over means of groups, and
             `phatgoose`, by gates that were trained behind the members
    running  `tle`: the weights are made anew, from all text so far, every few tokens
    ensemble `elrea`: all members and the base answer, and their logits are added up

Arrow and MBC: Ostapenko et al., arXiv:2405.11157. Token-level adaptation: Belofsky,
arXiv:2311.10847; its embedding is MiniLM's of the text, here the mean of the base's own features.
MoCLE: Gou et al., arXiv:2312.12379; its experts and gates are trained, so that `mocle` of a library
is a reading of ours: the nearest member has a share p, the mean of all, as universal expert, 1 - p.
ELREA: Li et al., arXiv:2502.00089 (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from moezoo.domains.text.answering import (
    TASK,
    EnsembleRoute,
    GateRoute,
    LibraryRoute,
    RouteOptions,
    RowRoute,
    RunningRoute,
    StaticRoute,
    TokenRoute,
    boosted,
    check_count,
    nearest,
    nearest_and_all,
    nothing_to_write,
    told,
)
from moezoo.domains.text.library import BaseDecoder, check_library_base
from moezoo.errors import UserError, unknown
from moezoo.weights.library import Library


def _uniform(base: BaseDecoder, library: Library, options: RouteOptions) -> LibraryRoute:
    return StaticRoute(base, library, options, dict.fromkeys(library.names, 1 / len(library.names)))


def _groups(library: Library) -> tuple[tuple[str, ...], ...]:
    groups = tuple(library.clusters.values())
    if not groups:
        raise UserError(
            f"{library.folder} has no groups of alike adapters: build it with --clusters N, or "
            "take route arrow."
        )
    return groups


# By the part of members that a route compares: says what to do where one has none.
MISSING: dict[str, Callable[[Library, str], object]] = {
    "examples": Library.embedding,
    "gate": Library.gates,
    "gradient": Library.gradient,
    "group": lambda library, name: _groups(library),
}


def _mbc(base: BaseDecoder, library: Library, options: RouteOptions) -> LibraryRoute:
    return TokenRoute(base, library, options, _groups(library))


def member_of(library: Library, name: str) -> str:
    """The member that `task:NAME` means: that of this name, else the one trained on that task.

    A member's own name comes first, so that each can be asked alone whatever others were trained
    on. Raises UserError for a name that is neither, and for a task of several members.
    """
    if name in library.members:
        return name
    member, *more = found = library.of_task(name)
    if more:
        raise UserError(
            f"The library {library.folder} has {len(found)} members trained on {name} "
            f"({', '.join(found)}), and {TASK}{name} means one: name it, as {TASK}{member}."
        )
    return member


def _of_task(task: str) -> MakeRoute:
    def make(base: BaseDecoder, library: Library, options: RouteOptions) -> LibraryRoute:
        return StaticRoute(base, library, options, {member_of(library, task): 1.0})

    return make


def _rows(gates: Any, kind: type[RowRoute] = RowRoute) -> MakeRoute:
    def make(base: BaseDecoder, library: Library, options: RouteOptions) -> LibraryRoute:
        return kind(base, library, options, gates)

    return make


AS_PUBLISHED = RouteOptions()
MakeRoute = Callable[[BaseDecoder, Library, RouteOptions], LibraryRoute]


class RouteKind(NamedTuple):
    """A route as it is known before its base is there.

    reads: the fields of `RouteOptions` that mean something to it.   of: what it chooses among in a
    library.   part: what it compares of every member (`Member.parts`) besides factors.   constant:
    as of `LibraryRoute`.   told: whether it is told the tasks of prompts.
    """

    make: MakeRoute
    reads: frozenset[str] = frozenset()
    of: Callable[[Library], Sequence[Any]] = lambda library: library.names
    part: str | None = None
    constant: bool = False
    told: bool = False

    def lacking(self, library: Library) -> str | None:
        """The first member without what the route compares; None where all have it."""
        part = self.part
        without = (m.name for m in library.members.values() if part and part not in m.parts)
        return next(without, None)


_MIXED, _CHOSEN = frozenset({"combination"}), frozenset({"combination", "best"})
ROUTES: dict[str, RouteKind] = {
    "arrow": RouteKind(TokenRoute, _CHOSEN),
    "mbc": RouteKind(_mbc, _CHOSEN, _groups, part="group"),
    "phatgoose": RouteKind(GateRoute, _CHOSEN, part="gate"),
    "uniform": RouteKind(_uniform, _MIXED, constant=True),
    "oracle": RouteKind(_rows(told), _MIXED, told=True),
    "nearest": RouteKind(_rows(nearest), _MIXED, part="examples"),
    "mocle": RouteKind(_rows(nearest_and_all), _MIXED | {"temperature"}, part="examples"),
    "tle": RouteKind(_rows(boosted, RunningRoute), _MIXED | {"every"}, part="examples"),
    "elrea": RouteKind(EnsembleRoute, part="gradient"),
}


def kind_of(name: str) -> RouteKind:
    """The kind of that name; `task:NAME` is one adapter, of a member or a task (`member_of`)."""
    if name.startswith(TASK):
        return RouteKind(_of_task(name.removeprefix(TASK)), constant=True)
    if name not in ROUTES:
        raise unknown("route over a library", name, [*ROUTES, f"{TASK}NAME"])
    return ROUTES[name]


def check_route(name: str, library: Library, options: RouteOptions) -> RouteKind:
    """The kind of that name, for what can be said before the base is read.

    Raises UserError for a name or a task that is not known, options that the route does not read,
    more adapters per token than there are, members that lack what it compares, and a single one
    where there is nothing to route.
    """
    kind = kind_of(name)
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name not in kind.reads and value != option.default:
            word = option.metadata.get("word", option.name)
            raise UserError(f"{word} is {value}, which route {name} does not read: leave it out.")
    if name.startswith(TASK):
        member_of(library, name.removeprefix(TASK))
        return kind
    if len(library.names) < 2:
        raise UserError(
            f"{library.folder} has a single adapter, so there is nothing to route: take "
            f"{TASK}{', '.join(library.names)}."
        )
    if kind.part is not None and (without := kind.lacking(library)) is not None:
        MISSING[kind.part](library, without)  # raises
    if (count := len(kind.of(library))) < (options.best or 1):
        raise UserError(
            f"--top-k is {options.best}, but route {name} has {count} adapters of "
            f"{library.folder} to choose among: take at most {count}."
        )
    return kind


def check_tasks(name: str, library: Library, prompts: int, tasks: Sequence[str]) -> None:
    """Raise UserError where a route is told tasks that it does not ask for, or other ones than
    those of the prompts."""
    if not kind_of(name).told:
        if tasks:
            raise UserError(f"--tasks is for route oracle; {name} is told no tasks.")
        return
    check_count(prompts, tasks)
    for task in tasks:
        library.of_task(task)


def check_written(name: str) -> None:
    """Raise UserError for a route that is no single adapter, which could be written."""
    if not kind_of(name).constant:
        raise nothing_to_write(f"Route {name}")


def route(
    name: str, base: BaseDecoder, library: Library, options: RouteOptions = AS_PUBLISHED
) -> LibraryRoute:
    """The route of that name.

    Raises UserError as `check_route`, and for a decoder that is not the library's.
    """
    kind = check_route(name, library, options)
    check_library_base(library, base)
    return kind.make(base, library, options)
