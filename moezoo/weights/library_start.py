"""A library's LoRAs as what a bank in a fresh model begins with: MeteoRA's gates over a library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moezoo.errors import UserError
from moezoo.weights.library import Library, fingerprint

BASE, UPDATE = "/base/", "/update/"
DOWN, UP = "/update/down", "/update/up"


def check_form(library: Library, loras: int, rank: int, scale: float) -> None:
    """Raise UserError where a bank of so many LoRAs, of this rank and scale, is not the library."""
    where = f"the library {library.folder}"
    if len(library.names) != loras:
        raise UserError(
            f"model.loras is {loras}, but {where} has {len(library.names)} members: each is one "
            "LoRA of the bank, so give their number."
        )
    for path, form in library.layers.items():
        if form.rank != rank:
            raise UserError(f"model.rank is {rank}, but {where} has rank {form.rank} in {path}.")
        if abs(form.scale - scale) > 1e-6 * abs(form.scale):
            raise UserError(
                f"model.alpha over model.rank is {scale:g}, but {where} has scale {form.scale:g} "
                f"in {path}: take alpha {form.scale * rank:g}."
            )


Narrowed = Callable[[Sequence[str]], str]


def only_these(tasks: Sequence[str]) -> str:
    """What to do about data with tasks that have no member, where nothing more is known of data."""
    return f"take data of these tasks only: {', '.join(tasks)}"


def ordered(
    library: Library, tasks: Sequence[str], narrowed: Narrowed = only_these
) -> tuple[str, ...]:
    """The members, that of every task at the task's number, others behind.

    narrowed: what to do about data with too many tasks, of those that have a member. Raises
    UserError for a task without a member, or with several, which have one place.
    """
    known = {task for member in library.members.values() for task in member.tasks}
    known |= set(library.names)
    if missing := [task for task in tasks if task not in known]:
        here = [task for task in tasks if task in known]
        advice = narrowed(here) if here else f"it has members for {', '.join(sorted(known))}"
        raise UserError(
            f"The library {library.folder} has no member for {', '.join(missing)}: add one"
            f"{', or ' if here else '; '}{advice}."
        )
    first: list[str] = []
    for task in tasks:
        member, *more = found = library.of_task(task)
        if more:
            raise UserError(
                f"The library {library.folder} has {len(found)} members for {task} "
                f"({', '.join(found)}), but a bank that is told tasks has one LoRA for each: take "
                f"a library with one of them (moezoo library remove {library.folder} NAME)."
            )
        if member in first:
            raise UserError(
                f"Member {member} of {library.folder} was trained on {task} and on "
                f"{tasks[first.index(member)]}: a bank that is told tasks has one LoRA for each."
            )
        first.append(member)
    return (*first, *(name for name in library.names if name not in first))


def bank_arrays(
    library: Library, tasks: Sequence[str], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The factors of every bank of a model, by path: [D, E r] and [E r, O], in `ordered` order.

    arrays: the model's own by path, its base's as it was begun. Raises UserError where that base is
    not the library's, and where other layers have updates than the library's members.
    """
    own = {p.replace(BASE, "/"): np.asarray(a) for p, a in arrays.items() if UPDATE not in p}
    if fingerprint(own) != library.base.sha256:
        raise UserError(
            f"The adapters of {library.folder} were trained on {library.base.name}, whose arrays "
            "are others than those that this run begins with: name that base by --start-from, and "
            "leave model.base_dtype as it was."
        )
    adapted = {path.removesuffix(DOWN) for path in arrays if path.endswith(DOWN)}
    if other := sorted(adapted ^ set(library.layers)):
        has = "the library has no update for" if other[0] in adapted else "model.targets leaves out"
        raise UserError(
            f"{has} {other[0]}: targets must be those of {library.folder}, "
            f"{len(library.layers)} layers."
        )
    held = [library.factors(name) for name in ordered(library, tasks)]
    found = {}
    for path in library.layers:
        found[path + DOWN] = np.concatenate([one[path].down for one in held], axis=1)
        found[path + UP] = np.concatenate([one[path].up for one in held], axis=0)
    return found
