"""Tasks follow the data set: its numbers of classes and its way of matching edges."""

from __future__ import annotations

import pytest

from moezoo.data.config import DataConfig
from moezoo.data.dense.builder import LAYOUTS
from moezoo.tasks.edge import BoundaryF
from moezoo.tasks.edges import odsf
from moezoo.train import setup
from tests.train import tiny


@pytest.mark.parametrize(("name", "semseg"), [("nyud", 40), ("pascal", 21)])
def test_tasks_of_the_benchmarks(name: str, semseg: int) -> None:
    layout = LAYOUTS[name]
    config = tiny.config("runs", tasks=layout.tasks, data=DataConfig(name=name))
    classes = {task: labels.classes for task, labels in layout.labels.items()}
    tasks = {task.name: task for task in setup.make_tasks(config, classes)}
    assert tasks.keys() == set(layout.tasks)
    assert tasks["semseg"].channels == semseg
    metric = tasks["edge"].metric
    assert isinstance(metric, BoundaryF) and metric.protocol is odsf.PROTOCOLS[name]


def test_other_data_sets_keep_the_protocol_of_rooms() -> None:
    config = tiny.config("runs", tasks=("edge",))
    assert config.data.name == "rooms"
    [task] = setup.make_tasks(config, {})
    assert isinstance(task.metric, BoundaryF)
    assert task.metric.protocol is odsf.PROTOCOLS["rooms"]
