"""Names, settings and order of the tasks; Delta_m."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moezoo.errors import UserError
from moezoo.tasks import registry
from moezoo.tasks.delta import delta_m
from moezoo.tasks.registry import TaskKind, TaskTable
from tests.tasks.tables import AUDIO, EVERY, IMAGES, PAIRS, TEXT, build

NEEDED = {
    "semseg": {"classes": 3},
    "scene": {"classes": 3},
    "lm": {"vocabulary": 9, "tasks": ("copy",)},
    **dict.fromkeys((*AUDIO, "caption", "mlm", "text_scene"), {"classes": 3}),
}


def test_order_is_that_of_the_papers_task_numbers() -> None:
    dense = ("semseg", "parts", "saliency", "normals", "edge", "depth")
    assert tuple(IMAGES) == (*dense, "scene") and tuple(TEXT) == ("lm",)
    assert tuple(PAIRS) == ("scene", "caption", "retrieval", "mlm", "text_scene", "counts")
    assert tuple(AUDIO)[:4] == ("event", "register", "room", "word")
    assert registry.in_order(["edge", "depth", "semseg"], IMAGES) == ("semseg", "edge", "depth")


def test_weights_are_the_papers() -> None:
    weights = {name: build(name, **NEEDED.get(name, {})).weight for name in EVERY}
    papers = dict(semseg=1, parts=2, saliency=5, normals=10, edge=50, depth=1, scene=1, lm=1)
    papers |= dict.fromkeys((*AUDIO, "caption", "text_scene"), 1)
    papers |= dict.fromkeys(("retrieval", "mlm", "counts"), 0.5)
    assert weights == papers


def test_settings_reach_the_task() -> None:
    assert build("saliency", channels=2).channels == 2
    assert build("semseg", classes=40, weight=3.0).weight == 3.0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("semsg", {"classes": 3}, "semseg"),
        ("semseg", {"clases": 3}, "classes"),
        ("semseg", {}, "needs the setting 'classes'"),
        ("edge", {"protocol": "pascl"}, "pascal"),
        ("saliency", {"channels": 3}, "1 or 2"),
    ],
)
def test_wrong_names_and_settings_are_explained(name: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **settings)


def test_unknown_names_in_a_list() -> None:
    with pytest.raises(UserError, match="depth"):
        registry.in_order(["semseg", "dept"], IMAGES)


def test_delta_m_signs() -> None:
    lower = {"semseg": False, "depth": True}
    base = {"semseg": 0.4, "depth": 0.5}
    assert delta_m({"semseg": 0.5, "depth": 0.5}, base, lower) == pytest.approx(0.125)
    assert delta_m({"semseg": 0.4, "depth": 0.6}, base, lower) == pytest.approx(-0.1)
    assert delta_m({"depth": 0.4}, base, lower) == pytest.approx(0.2)


def test_delta_m_needs_baselines() -> None:
    with pytest.raises(UserError, match="'depth'"):
        delta_m({"depth": 0.4}, {"semseg": 0.4}, {"depth": True})
    with pytest.raises(UserError, match="at least one"):
        delta_m({}, {}, {})


def test_tasks_of_this_project_keep_their_meaning_and_others_may_change() -> None:
    """A run's folder names its tasks: only the file that the run came from knows another."""
    table = TaskTable({"depth": IMAGES["depth"]})
    table["depth"] = IMAGES["depth"]
    for change in (
        lambda: table.__setitem__("depth", IMAGES["edge"]),
        lambda: table.update(depth=IMAGES["edge"]),
        lambda: table.__ior__({"depth": IMAGES["edge"]}),
        lambda: table.pop("depth"),
        table.clear,
    ):
        with pytest.raises(UserError, match="The task depth comes with this project"):
            change()
    table["mine"] = IMAGES["edge"]
    table["mine"] = IMAGES["semseg"]
    assert list(table) == ["depth", "mine"] and table["mine"] == IMAGES["semseg"]
    del table["mine"]
    assert table == {"depth": IMAGES["depth"]}


@pytest.mark.parametrize("name", ["", "a/b", "my task", "a.b", "\x1b[31m", "x" * 65, 3])
def test_names_that_no_task_can_have(name) -> None:
    with pytest.raises(UserError, match="has a task called .*: a name is up to 64 letters"):
        TaskTable({})[name] = TaskKind(IMAGES["depth"].task)


def test_an_entry_that_is_no_task() -> None:
    with pytest.raises(UserError, match="for the task mine: give TASKS"):
        TaskTable({})["mine"] = IMAGES["depth"].task  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "weight", "says"),
    [
        (TaskKind(lambda: None), None, "makes None: its function must return a Task whose name is"),
        (TaskKind(lambda: build("depth")), None, "makes the task depth: its function must return"),
        (TaskKind("depth"), None, "mine cannot be made: TypeError"),  # type: ignore[arg-type]
        (TaskKind(lambda: {}["a"]), None, "mine cannot be made: KeyError: 'a'"),
        (TaskKind(build, lambda given: 1 / 0), None, "cannot be made: ZeroDivisionError"),
        (TaskKind(lambda: build("depth")), 2.0, "weights.mine is 2, but .* takes no `weight`"),
    ],
)
def test_entries_that_make_no_task_of_their_name(kind, weight, says: str) -> None:
    with pytest.raises(UserError, match=says):
        registry.make({"mine": kind}, registry.TaskFacts("mine", "rooms", None), weight)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"channels": "1"}, "channels of task depth is '1': give a whole number from 1"),
        ({"channels": 0}, "channels of task depth is 0"),
        ({"weight": -1.0}, "weight of task depth is -1.0: give a number from 0"),
        ({"lower_is_better": "no"}, "lower_is_better of task depth is 'no': give True or False"),
        ({"loss": None}, "loss of task depth is None: give a function"),
        ({"metric": None}, "metric of task depth is None: give a Metric"),
        ({"picture": None}, "picture of task depth is None: give a Painting"),
    ],
)
def test_tasks_whose_parts_are_of_another_kind(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(build("depth"), **changes)
