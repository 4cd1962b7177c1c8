"""Runs on pairs: a mixture of tasks, what it leaves, what goes on after a stop, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import rich.console

from moezoo.deploy import interference
from moezoo.domains.pairs.domain import PairsDataConfig, Shares
from moezoo.errors import UserError
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.nn import module
from moezoo.train import config as configs
from moezoo.train import log, loop
from moezoo.train.ahead import Ahead
from moezoo.train.config import Config, EvaluateConfig, MeshConfig, OptimConfig, TrainConfig
from moezoo.train.console import Console
from moezoo.train.overrides import parse
from moezoo.train.report import write_report
from tests.train import tiny

QUIET = Console(rich.console.Console(quiet=True))
MODEL = ConditionalMoEConfig.tiny(
    width=16, heads=2, depth=1, experts=4, vocabulary=81, text_length=40, mlp_ratio=2.0, patch=8
)
DATA = PairsDataConfig(
    resolution=(16, 16), length=40, train=24, test=10, shares=Shares(scene=2.0, mlm=0.0)
)
TASKS = ("scene", "caption", "retrieval", "mlm", "text_scene", "counts")


def config(directory: Path, **changes: Any) -> Config:
    return replace(
        Config(
            name="pairs",
            directory=str(directory),
            tasks=TASKS,
            data=replace(DATA, data_dir=str(directory / "data")),
            model=MODEL,
            optimiser=OptimConfig(lr=1e-2),
            train=TrainConfig(steps=8, batch=8, log_every=1, importance_weight=0.0),
            evaluate=EvaluateConfig(batch=8, pictures=2),
            mesh=MeshConfig(data=2, fsdp=2, expert=2),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> loop.Finished:
    finished = loop.train(config(tmp_path_factory.mktemp("pairs")), QUIET)
    write_report(finished, QUIET)
    return finished


@pytest.mark.slow
def test_each_step_is_one_tasks_and_what_has_no_share_is_only_scored(run) -> None:
    rows = [r for r in log.read(run.directory / log.NAME) if r["split"] == "train"]
    mixture = run.setup.domain.training(run.setup.config, run.setup.train, TASKS, 0, range(8))
    drawn = [next(iter(batch)) for _, batch in mixture]
    seen: dict[str, float] = {}
    for row, task in zip(rows, drawn, strict=True):
        changed = {n for n, v in row.items() if n.startswith("loss/") and seen.get(n) != v}
        assert changed <= {f"loss/{task}", "loss/total"}
        seen |= {name: value for name, value in row.items() if name.startswith("loss/")}
    assert set(drawn) <= {"scene", "caption", "retrieval", "text_scene"}
    assert set(run.evaluation.scores) == set(TASKS)
    assert run.evaluation.totals["scene"]["confusion"].sum() == 10
    assert run.evaluation.totals["counts"]["rows"] == 10
    assert 0 < run.evaluation.scores["counts"]["chance"] < 1


@pytest.mark.slow
def test_usage_is_by_condition_and_layer(run) -> None:
    groups = run.setup.groups
    assert len(groups) == 13 and "caption|input text" in groups
    for table in run.evaluation.usage.values():
        assert table.shape == (13, 4)
        assert (table.sum(1) > 0).all()  # each condition decided
        # Equal attributes decide alike: the names of scenes, and the captions of retrieval.
        names = [groups.index(name) for name in ("scene|target", "retrieval|target")]
        np.testing.assert_array_equal(table[names[0]], table[names[1]])


@pytest.mark.slow
def test_people_get_captions_finds_and_confusions(run) -> None:
    found = {path.name for path in (run.directory / "pictures").iterdir()}
    assert found >= {"captions.png", "retrieval.png", "counts.png", "confusion.png", "usage.png"}
    report = (run.directory / "report.md").read_text()
    assert "captions beside truth" in report and "10 test examples at 16x16" in report


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run, tmp_path: Path) -> None:
    where = Path(run.setup.config.data.data_dir)  # type: ignore[union-attr, arg-type]
    data = replace(DATA, data_dir=str(where))
    first = config(tmp_path, data=data)
    short = replace(first, name="again")

    class Enough:
        def requested(self, at: int) -> bool:
            return at > 3

    setup = loop.prepare(short)
    folder = tmp_path / "again"
    with (
        jax.set_mesh(setup.mesh),
        loop.Checkpointer(
            folder / loop.FOLDER, configs.to_json(short), 2, QUIET.say
        ) as checkpoints,
    ):
        watches = loop.WallTime(), loop.HangWatch("a test", 0)
        trainer = loop.Trainer(setup, folder, QUIET, checkpoints, *watches)
        with (
            loop.open_sinks(folder, "off", 0) as sinks,
            pytest.raises(loop.Interrupted),
        ):
            trainer.run(sinks, Enough(), Ahead(setup.config, QUIET.say))  # type: ignore[arg-type]
    (folder / "config.json").write_text(configs.to_json(short))
    finished = loop.train(short, QUIET)
    wanted = module.flatten(run.state["params"])
    for name, array in module.flatten(finished.state["params"]).items():
        np.testing.assert_allclose(array, wanted[name], 1e-5, 1e-6, err_msg=name)


@pytest.mark.slow
def test_gradients_of_tasks_can_be_normalised_and_compared(run, tmp_path: Path) -> None:
    data = run.setup.config.data
    train = TrainConfig(steps=3, batch=8, importance_weight=0.0, task_gradients="normalised")
    finished = loop.train(config(tmp_path, data=data, train=train, name="alike"), QUIET)
    assert np.isfinite(finished.evaluation.scores["caption"]["loss"])
    found = interference.of_run(run.directory, batches=1, size=8)
    assert found.tasks == ("scene", "caption", "retrieval", "text_scene")
    assert {"encoder/blocks/0", "tokens"} <= set(found.layers)
    table = found.layers["encoder/blocks/0"]
    np.testing.assert_allclose(np.diag(table), 1, rtol=1e-6)
    assert (np.abs(table) <= 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": replace(DATA, shares=Shares(0, 0, 0, 0, 0, 0))}, "shares of all tasks are 0"),
        ({"data": replace(DATA, shares=Shares(scene=-1))}, "data.shares.scene is -1"),
        ({"data": replace(DATA, name="coco")}, "data set with captions 'coco'"),
        ({"data": replace(DATA, augment=("crop",))}, "captions may be wrong"),
        ({"data": replace(DATA, length=41)}, "model.text_length is 40, but .* need 41"),
        ({"model": replace(MODEL, vocabulary=40)}, "model.vocabulary is 40, but .* need 81"),
        ({"model": tiny.model()}, "M3ViTConfig reads images, but .* gives pairs"),
        ({"tasks": ("scene", "depth")}, "Task depth does not belong to pairs"),
        ({"model": replace(MODEL, conditions=MODEL.conditions[:2])}, "caption has no attributes"),
        (
            {"train": TrainConfig(batch=8, gradient_accumulation=8)},
            "retrieval compares .* leaves 1",
        ),
        (
            {
                "train": TrainConfig(batch=8, task_gradients="normalised"),
                "optimiser": OptimConfig(kind="sgd"),
            },
            "optimiser.kind is sgd",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes, says) -> None:
    with pytest.raises(UserError, match=says):
        configs.validate(config(tmp_path, **changes), 8)


def test_normalised_gradients_are_for_pairs(tmp_path: Path) -> None:
    made = tiny.config(str(tmp_path), train=TrainConfig(batch=8, task_gradients="normalised"))
    with pytest.raises(UserError, match="in runs on images a step is not one"):
        configs.validate(made, 8)


def test_pairs_belong_to_conditional_encoders(tmp_path: Path) -> None:
    made = replace(tiny.config(str(tmp_path)), model=MODEL, tasks=("scene",))
    with pytest.raises(UserError, match="reads pairs, but the data section of tiny gives images"):
        configs.validate(made, 8)


def test_a_written_configuration_reads_back_and_takes_overrides(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert configs.from_json(configs.to_json(made)) == made
    assert json.loads(configs.to_json(made))["data"]["shares"]["scene"] == 2.0
    changed = parse(made, ["--data.shares.counts", "0.5", "--model.level", "task"])
    assert changed.data.shares.counts == 0.5 and changed.model.level == "task"  # type: ignore
