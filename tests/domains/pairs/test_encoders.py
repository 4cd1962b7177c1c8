"""A run on pairs as a folder of encoders: the model's features, each matrix once, no moezoo."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from moezoo.deploy.runtime.load import ExportError, load_export
from moezoo.domains.pairs.domain import words_of
from moezoo.domains.pairs.encoders import export_encoders, open_run, sides
from moezoo.domains.pairs.runtime import Encoders, load_encoders, ranking
from moezoo.errors import UserError
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.nn import module
from moezoo.train.checkpoint import FOLDER, Checkpointer
from moezoo.train.config import to_json
from tests.deploy.test_tools import command
from tests.domains.pairs.test_run import config
from tests.domains.pairs.test_tools import saved
from tests.train import tiny

TEXTS = ["a bedroom with two beds", "an office", "a door and a window"]
ALONE = """
import runpy, sys
for name in ("moezoo", "flax", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], None, "__main__")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(config(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoders(run, tmp_path_factory.mktemp("out") / "encoders")


@pytest.fixture(scope="module")
def encoders(folder: Path) -> Encoders:
    return load_encoders(folder)


def of_model(run: Path, condition: str, given: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the conditional model itself makes of it, router and experts at work."""
    opened = open_run(run)
    parts = module.split(opened.model)

    @jax.jit
    def encode(params: Any, given: dict[str, Any]) -> Any:
        model = module.merge(parts.definition, params, parts.stats)
        read = model.encode(opened.reading.inputs(**given), condition)
        return {"whole": read.whole_BD} | ({"text": read.text_BLD} if "text" in given else {})

    return jax.device_get(encode(parts.params, given))


@pytest.mark.parametrize("condition", ["scene|input", "retrieval|target", "caption|input"])
def test_features_are_the_models(run: Path, encoders: Encoders, condition: str) -> None:
    rng = np.random.default_rng(0)
    size = encoders.manifest["image_size"]
    every = {
        "image": rng.normal(size=(3, *size, 3)).astype(np.float32),
        "text": encoders.prepare("text", TEXTS),
    }
    given = {name: every[name] for name in encoders.manifest["conditions"][condition]["inputs"]}
    found, wanted = encoders(condition, **given), of_model(run, condition, given)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    assert np.ptp(found["whole"], axis=0).max() > 1e-3, "examples differ"


def test_what_the_folder_holds(run: Path, folder: Path, encoders: Encoders) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    tasks = ("scene", "caption", "retrieval", "mlm", "text_scene", "counts")
    assert set(encoders.conditions) == {f"{t}|{s}" for t in tasks for s in ("input", "target")}
    entries = manifest["conditions"]
    assert {n for n, e in entries.items() if e["inputs"] == ["image", "text"]} == {"caption|input"}
    assert entries["text_scene|input"]["inputs"] == ["text"]
    weights = {name for entry in entries.values() for name in entry["weights"]}
    assert not any(word in name for name in weights for word in ("level", "router", "experts"))
    assert entries["retrieval|input"]["weights"] == entries["scene|input"]["weights"]
    assert len({entry["program"] for entry in entries.values()}) == 3, "image, text and both"
    separate = sum(entry["cost"]["parameters"] for entry in entries.values())
    assert manifest["parameters"] < separate / 3, "conditions share what is equal"
    assert set(manifest["files"]) == {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert encoders.self_check() <= 1e-5


def test_texts_are_ranked_as_the_model_scores_them(run: Path, encoders: Encoders) -> None:
    opened = open_run(run)
    photos = np.random.default_rng(1).integers(0, 256, (2, 30, 50, 3), np.uint8)
    found = encoders.rank(photos, TEXTS)
    image = encoders.prepare("image", photos)
    text = words_of(opened.data).rows(TEXTS, opened.data.length)  # type: ignore
    sides = ("input", {"image": image}), ("target", {"text": text})
    both = [of_model(run, f"retrieval|{side}", given)["whole"] for side, given in sides]
    wanted = opened.model.scores(*both)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_folder_answers_without_moezoo(
    folder: Path, encoders: Encoders, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (21, 34, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "alone.py").write_text(ALONE)
    words = [sys.executable, "-I", "alone.py", folder / "encode.py", "photo.png", *TEXTS]
    done = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ranking(encoders, tmp_path / "photo.png", TEXTS, "retrieval")
    logits = encoders.rank(pixels[None], TEXTS)[0]
    assert done.stdout.splitlines()[0].endswith(TEXTS[int(np.argmax(logits))])


def test_wrong_inputs_are_refused(folder: Path, encoders: Encoders) -> None:
    image = np.zeros((1, 30, 40, 3), np.uint8)
    for call, message in [
        (lambda: encoders("scene", image=image), "There is no condition scene; take scene|input"),
        (lambda: encoders("scene|input", text=TEXTS), "encodes image, but text was given"),
        (lambda: encoders("caption|input", image=image), "encodes image and text, but image"),
        (
            lambda: encoders("caption|input", image=image, text=TEXTS),
            "needs equally many images and texts",
        ),
        (lambda: encoders("mlm|input"), "but nothing was given"),
        (lambda: encoders("mlm|input", text="a bed"), "a list of at least one string"),
        (lambda: encoders("mlm|input", text=[]), "a list of at least one string"),
        (lambda: encoders("mlm|input", text=["a zebra"]), "word 'zebra' of 'a zebra' is none of"),
        (lambda: encoders("mlm|input", text=[" "]), "no word in the text ' '"),
        (lambda: encoders("mlm|input", text=["bed " * 99]), "has 99 words"),
        (lambda: encoders("mlm|input", text=np.zeros((1, 3), np.int32)), "Token ids must be int32"),
        (lambda: encoders("scene|input", image=image[0]), r"Images must be \[batch"),
        (lambda: encoders.rank(image, TEXTS, "caption"), "use counts or retrieval or scene"),
        (lambda: load_export(folder), "holds encoders, not one task: run encode.py in"),
    ]:
        with pytest.raises(ExportError, match=message):
            call()


def test_what_cannot_be_written_is_told_before_any_work(run: Path, tmp_path: Path, capsys) -> None:
    tokens = config(tmp_path)
    tokens = replace(tokens, model=replace(tokens.model, level="token"))  # type: ignore[type-var]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    out = ("--out", tmp_path / "out")
    for words, message in [
        ((run, *out, "--conditions", "retreival|input"), "did you mean retrieval|input"),
        ((saved(tokens), *out), "because tokens decide (level token)"),
        ((run, "--out", tmp_path / "thesis"), "exists and is no export"),
        ((tmp_path / "nothing", *out), "nothing"),
    ]:
        assert command("encoders", *words) == 2, words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    images = tiny.config(str(tmp_path), model=tiny.dense())
    with Checkpointer(tmp_path / "images" / FOLDER, to_json(images)) as checkpoints:
        checkpoints.save(1, {"params": {"a": np.zeros(1)}, "stats": {}})
    with pytest.raises(UserError, match="there are no conditions"):
        open_run(tmp_path / "images")


@pytest.mark.slow
def test_the_command_writes_some_conditions(run: Path, tmp_path: Path, capsys) -> None:
    names = ("retrieval|input", "retrieval|target")
    assert command("encoders", run, "--out", tmp_path / "out", "--conditions", *names) == 0
    assert "parameters for 2 conditions" in capsys.readouterr().out.replace("\n", " ")
    assert load_encoders(tmp_path / "out").conditions == names
    assert command("encoders", run, "--out", tmp_path / "out") == 2
    assert "--replace" in capsys.readouterr().err


def test_every_side_is_named_with_what_it_reads(tmp_path: Path) -> None:
    found = sides(config(tmp_path))
    assert found["caption|input"].image_BHWC is not None
    assert found["scene|input"].text_BL is None and isinstance(found["mlm|target"], EncoderInputs)


def test_the_folder_of_one_task_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 1, "task": {"name": "depth"}}')
    with pytest.raises(ExportError, match="holds one task, not encoders: run predict.py in that"):
        load_encoders(tmp_path)
