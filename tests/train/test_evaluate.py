"""Evaluation takes each task's own truth from the batch: PASCAL-Context's region maps, padded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from moezoo.data.source import Source
from moezoo.domains.images.data import batches as image_batches
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.domains.images.tasks.edge import BoundaryF
from moezoo.nn.moe import Record
from moezoo.ops.balance import choice_counts, gate_sums
from moezoo.ops.routing import only, route
from moezoo.tasks.base import Task, merge
from moezoo.train import setup
from moezoo.train.evaluate import evaluate, usage_by_task
from tests.domains.images.data import archives
from tests.train import tiny

SIZE = (64, 80)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of three test images; one of its regions has the number of unlabelled pixels."""
    where = tmp_path_factory.mktemp("archives")
    root = archives.make_pascal(where, train=1, test=3)
    for path in (root / "pascal-context/trainval").glob("*.mat"):
        regions = scipy.io.loadmat(path)["LabelMap"]
        scipy.io.savemat(path, {"LabelMap": np.where(regions == 4, 255, regions).astype("u2")})
    return where


def label_maps(place: Path) -> list[np.ndarray]:
    root = place / "PASCALContext"
    names = (root / "ImageSets/Context/val.txt").read_text().split()
    paths = (root / f"pascal-context/trainval/{name}.mat" for name in names)
    return [scipy.io.loadmat(path)["LabelMap"] for path in paths]


def edge_task(protocol: str | None) -> Task:
    data = DataConfig(name="pascal", resolution=SIZE)
    posed: Any = ProtocolConfig(edge=protocol)  # type: ignore[arg-type]
    [task] = setup.make_tasks(tiny.config("runs", tasks=("edge",), data=data, protocol=posed))
    return task


def guesses(count: int) -> np.ndarray:
    """Logits float32 [count,H,W,1] that no image decides."""
    return np.random.default_rng(3).normal(0, 2, (count, *SIZE, 1)).astype(np.float32)


def scored(task: Task, source: Source) -> dict[str, float]:
    """Through the trainer's evaluation, in batches of two."""
    logits = iter(np.array_split(np.concatenate([guesses(len(source)), guesses(1)]), 2))

    def count(params: Any, stats: Any, batch: Any) -> tuple[dict, dict, dict]:
        return {}, {}, {task.name: jnp.asarray(next(logits))}

    batches: Iterator = image_batches.evaluation(source, 2, (task.truth,))
    return evaluate(count, {}, {}, (task,), batches).scores[task.name]


def test_boundaries_of_the_region_maps(place: Path) -> None:
    source = open_source(DataConfig(name="pascal", resolution=SIZE, data_dir=str(place)), "test")
    task = edge_task(None)
    found = scored(task, source)
    metric = task.metric
    assert isinstance(metric, BoundaryF)
    state = metric.init()
    maps = label_maps(place)
    assert len(maps) == len(source) == 3 and any((regions == 255).any() for regions in maps)
    for regions, logits in zip(maps, guesses(3), strict=True):
        top, left = ((n - m) // 2 for n, m in zip(SIZE, regions.shape, strict=True))
        inside = logits[top : top + regions.shape[0], left : left + regions.shape[1]]
        state = merge(state, metric.count(inside[None], regions[None]))
    assert found == metric.compute(state)
    drawn = scored(edge_task("pascal"), source)
    assert np.isfinite(found["odsF"]) and drawn["odsF"] != found["odsF"]


def test_usage_of_tokens_that_have_every_expert_is_the_weights_of_each_task() -> None:
    logits_NE, task_N = jax.random.normal(jax.random.key(0), (12, 3)), jnp.arange(12) % 4 - 1
    for k in (3, 2):  # all in an order of each token's own, and some, which are counted
        routing = route(logits_NE, k=k, mask_N=jnp.arange(12) < 10)
        usage_JE = usage_by_task(Record(routing, task_N, jnp.zeros((), jnp.int32)), 3)
        amount = gate_sums if k == 3 else choice_counts
        wanted = [amount(only(routing, task_N == task)) for task in range(3)]
        np.testing.assert_allclose(usage_JE, wanted, rtol=1e-6)
        assert usage_JE.dtype == wanted[0].dtype
