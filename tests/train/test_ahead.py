"""The step that is compiled while data are made: taken where it fits, and the same to the bit."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import rich.console

from moezoo.domains.images import domain as data_config
from moezoo.domains.images.domain import DataConfig
from moezoo.errors import UserError
from moezoo.train import ahead, loop, state
from moezoo.train import mesh as meshes
from moezoo.train.config import MeshConfig
from moezoo.train.console import Console
from moezoo.train.domain import Classes
from moezoo.train.log import read
from moezoo.train.step import Update
from tests.train import tiny

SAID = "While data are made, the first step is compiled."


def wait_for_compiler() -> None:
    """Until what is compiled ahead, if anything, is there: data that take long."""
    for thread in threading.enumerate():
        if thread.name == "compile ahead" and ahead.AFTER == 0:
            thread.join()


@pytest.fixture(autouse=True)
def slow_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set `tiny`, of which the training split is not there at once."""

    def opened(config: Any, split: str) -> Any:
        if config.data_dir is None and split == "train":  # else: asked for its form
            wait_for_compiler()
        return tiny.source(12 if split == "train" else 10, split)

    monkeypatch.setitem(data_config._OPENERS, "tiny", opened)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which updates compiled at their first call in the loop, and which were compiled ahead."""
    seen: list[str] = []
    call, compile_ = Update.__call__, Update.compile

    def called(self: Update, *given: Any) -> Any:
        seen.append("called")
        return call(self, *given)

    def compiled(self: Update, *given: Any) -> Any:
        seen.append("ahead")
        return compile_(self, *given)

    monkeypatch.setattr(Update, "__call__", called)
    monkeypatch.setattr(Update, "compile", compiled)
    yield seen


def run(directory: Path) -> tuple[list[dict], loop.Finished, str]:
    """A run's rows without timing, what it ends with, and what it said."""
    output = io.StringIO()
    config = replace(
        tiny.config(str(directory), model=tiny.dense(depth=1, patch=8), tasks=("depth",)),
        data=DataConfig(name="tiny", resolution=tiny.SIZE, augment=("flip",)),
    )
    finished = loop.train(config, Console(rich.console.Console(file=output, width=200)))
    rows = read(finished.directory / "metrics.jsonl")
    untimed = [{k: v for k, v in row.items() if k != "timing"} for row in rows]
    return untimed, finished, output.getvalue()


@pytest.mark.slow
def test_a_run_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: list[str]
) -> None:
    rows, first, said = run(tmp_path / "plain")
    assert SAID not in said and set(fresh) == {"called"}
    fresh.clear()
    monkeypatch.setattr(ahead, "AFTER", 0.0)
    again, second, said = run(tmp_path / "ahead")
    assert SAID in said and fresh == ["ahead"]
    assert again == rows
    wanted = jax.tree.leaves(first.state)
    for found, one in zip(jax.tree.leaves(second.state), wanted, strict=True):
        np.testing.assert_array_equal(found, one)


@pytest.mark.slow
def test_data_of_another_form_get_a_step_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: list[str]
) -> None:
    monkeypatch.setattr(ahead, "AFTER", 0.0)
    own = data_config.Images.example

    def other(self: Any, config: Any) -> Any:
        made, classes = own(self, config)
        return made | {"image": made["image"][:, :8]}, classes

    monkeypatch.setattr(data_config.Images, "example", other)
    run(tmp_path)
    assert "called" in fresh  # whether the other form could be compiled or not


def test_errors_are_told_where_they_always_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "AFTER", 0.0)

    def broken(config: Any, split: str) -> Any:
        if config.data_dir is not None:
            return tiny.source(1, split)
        wait_for_compiler()
        raise UserError("The archive is damaged: download it again.")

    monkeypatch.setitem(data_config._OPENERS, "tiny", broken)
    with pytest.raises(UserError, match="^The archive is damaged: download it again.$"):
        run(tmp_path)


def test_labels_that_mean_something_else_are_another_program() -> None:
    one = Classes({"semseg": 3}, {"semseg": ("a", "b", "c")}, None, {"semseg": np.zeros((3, 3))})
    assert ahead.same_classes(one, one._replace(colours={"semseg": np.zeros((3, 3))}))
    for other in (
        one._replace(counts={"semseg": 4}),
        one._replace(names={"semseg": ("a", "b", "d")}),
        one._replace(groups=("x",)),
        one._replace(colours={"semseg": np.ones((3, 3))}),
        one._replace(colours={}),
    ):
        assert not ahead.same_classes(one, other)


def test_arrays_of_another_shape_type_or_place_do_not_fit() -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    rows = meshes.batch_sharding(mesh)
    array = jax.device_put(np.zeros((4, 2), np.float32), rows)
    shape = state.target({"x": array}, {"x": rows})["x"]
    assert ahead.alike({"x": shape}, {"x": array})
    assert not ahead.alike({"x": shape}, {"y": array})
    assert not ahead.alike({"x": shape}, {"x": array[:2]})
    assert not ahead.alike({"x": shape}, {"x": array.astype(np.int32)})
    elsewhere = jax.device_put(array, jax.devices()[1])
    assert not ahead.alike({"x": shape}, {"x": elsewhere})


def test_no_other_thread_imports_what_data_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that import tensorflow-datasets on Python 3.11 may wait for each other."""
    asked = list[threading.Thread]()
    example = data_config.Images.example

    def watched(self: Any, config: Any) -> Any:
        asked.append(threading.current_thread())
        return example(self, config)

    monkeypatch.setattr(ahead, "AFTER", 60.0)
    monkeypatch.setattr(data_config.Images, "example", watched)
    config = replace(tiny.config("unused"), data=DataConfig(name="tiny", resolution=tiny.SIZE))
    with ahead.Ahead(config, lambda text: None):
        assert asked == [threading.main_thread()]
    monkeypatch.setattr(data_config.Images, "example", lambda self, config: 1 / 0)
    with ahead.Ahead(config, lambda text: None) as broken:
        pass
    own = lambda state, batch: (state, {})  # noqa: E731
    assert broken.step(own, Classes(), {}, {}) is own  # type: ignore[arg-type]
