"""Runs on sounds: a base, Soft-MoA on top of it, what both leave, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from PIL import Image

from moezoo.backbones.ast import ASTConfig
from moezoo.domains.audio import report as audio_pictures
from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.domains.audio.report import Answer, DrawnClip
from moezoo.errors import UserError
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.nn import module
from moezoo.tasks.classification import CONFUSION
from moezoo.train import config as configs
from moezoo.train import log, loop, pictures
from moezoo.train.config import Config, EvaluateConfig, MeshConfig, OptimConfig, TrainConfig
from moezoo.train.console import Console
from moezoo.train.overrides import parse
from moezoo.train.report import write_report
from moezoo.train.scoring import score_run
from tests.train import tiny

QUIET = Console(rich.console.Console(quiet=True))
AST = ASTConfig(
    frames=40, mel=16, patch=8, stride_time=8, stride_freq=8, width=16, depth=1, heads=2, hidden=32
)
DATA = AudioDataConfig(
    frames=40, mel=16, train=24, valid=8, test=10, only=("bell", "rain", "siren"),
    augment=("freq_mask", "time_mask", "noise", "roll"), freq_mask=4, time_mask=6,
)  # fmt: skip


def config(directory: Path, **changes: Any) -> Config:
    return replace(
        Config(
            name="base",
            directory=str(directory),
            tasks=("event", "register", "room"),
            data=replace(DATA, data_dir=str(directory / "data")),
            model=SoftMoAConfig(ast=AST, update="full"),
            optimiser=OptimConfig(lr=1e-2),
            train=TrainConfig(steps=4, batch=8, log_every=1, importance_weight=0.0),
            evaluate=EvaluateConfig(batch=8, every=2, pictures=3),
            mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[loop.Finished, loop.Finished]:
    folder = tmp_path_factory.mktemp("audio")
    base = loop.train(config(folder), QUIET)
    adapted = config(
        folder,
        name="soft",
        tasks=("event",),
        model=SoftMoAConfig(ast=AST, experts=3, bottleneck=2),
        start_from=str(base.directory),
    )
    finished = loop.train(adapted, QUIET)
    write_report(finished, QUIET)
    return base, finished


@pytest.mark.slow
def test_evaluations_on_the_way_are_on_the_validation_split(runs) -> None:
    base, _ = runs
    rows = [r for r in log.read(base.directory / log.NAME) if r["split"] != "train"]
    assert [(r["step"], r["split"]) for r in rows] == [(2, "valid"), (4, "test")]
    assert (len(base.setup.train), len(base.setup.valid), len(base.setup.test)) == (24, 8, 10)
    assert base.evaluation.totals["event"][CONFUSION].sum() == 10
    for task in ("event", "register", "room"):
        right = base.evaluation.totals[task][CONFUSION].trace() / 10
        assert base.evaluation.scores[task]["accuracy"] == pytest.approx(right)


@pytest.mark.slow
def test_the_base_is_taken_over_and_stays(runs) -> None:
    base, soft = runs
    learned, frozen = module.flatten(base.state["params"]), module.flatten(soft.state["stats"])
    same = 0
    for path, array in learned.items():
        if path in frozen:
            np.testing.assert_array_equal(frozen[path], array, err_msg=path)
            same += 1
    assert same > 8, "the trunk is among the frozen arrays"
    assert module.count(soft.state["params"]) < module.count(base.state["params"]) / 2


@pytest.mark.slow
def test_what_a_run_leaves(runs) -> None:
    _, soft = runs
    names = {path.name for path in (soft.directory / "pictures").iterdir()}
    wanted = {"predictions.png", "confusion.png", "usage.png", "slots.png", "curves.png"}
    wanted |= {"usage.json"}
    assert names == wanted
    for name in ("predictions.png", "confusion.png", "slots.png"):
        pixels = np.asarray(Image.open(soft.directory / "pictures" / name))
        assert pixels.std() > 10
    report = (soft.directory / "report.md").read_text()
    assert "24 training clips and 10 test clips of 40 frames and 16 mel bands" in report
    assert "| event | accuracy" in report and "confusion.png" in report
    (usage,) = soft.evaluation.usage.values()
    assert usage.shape == (1, 3) and (usage > 0).all(), "every expert takes part"


@pytest.mark.slow
def test_a_run_is_scored_again(runs) -> None:
    base, _ = runs
    again = score_run(base.directory, console=QUIET)
    assert again.scores == base.evaluation.scores
    file = base.directory / "three.json"
    count = score_run(base.directory, lambda e: replace(e, examples=3), file, QUIET)
    assert count.totals["event"][CONFUSION].sum() == 3
    said = json.loads(file.read_text())
    assert (said["run"], said["split"], said["examples"], said["of"]) == ("base", "test", 3, 10)


@pytest.mark.slow
def test_batches_are_a_function_of_seed_and_step(runs) -> None:
    setup = runs[0].setup
    audio = setup.config.data.domain

    def batch(step: int, rows: range = range(8), **changes: Any) -> dict[str, np.ndarray]:
        made = replace(setup.config, **changes)
        return next(audio.training(made, setup.train, setup.names, step, rows))[1]

    first = batch(1)
    assert set(first) == {"audio", "frames", "event", "register", "room"}
    assert first["audio"].shape == (8, 40, 16) and first["audio"].dtype == np.float32
    assert first["frames"].dtype == np.int32 and first["event"].dtype == np.uint8
    for name, array in batch(1).items():
        np.testing.assert_array_equal(first[name], array)
        np.testing.assert_array_equal(first[name][2:5], batch(1, range(2, 5))[name])
    assert not np.array_equal(first["audio"], batch(2)["audio"])
    assert not np.array_equal(first["audio"], batch(1, seed=1)["audio"])
    audio = replace(setup.config.data, augment=()).domain
    plain = batch(1)
    np.testing.assert_array_equal(plain["event"], first["event"])
    assert not np.array_equal(plain["audio"], first["audio"])
    example, classes = audio.example(setup.config)
    assert {k: (v.shape[1:], v.dtype) for k, v in example.items()} == {
        k: (v.shape[1:], v.dtype) for k, v in first.items()
    }
    assert classes.counts == {"event": 3, "register": 3, "room": 3}


@pytest.mark.slow
def test_every_clip_is_evaluated_once(runs) -> None:
    test = runs[0].setup.test
    batches = list(AudioDataConfig().domain.evaluation(test, 10, 4, ("event",), range(4)))
    assert [b["valid"].tolist() for b in batches] == [[True] * 4] * 2 + [[True, True, False, False]]
    seen = np.concatenate([b["event"][b["valid"]] for b in batches])
    np.testing.assert_array_equal(seen, test.arrays["event"])


@pytest.mark.slow
def test_the_score_may_be_that_of_the_validation_split(runs) -> None:
    given = runs[0].setup.config
    changed = replace(given, data=replace(given.data, score="valid"))
    source = changed.data.domain.open(changed, "test")
    assert len(source) == 8 and source.info.split == "valid"


def test_configurations_of_sounds_survive_json_and_overrides(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert configs.from_json(configs.to_json(made)) == made
    words = ["--data.name", "esc50", "--data.fold", "3", "--model.update", "linear"]
    words += ["--data.augment", "roll", "noise", "--train.weights.room", "0.5"]
    changed = parse(made, words)
    assert (changed.data.fold, changed.data.augment) == (3, ("roll", "noise"))
    assert changed.model.update == "linear" and changed.train.weights["room"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": tiny.config("x").data}, "reads audio, but the data section of base gives images"),
        (
            {"model": tiny.model()},
            "M3ViTConfig reads images, but the data section of base gives audio",
        ),
        ({"tasks": ("scene",)}, "Task scene does not belong to audio: take --tasks from event"),
        ({"tasks": ("lm",)}, "Task lm does not belong to audio"),
        ({"tasks": ("word",)}, "sounds has no labels for task word: take --tasks from event, reg"),
        ({"data": replace(DATA, mel=32)}, "32 mel bands, but model.ast.mel is 16"),
        ({"data": replace(DATA, frames=4)}, "smaller than a patch"),
        (
            {"data": replace(DATA, name="esc50", only=()), "tasks": ("event",)},
            "ESC-50 was not found",
        ),
        (
            {"data": replace(DATA, name="esc50", only=())},
            "esc50 has no labels for task register: take --tasks from event",
        ),
        ({"data": replace(DATA, fold=2, name="sound")}, "did you mean sounds"),
    ],
)
@pytest.mark.slow
def test_what_does_not_go_together(runs, tmp_path: Path, changes: dict, message: str) -> None:
    made = config(tmp_path, **changes)
    if isinstance(made.data, AudioDataConfig):
        made = replace(made, data=replace(made.data, data_dir=runs[0].setup.config.data.data_dir))
    with pytest.raises(UserError, match=message):
        loop.train(made, QUIET)


@pytest.mark.slow
def test_a_task_of_a_run_on_sounds_is_exported(runs, tmp_path: Path) -> None:
    from moezoo.deploy import deliver
    from moezoo.deploy.produce import Request
    from moezoo.deploy.runtime.load import load_export

    base, soft = (run.directory for run in runs)
    folder = deliver.export_run(soft, "event", Request(calibration=4), tmp_path / "out")
    stated = json.loads((folder / "certificate.json").read_text())
    assert stated["test"]["clips"] == 5 and stated["full_model"]["largest_difference"] < 1e-5
    assert stated["cost"]["flops_per_example"] > 0
    batch = next(
        AudioDataConfig().domain.evaluation(runs[1].setup.test, 10, 10, ("event",), range(10))
    )
    logits = load_export(folder)(batch["audio"])["logits"]
    right = np.mean(logits.argmax(-1) == batch["event"])
    assert right == pytest.approx(runs[1].evaluation.scores["event"]["accuracy"])
    rows = deliver.compare_run(base, Request(calibration=4))
    assert [row[0] for row in rows] == ["all tasks", "event", "register", "room"]
    for request in (Request(keep=2), Request(usage=5.0)):
        with pytest.raises(UserError, match="No expert of soft can be removed"):
            deliver.export_run(soft, "event", request, tmp_path / "fewer")


@pytest.mark.slow
def test_tools_for_text_refuse_sounds(runs) -> None:
    from moezoo.domains.text.adapter import language_model

    with pytest.raises(UserError, match="is a run on audio, but this works on text only"):
        language_model(runs[1].directory)


def test_pictures_of_many_classes_and_short_clips(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    answers = [Answer("event", "bell", "rain", 0.4), Answer("room", "dry", "dry", 0.9)]
    clips = [
        DrawnClip(rng.normal(size=(n, 24)).astype(np.float32), answers) for n in (1, 30, 98, 5, 7)
    ]
    audio_pictures.predictions(tmp_path / "p.png", clips, 8_000)
    tables = {"a": rng.integers(0, 5, (50, 50)), "b": np.zeros((3, 3), np.int64)}
    names = {"a": [f"class {i}" for i in range(50)], "b": ["x", "y", "z"]}
    pictures.confusions(tmp_path / "c.png", tables, names)
    for name in ("p.png", "c.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10
