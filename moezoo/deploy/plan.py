"""Which experts of which layers a task path keeps, as data that travels in JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from moezoo import schema_check as check
from moezoo.errors import UserError

EXPERT = check.whole(0, 2**20)
FORM = check.table(
    {
        "task": check.text(),
        "kept": check.map_of(check.list_of(EXPERT)),
        "experts": check.map_of(EXPERT),
        "score": check.text(),
        "budget": check.text(),
        "calibration": check.text(),
        "novices": check.text(),
    },
    required=("task", "kept", "experts"),
    others=check.refused,
)


@dataclass(frozen=True)
class Plan:
    """The kept experts of every MoE layer.

    kept: layer path -> kept expert ids, ascending; layers that are not named keep all.
    experts: layer path -> number of experts of the full model.
    score, budget: how the choice was made, in words for a reader.
    calibration: fingerprint of the data behind it, "" when none was used.
    novices: what answers for removed experts: "mean", "affine:r", "cut" where routers lose their
    columns instead, "none" where no token can ask for any.
    """

    task: str
    kept: Mapping[str, tuple[int, ...]]
    experts: Mapping[str, int]
    score: str = "none"
    budget: str = "all"
    calibration: str = ""
    novices: str = "none"

    def __post_init__(self) -> None:
        for name, ids in self.kept.items():
            e = self.experts.get(name, 0)
            ordered = sorted(set(ids)) == list(ids)
            if not ids or not ordered or ids[0] < 0 or ids[-1] >= e:
                raise UserError(
                    f"Pruning plan, layer {check.shown(name)}: kept experts "
                    f"{check.shown(list(ids))} must be ascending, different and between 0 and "
                    f"{e - 1}."
                )

    def removed(self, layer: str) -> tuple[int, ...]:
        """The expert ids of a layer that the plan removes, ascending."""
        kept = set(self.kept.get(layer, range(self.experts.get(layer, 0))))
        return tuple(e for e in range(self.experts.get(layer, 0)) if e not in kept)

    def to_json(self) -> str:
        """The plan as JSON with sorted keys; equal plans give equal text."""
        fields = {
            "task": self.task,
            "kept": {name: list(ids) for name, ids in self.kept.items()},
            "experts": dict(self.experts),
            "score": self.score,
            "budget": self.budget,
            "calibration": self.calibration,
            "novices": self.novices,
        }
        return json.dumps(fields, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str = "pruning plan") -> Plan:
        """Inverse of `to_json`; raises UserError naming `where` when the text is no plan."""
        try:
            fields = check.parse(text)
            FORM(fields, "")
        except check.FormatFault as error:
            raise UserError(f"{where} is not a pruning plan ({error}).") from error
        kept = {name: tuple(ids) for name, ids in fields.pop("kept").items()}
        return Plan(kept=kept, **fields)

    def digest(self) -> str:
        """Short hash of the plan's content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def keep_all(task: str, experts: Mapping[str, int]) -> Plan:
    """The plan that removes nothing."""
    return Plan(task, {name: tuple(range(e)) for name, e in experts.items()}, dict(experts))
