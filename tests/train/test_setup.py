"""Tasks follow the data set: its numbers of classes and its way of matching edges."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.domains.images import domain as image_data
from moezoo.domains.images.data.dense.builder import LAYOUTS
from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.domains.images.tasks.edge import BoundaryF
from moezoo.domains.images.tasks.edges import odsf
from moezoo.errors import UserError
from moezoo.train import setup
from moezoo.train.domain import Classes
from tests.train import tiny


@pytest.mark.parametrize(("name", "semseg"), [("nyud", 40), ("pascal", 21)])
def test_tasks_of_the_benchmarks(name: str, semseg: int) -> None:
    layout = LAYOUTS[name]
    config = tiny.config("runs", tasks=layout.tasks, data=DataConfig(name=name))
    counts = {task: labels.classes for task, labels in layout.labels.items()}
    tasks = {task.name: task for task in setup.make_tasks(config, Classes(counts))}
    assert tasks.keys() == set(layout.tasks)
    assert tasks["semseg"].channels == semseg
    metric = tasks["edge"].metric
    own = {"nyud": ("nyud", "edge"), "pascal": ("pascal_regions", "regions")}[name]
    assert isinstance(metric, BoundaryF) and metric.protocol is odsf.PROTOCOLS[own[0]]
    assert [tasks[t].truth for t in ("edge", "semseg")] == [own[1], "semseg"]


def test_the_protocol_of_a_configuration_comes_first() -> None:
    posed = ProtocolConfig(saliency_channels=2, edge_positive_weight=0.8, edge="nyud")
    config = tiny.config("runs", tasks=("edge", "saliency"), protocol=posed)
    tasks = {task.name: task for task in setup.make_tasks(config)}
    metric = tasks["edge"].metric
    assert isinstance(metric, BoundaryF) and metric.protocol is odsf.PROTOCOLS["nyud"]
    assert tasks["saliency"].channels == 2
    logits, label = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2), jnp.uint8)
    np.testing.assert_allclose(tasks["edge"].loss(logits, label), 0.8 * np.log(2), rtol=1e-5)
    for weight in (0.0, 1.0):
        wrong = ProtocolConfig(edge_positive_weight=weight)
        with pytest.raises(UserError, match="between 0 and 1"):
            setup.make_tasks(tiny.config("runs", tasks=("edge",), protocol=wrong))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("edge", "saliency")}, "tiny has no labels for task saliency: take --tasks"),
        (
            {"tasks": ("edge",), "protocol": ProtocolConfig(edge="pascal_regions")},
            "task edge scores against regions, which tiny does not have",
        ),
    ],
)
def test_what_the_data_set_does_not_have(
    changes: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_data, "open_source", lambda _, split: tiny.source(8, split))
    with pytest.raises(UserError, match=words):
        setup.prepare(tiny.config("runs", **changes))


def test_other_data_sets_keep_the_protocol_of_rooms() -> None:
    config = tiny.config("runs", tasks=("edge",))
    assert config.data.name == "rooms"
    [task] = setup.make_tasks(config)
    assert isinstance(task.metric, BoundaryF)
    assert task.metric.protocol is odsf.PROTOCOLS["rooms"]
