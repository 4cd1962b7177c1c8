"""Which balance losses could teach a model's routers nothing, and why.

A model's configuration says it with `idle_losses(tasks)`: the loss's name -> the reason. The
trainer refuses such a loss where it is asked for, before there is data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ALL = ("importance", "load", "switch", "mutual_information")
LEAVE = "leave it at 0"


def none_of_them(reason: str) -> dict[str, str]:
    """No loss has anything to balance."""
    return {name: f"{reason}: {LEAVE}" for name in ALL}


def nothing_chosen(self: Any, tasks: int | None) -> dict[str, str]:
    """The method of a configuration whose models choose nothing."""
    return none_of_them("this model chooses no experts that could be balanced")


def all_but(own: Iterable[str], model: str) -> dict[str, str]:
    """The losses that a model with losses of its own does not have."""
    own = tuple(own)
    have = " and ".join(own)
    return {
        name: f"{model} has only the balance loss{'es' if len(own) > 1 else ''} {have}: {LEAVE}"
        for name in ALL
        if name not in own
    }


def of_loads(noise: str | None, chosen: int, experts: int) -> dict[str, str]:
    """The load loss where loads are counted, which has no gradient, or are even whatever is chosen.

    noise: what to set for noisy routers where there is none; None: they are noisy.
    """
    if chosen == experts:
        return {"load": f"every token goes to all {experts} experts, so loads are even: {LEAVE}"}
    if noise is None:
        return {}
    return {
        "load": f"its routers have no noise, without which loads have no gradient: {noise}, or "
        f"{LEAVE}"
    }


def of_tasks(tasks: int | None, router: str | None = None) -> dict[str, str]:
    """The mutual information of tasks and experts where it is 0 whatever is chosen.

    tasks: None where it is not known yet. router: the option by which all tasks share decisions.
    """
    if router is not None:
        reason = f"with {router} tasks share their tokens' experts"
    elif tasks == 1:
        reason = "there is only one task, so that experts say nothing about tasks"
    else:
        return {}
    return {"mutual_information": f"{reason}: {LEAVE}"}
