"""Damaged plans and calibrations, as they lie in folders of pruned paths: refused, or sound."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.plan import Plan
from moezoo.deploy.usage import Moments, Usage
from tests.robustness import fuzz

SIZES = {"E": 3, "D": 2}
LAYER = "blocks/1/mlp"
PLAN = Plan("depth", {LAYER: (0, 2)}, {LAYER: 3}, "reap", "2 of 3", "data", "mean")


def sums(kind: Any) -> Any:
    """Sums of a layer of three experts, numbers without meaning."""

    def one(field: str) -> np.ndarray:
        axes = field.rpartition("_")[2] if "_" in field else ""
        return np.ones([SIZES[axis] for axis in axes])

    return kind(*map(one, kind._fields))


@fuzz.counts(ci=60, full=3000)
def test_damaged_calibrations(count: int, tmp_path: Path) -> None:
    file = tmp_path / "calibration.npz"
    layers, moments = {LAYER: sums(Usage)}, {LAYER: sums(Moments)}
    Calibration("depth", layers, {LAYER: 1}, 8, "data", moments).save(file)
    whole = file.read_bytes()

    def case(chance: random.Random) -> fuzz.Case:
        what, data = fuzz.mutate_bytes(chance, whole)

        def attempt() -> None:
            file.write_bytes(data)
            found = Calibration.load(file)
            for usage in found.layers.values():
                assert all(np.isfinite(array).all() for array in usage)

        return what, attempt

    fuzz.run("calibrations", case, count)


@fuzz.counts(ci=200, full=5000)
def test_damaged_plans(count: int) -> None:
    fields = json.loads(PLAN.to_json())

    def case(chance: random.Random) -> fuzz.Case:
        what, value = fuzz.mutate_json(chance, fields)

        def attempt() -> None:
            plan = Plan.from_json(json.dumps(value), "plan.json")
            for name, kept in plan.kept.items():
                assert set(kept) | set(plan.removed(name)) == set(range(plan.experts[name]))
            assert Plan.from_json(plan.to_json()) == plan

        return what, attempt

    fuzz.run("plans", case, count)
