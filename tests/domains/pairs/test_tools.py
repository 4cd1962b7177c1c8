"""The commands on a run on pairs: a result, or one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import moezoo
from moezoo.deploy.produce import check_removable
from moezoo.deploy.runtime import load
from moezoo.domains.images.data.rooms.names import SCENES
from moezoo.errors import UserError
from moezoo.train.checkpoint import FOLDER, Checkpointer
from moezoo.train.config import Config, to_json
from tests.deploy.test_tools import command
from tests.domains.pairs.test_run import config
from tests.models.tiny import filled


def saved(made: Config) -> Path:
    """The folder of a run with a checkpoint that nobody trained."""
    size = made.data.resolution  # type: ignore[union-attr]
    parts = filled(lambda: made.model.build({}, size, nnx.Rngs(0)))
    parts.params["log_temperature"] = np.float32(np.log(0.07))
    folder = Path(made.directory) / made.name
    with Checkpointer(folder / FOLDER, to_json(made)) as checkpoints:
        checkpoints.save(6, {"params": parts.params, "stats": parts.stats})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return saved(config(tmp_path_factory.mktemp("pairs")))


def test_what_no_export_can_be_is_refused_in_one_sentence(run: Path, tmp_path: Path, capsys):
    out = ("--out", tmp_path / "out")
    for name, words, message in [
        ("export", (run, "--task", "mlm", *out), "Task mlm of pairs cannot be exported"),
        ("export", (run, "--task", "depth", *out), "only --task scene (its class) and --task cap"),
        ("export", (run, "--task", "scene", "--keep", 2, *out), "they are merged into one"),
        ("export", (run, "--compare", "--task", "counts"), "Task counts of pairs cannot be"),
        ("prune", (run, "--task", "scene", "--keep", 2, *out), "No expert of pairs can be removed"),
        ("prune", (run, "--task", "mlm", "--keep", 2, *out), "Task mlm of pairs cannot be"),
        ("predict", (run, tmp_path / "photo.png"), "cannot be read, it is missing"),
    ]:
        assert command(name, *words) == 2, words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("level", "why"), [
    ("dense", "it has none"), ("token", "layers share the routers"), ("task", "merged into one")
])  # fmt: skip
def test_why_no_expert_can_be_removed(tmp_path: Path, level: str, why: str) -> None:
    made = config(tmp_path)
    made = replace(made, model=replace(made.model, level=level))  # type: ignore[type-var]
    with pytest.raises(UserError, match=why):
        check_removable(made)
    made.data.domain.exports(made).check("scene")
    with pytest.raises(UserError, match="has no task scene or caption"):
        other = replace(made, tasks=("retrieval", "mlm"))
        other.data.domain.exports(other).check(None)


@pytest.mark.slow
def test_a_run_becomes_a_folder_that_answers(run: Path, tmp_path: Path, capsys) -> None:
    out, photo = tmp_path / "out", tmp_path / "photo.png"
    words = (run, "--task", "scene", "--calibration", 8, "--batch", 5, "--out", out)
    assert command("export", *words) == 0
    assert "logits off the full model's" in capsys.readouterr().out
    stated = json.loads((out / "certificate.json").read_text())
    assert stated["kind"] == "exact" and "merged into one dense matrix" in stated["statement"]
    assert (
        stated["full_model"]["largest_difference"] <= 1e-5 * stated["full_model"]["largest_logit"]
    )
    assert stated["test"]["images"] == 5 and stated["cost"]["flops_per_example"] > 0
    Image.fromarray(np.full((30, 44, 3), 90, np.uint8)).save(photo)
    assert command("predict", out, photo, "--out", tmp_path / "picture.png") == 0
    said = capsys.readouterr().out
    assert any(f": {label}; 0 violations" in said for label in SCENES)


@pytest.mark.slow
def test_captions_are_written_by_the_folder_alone(run: Path, tmp_path: Path) -> None:
    """Its own predict.py, moezoo.load and the run write the same sentence."""
    out, photo = tmp_path / "out", tmp_path / "photo.png"
    assert command("export", run, "--task", "caption", "--out", out) == 0
    stated = json.loads((out / "certificate.json").read_text())
    assert stated["kind"] == "exact" and {k["kind"] for k in stated["layers"].values()} == {
        "exact_fold"
    }
    assert stated["full_model"]["largest_difference"] <= 1e-5 * 20
    assert stated["test"]["metric"] == "bleu_4" and 0 <= stated["test"]["path"]["bleu_4"] <= 1
    Image.fromarray(np.full((90, 140, 3), 90, np.uint8)).save(photo)
    words = [sys.executable, "-I", out / "predict.py", photo, "--out", tmp_path / "said.png"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    predictor = moezoo.load(out)
    (row,) = predictor(np.full((1, 90, 140, 3), 90, np.uint8))["prediction"]
    sentence = load.words(predictor.manifest, row)
    assert done.stdout.startswith(f"{tmp_path / 'said.png'}: {sentence}\n") and sentence
    with Image.open(tmp_path / "said.png") as painted:
        assert painted.width == 140 and painted.height > 90, "the sentence stands below"
    asked = moezoo.load(run)(np.full((1, 90, 140, 3), 90, np.uint8), ["caption"])["caption"]
    np.testing.assert_array_equal(asked[0], row)
    assert command("verify", out) == 0


@pytest.mark.slow
def test_the_path_beside_the_full_model(run: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "costs.json"
    assert command("export", run, "--compare", "--json", file, "--batch", 5) == 0
    numbers = json.loads(file.read_text())
    path, sentence = numbers["paths"]
    assert sentence["task"] == "caption" and sentence["test"]["metric"] == "bleu_4"
    assert path["task"] == "scene" and path["test"]["metric"] == "accuracy"
    assert numbers["full"]["parameters"] > path["cost"]["parameters"]
    assert "| full model" in capsys.readouterr().out


@pytest.mark.slow
def test_all_tasks_are_scored(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    assert command("evaluate", run, "--json", file) == 0
    found = json.loads(file.read_text())["scores"]
    assert set(found) == {"scene", "caption", "retrieval", "mlm", "text_scene", "counts"}
