"""What a path gets back after experts left: what may change changes, what was promised stays."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rich.console

from moezoo.deploy import recover, task_path
from moezoo.deploy.novices import MEAN
from moezoo.deploy.path import TaskPath
from moezoo.deploy.plan import Plan
from moezoo.deploy.produce import Request, candidates
from moezoo.deploy.recover import KINDS, Lost, Recovery
from moezoo.errors import UserError
from moezoo.train.console import Console
from tests.deploy.conftest import CLASSES, SIZE, Case, batches

SILENT = Console(rich.console.Console(quiet=True))
LABELS = np.random.default_rng(11).integers(0, CLASSES, (24, *SIZE)).astype(np.int32)


def lost(case: Case, keep: int) -> Lost:
    """What recovery works on where every layer keeps `keep` experts."""
    kept = {name: tuple(range(keep)) for name in case.plan.experts}
    plan = Plan("semseg", kept, case.plan.experts, "frequency", "", case.found.fingerprint, "mean")

    def again() -> Iterator[Mapping[str, Any]]:
        return batches(case.images, 8, semseg=LABELS)

    def layers(seen: Any) -> Any:
        return candidates(case.whole, seen)

    remove = task_path.with_stand_ins
    return Lost(
        case.whole, plan, case.found, MEAN, remove, again, layers, case.task, "heads/semseg"
    )


def cut(case: Case, work: Lost) -> Any:
    return work.remove(case.whole, work.plan, work.found, work.kind)


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    assert before.keys() == after.keys()
    return {n for n, w in before.items() if not np.array_equal(np.asarray(w), np.asarray(after[n]))}


def disturbed(path: TaskPath) -> TaskPath:
    """The path with other routers: there is something to learn."""
    rng, weights = np.random.default_rng(3), dict(path.weights)
    for name in recover.routers_of(path):
        weights[name] = weights[name] + rng.normal(size=weights[name].shape).astype(np.float32)
    return replace(path, weights=weights)


@pytest.mark.slow
def test_routers_alone_learn_and_come_nearer_to_the_model(case: Case) -> None:
    work, how = lost(case, 2), Recovery("router", 40, 1e-2)
    path = disturbed(cut(case, work))
    back = recover.recovered(work, path, how, SILENT)
    changed = moved(path.weights, back.path.weights)
    assert changed and changed <= set(recover.routers_of(path))
    assert all("/router/" in name for name in changed)
    assert back.stated["calibration_loss_after"] < back.stated["calibration_loss_before"]
    shapes = [path.weights[name].shape for name in recover.routers_of(path)]
    assert back.stated["trained_scalars"] == sum(int(np.prod(s)) for s in shapes)
    # No randomness: the same again, to the bit. And routers keep a column for every expert.
    again = recover.recovered(work, path, how, SILENT)
    assert not moved(back.path.weights, again.path.weights)
    assert {s[-1] for s in shapes} == set(case.plan.experts.values())


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["small", "all"])
def test_weights_learn_what_they_may(case: Case, trains: Any) -> None:
    work = lost(case, 2)
    path = cut(case, work)
    back = recover.recovered(work, path, Recovery("finetune", 16, 1e-3, trains), SILENT)
    stated = back.stated
    assert stated["calibration_loss_after"] <= stated["calibration_loss_before"]
    changed = moved(path.weights, back.path.weights)
    names = set(recover.tuned(case.whole, trains, work.head))
    own = {name for name in changed if "novices" not in name}
    assert own <= names
    if trains == "small":
        assert not any(n.endswith("/experts/fc1/kernel") for n in changed)
        assert any(n.startswith("heads/semseg/") and n.endswith("kernel") for n in changed)
    assert back.path.plan.kept == work.plan.kept and not back.path.exact


@pytest.mark.slow
def test_layers_are_measured_behind_those_that_lost_theirs(case: Case) -> None:
    work = lost(case, 2)
    back = recover.recovered(work, cut(case, work), Recovery("progressive"), SILENT)
    first, *others = case.whole.layers
    assert back.stated["layers_measured_again"] == sorted(others)
    assert back.found.layers[first] is case.found.layers[first]
    for name in others:
        assert np.any(back.found.layers[name].count_E != case.found.layers[name].count_E)
        assert len(back.path.layers[name].kept) == 2
    # Weights of the model itself are untouched: examples without violation keep their bits.
    shared = {n for n in back.path.weights if n in case.whole.weights and "/experts/" not in n}
    assert shared and all(
        np.array_equal(back.path.weights[n], case.whole.weights[n]) for n in shared
    )


def test_experts_leave_in_stages(case: Case) -> None:
    work = lost(case, 1)
    ways = recover.staged(work.layers(case.found), "frequency", dict(work.plan.kept))
    assert len(ways) == recover.STAGES and ways[-1] == work.plan.kept
    for name in work.plan.kept:
        sizes = [len(way[name]) for way in ways]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
        for wider, narrower in zip(ways, ways[1:], strict=False):
            assert set(narrower[name]) <= set(wider[name]) | set(work.plan.kept[name])


def test_nothing_lost_is_nothing_to_recover(case: Case) -> None:
    work = lost(case, 2)
    for kind in KINDS:
        back = recover.recovered(work, case.whole, Recovery(kind), SILENT)
        assert back.path is case.whole and back.stated == {}
    path = cut(case, work)
    assert recover.recovered(work, path, Recovery("none"), SILENT).path is path


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "prayer"}, "Unknown recovery 'prayer'"),
        ({"steps": 0}, "--recover-steps is 0; it must be at least 1"),
        ({"steps": True}, "--recover-steps is True"),
        ({"lr": 0.0}, "--recover-lr is 0.0; it must lie between 0 and 1"),
        ({"trains": "some"}, "Unknown choice of --recover-trains 'some'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(Recovery("router"), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recover_steps": 5}, "--recover-steps is given, but --recover is none"),
        ({"recover": "router", "recover_trains": "all"}, "does not use it: add --recover finetune"),
        ({"recover": "progressive", "recover_lr": 0.1}, "add --recover router or finetune, or lea"),
    ],
)
def test_options_that_nothing_uses_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _ = Request(**options).recovery
    assert Request(recover="router", recover_steps=5).recovery == Recovery("router", 5)


def test_training_says_how_far_it_is(case: Case) -> None:
    work, written = lost(case, 2), io.StringIO()
    console = Console(rich.console.Console(file=written, width=200))
    recover.recovered(work, cut(case, work), Recovery("router", 3), console)
    assert "teach the routers of semseg  0/3  compiling" in written.getvalue()
    assert "teach the routers of semseg  3/3" in written.getvalue()
