"""The commands, from a run's folder to a picture, and what they say to wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from moezoo.deploy import export
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.plan import Plan
from moezoo.deploy.runtime import load
from moezoo.domains.images.data.rooms import names
from moezoo.domains.images.domain import DataConfig
from moezoo.errors import run_command
from moezoo.nn import module
from moezoo.train.checkpoint import FOLDER, Checkpointer
from moezoo.train.config import Config, to_json
from tests.deploy.conftest import CONFIG, Case
from tests.deploy.test_export import content
from tests.fixtures import tool


def command(name: str, *words: object) -> int:
    """Run tools/<name>.py in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: tool(name).main([*map(str, words)], f"tools/{name}.py"))
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def exported(case: Case, tmp_path_factory) -> Path:
    return export.write(tmp_path_factory.mktemp("tools") / "out", content(case))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.mark.slow
def test_predict(exported: Path, photo: Path, tmp_path: Path, capsys) -> None:
    out, arrays = tmp_path / "picture.png", tmp_path / "arrays.npz"
    assert command("predict", exported, photo, "--out", out, "--arrays", arrays) == 0
    assert re.search(r"semseg of .*: thing \d \d+ %, .*; \d+ violations", capsys.readouterr().out)
    with Image.open(out) as picture:
        assert picture.size == (44, 30)
    with np.load(arrays) as found:
        assert set(found.files) == {"logits", "prediction", "violations"}


def test_predict_says_what_is_wrong(exported: Path, photo: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:300])
    (tmp_path / "text.png").write_text("hello")
    out = tmp_path / "picture.png"
    for words, message in [
        ((exported, tmp_path / "cut.jpg"), "cannot be read"),
        ((exported, tmp_path / "text.png"), "is not a picture"),
        ((exported, tmp_path / "none.png"), "none.png cannot be read, it is missing"),
        ((exported, tmp_path), "is a folder"),
        ((tmp_path, photo), "not an exported folder"),
        ((exported,), "missing"),
        ((exported, photo, "--stream"), "is an export, whose program has all of its weights"),
    ]:
        assert command("predict", *words, "--out", out) == 2
        said = capsys.readouterr().err
        assert message.lower() in said.lower() and said.count("\n") == 1, said
    assert command("predict", exported, photo, "--out", photo / "x.png") == 2
    said = capsys.readouterr().err
    assert "write" in said and said.count("\n") == 1, said
    assert not out.exists()


def test_predict_overwrites_neither_photo_nor_export(
    exported: Path, photo: Path, tmp_path: Path, capsys
) -> None:
    before = photo.read_bytes(), (exported / "manifest.json").read_bytes()
    out = tmp_path / "picture.png"
    for words, message in [
        (("--out", photo), "--out is .* which is to be predicted"),
        (("--out", out, "--arrays", photo), "--arrays is .* which is to be predicted"),
        (("--out", out, "--arrays", exported / "manifest.json"), "lies in the folder of the model"),
        (("--out", exported / "pictures/p.png"), "lies in the folder of the model"),
        (("--out", out, "--arrays", tmp_path / "x/../picture.png"), "are both"),
    ]:
        assert command("predict", exported, photo, *words) == 2
        assert re.search(message, capsys.readouterr().err)
    assert before == (photo.read_bytes(), (exported / "manifest.json").read_bytes())
    with pytest.raises(load.ExportError, match="would replace .*, which is to be predicted"):
        load.predict_file(load.load_export(exported), photo, photo)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with a checkpoint that nobody trained, on a few rendered rooms."""
    place = tmp_path_factory.mktemp("run")
    data = DataConfig(resolution=(16, 16), train=12, test=6, data_dir=str(place / "data"))
    config = Config("small", CONFIG, ("semseg", "depth"), data, directory=str(place))
    channels = {"semseg": len(names.CLASSES), "depth": 1}
    parts = module.abstract(lambda: CONFIG.build(channels, (16, 16), nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def arrays(shapes: dict) -> dict:
        flat = module.flatten(shapes)
        return module.unflatten(
            {
                name: jnp.asarray(0.3 * np.abs(rng.normal(size=leaf.shape)), jnp.float32)
                for name, leaf in flat.items()
            }
        )

    state = {"params": arrays(parts.params), "stats": arrays(parts.stats)}
    with Checkpointer(place / "small" / FOLDER, to_json(config)) as checkpoints:
        checkpoints.save(3, state)
    return place / "small"


@pytest.mark.slow
def test_prune_a_run_and_use_the_export(run: Path, photo: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "pruned"
    words = (run, "--task", "depth", "--keep", 3, "--score", "gram", "--calibration", 8)
    assert command("prune", *words, "--batch", 4, "--out", out) == 0
    assert "images without violation" in capsys.readouterr().out
    stated = json.loads((out / "certificate.json").read_text())
    assert stated["calibration"]["images"] == 8
    assert stated["verification"]["images"] == stated["test"]["images"] == 3
    assert stated["verification"]["clean_but_not_bit_equal"] == 0
    assert stated["test"]["metric"] == "rmse" and stated["source"]["step"] == 3
    plan = Plan.from_json((out / "plan.json").read_text())
    assert [len(ids) for ids in plan.kept.values()] == [3, 3]
    found = Calibration.load(out / "calibration.npz")
    assert found.fingerprint == plan.calibration == stated["calibration"]["fingerprint"]
    for name in ("usage", "predictions"):
        with Image.open(out / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    assert command("predict", out, photo, "--out", tmp_path / "picture.png") == 0
    assert command("prune", *words, "--out", out) == 2
    assert "exists" in capsys.readouterr().err


def test_wrong_words_end_before_any_work(run: Path, tmp_path: Path, capsys) -> None:
    out = ("--out", tmp_path / "out")
    for name, words, message in [
        ("prune", (run, "--task", "depth", *out), "--keep (experts per layer), --total"),
        ("prune", (run, "--keep", 2, *out), "--task NAME"),
        ("prune", (run, "--sweep", "--keep", 2, *out), "tries every number of experts"),
        ("prune", (run, "--sweep", "--max-loss", "1%", *out), "leave one of the two out"),
        ("prune", (run, "--task", "depth", "--max-loss", "1x", *out), "--max-loss is '1x'"),
        ("prune", (run, "--task", "depth", "--max-loss", "150%", *out), "between 0 and 100 %"),
        ("prune", (run, "--task", "depth", "--keep", 2, "--novice", "big", *out), "affine:4"),
        (
            "prune",
            (run, "--task", "depth", "--keep", 2, "--novice", "mean", "--router", "cut", *out),
            "leave one of the two out",
        ),
        ("prune", (run, "--task", "depth", "--bytes", 9, *out), "The budget is 9"),
        ("prune", (run, "--task", "depht", "--keep", 2, *out), "did you mean depth"),
        ("prune", (run, "--task", "depth", "--keep", 9, *out), "between 1 and 6"),
        ("prune", (run, "--task", "depth", "--keep", 2, "--total", 5, *out), "give one"),
        ("prune", (run, "--task", "depth", "--keep", 2, "--score", "magic", *out), "magic"),
        ("export", (tmp_path / "nothing", "--task", "depth", *out), "no such folder"),
        ("export", (run, "--task", "depth"), "--task TASK --out FOLDER"),
        ("export", (run, "--task", "depth", "--keep", "some", *out), "some"),
    ]:
        assert command(name, *words) == 2, words
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sweep_shows_what_pruning_gives(run: Path, tmp_path: Path, capsys) -> None:
    out, few = tmp_path / "curve", ("--calibration", 8, "--batch", 4)
    assert command("prune", run, "--sweep", "--task", "depth", *few, "--out", out) == 0
    assert "experts" in capsys.readouterr().out
    with Image.open(out / "curve.png") as picture:
        assert min(picture.size) > 200
    (curve,) = json.loads((out / "curve.json").read_text())["curves"]
    assert len(curve["methods"]) == 6 and curve["methods"][0]["score"] == "reap"
    assert [p["keep"] for p in curve["methods"][0]["points"]] == [5, 4, 3, 2, 1]
    for method in (0, 3):  # with novices, and with routers that are cut
        tried = curve["methods"][method]
        ways = ("--score", tried["score"], "--router", tried["router"])
        (point,) = (p for p in tried["points"] if p["keep"] == 3)
        path = tmp_path / f"path_{method}"
        assert (
            command("prune", run, "--task", "depth", "--keep", 3, *ways, *few, "--out", path) == 0
        )
        stated = json.loads((path / "certificate.json").read_text())
        assert {n: x["kept"] for n, x in stated["layers"].items()} == point["kept"]
        assert stated["cost"]["parameters"] == point["cost"]["parameters"]
        assert stated["test"]["path"]["rmse"] == pytest.approx(point["test"]["path"]["rmse"])
        assert stated["verification"]["coverage"] == point["verification"]["coverage"]
        assert stated["plan"]["novices"] == ("cut" if method else "mean")
    asked = ("--task", "depth", *few, "--novice", "affine:2")
    best = tmp_path / "best"
    assert command("prune", run, *asked, "--max-loss", "99%", "--out", best) == 0
    stated = json.loads((best / "certificate.json").read_text())
    assert stated["chosen_by"]["limits"] == {"loss": 0.99, "disagreement": None}
    assert stated["plan"]["novices"] == "affine:2" and stated["kind"] == "pruned"
    assert command("prune", run, *asked, "--max-disagreement", "50%", "--out", tmp_path / "no") == 2
    assert "already loses more than" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_comparison_of_all_paths(run: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "costs.json"
    assert command("export", run, "--compare", "--json", file, "--calibration", 8) == 0
    numbers = json.loads(file.read_text())
    paths = [(p["task"], p["kind"], p["plan"]["budget"]) for p in numbers["paths"]]
    assert paths == [
        (task, kind, budget)
        for task in ("semseg", "depth")
        for kind, budget in (
            ("exact", "all"),
            ("pruned", "3 per layer"),
            ("pruned", "1 per layer"),
        )
    ]
    sizes = [p["cost"]["parameters"] for p in numbers["paths"]]
    assert sizes[0] > sizes[1] > sizes[2] and numbers["full"]["parameters"] > sizes[0]
    assert "all tasks" in capsys.readouterr().out
