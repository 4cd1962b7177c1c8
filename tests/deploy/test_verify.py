"""A folder that says what it is passes; one that contradicts itself does not, checksums or not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.deploy import (
    certificate,
    cost,
    export,
    litert_file,
    onnx_file,
    proof,
    stablehlo_file,
)
from moezoo.deploy.export import Content, save_tensors
from moezoo.deploy.runtime import verify
from moezoo.deploy.runtime.forms import ExportError
from moezoo.deploy.runtime.load import read_tensors
from tests.deploy.conftest import Case
from tests.deploy.test_export import FACTS

TRIALS, EVENTS = 100, {1.0: 7, 5.0: 3, 10.0: 0}


def stated(case: Case) -> dict[str, Any]:
    """A certificate as `produce.certify` makes it, of measurements that nobody made."""
    rates = [
        {
            "level": level,
            "trials": TRIALS,
            "events": events,
            "rate": events / TRIALS,
            "rate_at_most": certificate.at_most(events, TRIALS),
        }
        for level, events in EVENTS.items()
    ]
    size = {
        "parameters": cost.parameters(case.cut.weights),
        "bytes": cost.bytes_of(case.cut.weights),
    }
    scores = {"full": {"mIoU": 0.5}, "path": {"mIoU": 0.4}}
    return certificate.contents(case.cut) | {
        "cost": size,
        "verification": {"coverage": 0.9, "disagreement": rates},
        "test": {"metric": "mIoU", "change": 0.4 - 0.5, **scores},
    }


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = {"path": {"task": case.cut.task, "plan": json.loads(case.plan.to_json())}}
    content = Content(case.cut, case.task, FACTS, plan, stated(case), case.images[:3])
    return export.write(tmp_path_factory.mktemp("export") / "out", content)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def forge(folder: Path, file: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file, and every checksum with it, as an attacker does.

    The certificate stands in the manifest, too: both change.
    """
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))
    manifest = json.loads((folder / "manifest.json").read_text())
    if file == "certificate.json":
        manifest["certificate"] = value
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_right_is_said(folder: Path, case: Case) -> None:
    said = dict(verify.verify(folder))
    assert list(said) == ["files", "computation", *list(verify.CHECKS)[1:]]  # no other formats
    assert said["computation"].startswith("3 stored examples, together and one by one: at most")
    clean = int(np.sum(np.asarray(case.prediction.violations_B[:3]) == 0))
    assert said["computation"].endswith(f"{clean} of them without violation")
    assert said["parameters"].startswith(f"{cost.parameters(case.cut.weights):,}, ")
    assert said["bounds"] == "3 one-sided 95 % bounds on 100 examples"
    assert said["scores"] == "mIoU 0.5000 of the full model, 0.4000 of the path"


def setting(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def widen(layers: Any) -> None:
    """Say that experts have a feature more than they have."""
    layer = layers["blocks/0/mlp"]
    layer |= {"hidden": layer["hidden"] + 1}
    layer |= {"width": layer["hidden"] * len(layer["kept"])}


LAYER = ("layers", "blocks/0/mlp")
RATE = ("verification", "disagreement", 1)
LIES: list[tuple[str, Callable[[Any], None], str]] = [
    ("certificate.json", setting("kind", to="exact"), "kind does not follow|said to be exact"),
    ("certificate.json", setting("kind", to="perfect"), "is no certificate of a path .kind is"),
    ("certificate.json", setting(*LAYER, "kind", to="exact_support"), "by its experts pruned"),
    ("certificate.json", setting(*LAYER, "kept", to=[0, 1]), "keeps 2 experts, its arrays"),
    ("certificate.json", setting(*LAYER, "width", to=64), "width is not [0-9]+"),
    ("certificate.json", setting(*LAYER, "width", to=None), "width is not [0-9]+"),
    ("certificate.json", lambda v: widen(v["layers"]), "hidden is 17, its experts have other"),
    ("certificate.json", setting(*LAYER, "chosen", to=1), "layers are not the certificate's"),
    ("certificate.json", setting("plan", "hash", to="0" * 16), "not the one certified"),
    ("certificate.json", setting("cost", "parameters", to=12), "cost says 12 parameters"),
    ("certificate.json", setting("cost", "bytes", to=12), "cost says 12 bytes of weights"),
    ("certificate.json", setting(*RATE, "rate_at_most", to=0.01), "rate_at_most is not 0.07"),
    ("certificate.json", setting(*RATE, "rate", to=0.01), "rate is not 3 of 100"),
    ("certificate.json", setting(*RATE, "events", to=101), "has 101 events in 100 trials"),
    ("certificate.json", setting("verification", "coverage", to=0.955), "no share of 100"),
    ("certificate.json", setting("verification", "coverage", to=0.99), "without violation"),
    ("certificate.json", setting("verification", to=[]), "no certificate of a path"),
    ("certificate.json", setting("test", "change", to=0.0), "not the scores' difference"),
    ("certificate.json", setting("test", "metric", to="rmse"), "has no 'rmse' of both"),
    ("certificate.json", lambda value: value.pop("verification"), "has no verification"),
    ("certificate.json", lambda value: value.pop("layers"), "layers is missing"),
    ("manifest.json", setting("path", "parameters", to=5), "manifest.path says 5 parameters"),
    ("manifest.json", setting("path", "kind", to="exact"), "manifest.path.kind is not"),
    ("manifest.json", setting("certificate", to={}), "are not the same"),
    ("config.json", setting("path", "plan", "task", to="depth"), "not the one certified"),
    ("config.json", setting("path", "plan", to=3), "config.json.path.plan is 3"),
    ("config.json", lambda value: value.clear(), "config.json.path is missing"),
]


@pytest.mark.parametrize(("file", "change", "sentence"), LIES, ids=[x[2][:30] for x in LIES])
def test_contradictions_are_named(copy: Path, file: str, change: Any, sentence: str) -> None:
    forge(copy, file, change)
    with pytest.raises(ExportError, match=sentence):
        verify.verify(copy)


def test_stored_outputs_of_somebody_else(copy: Path) -> None:
    golden = read_tensors(copy / "golden.safetensors")
    save_tensors(copy / "golden.safetensors", golden | {"logits": golden["logits"] + 0.01})
    forge(copy, "config.json", lambda value: None)
    with pytest.raises(ExportError, match="gives other outputs on this machine: logits is"):
        verify.verify(copy)


def test_stored_inputs_that_are_too_many(copy: Path) -> None:
    golden = read_tensors(copy / "golden.safetensors")
    many = {name: np.repeat(a[:1], verify.MOST + 1, axis=0) for name, a in golden.items()}
    save_tensors(copy / "golden.safetensors", many)
    forge(copy, "config.json", lambda value: None)
    with pytest.raises(ExportError, match="are not 1 to 256 examples"):
        verify.verify(copy)


def test_an_expert_that_is_not_there(copy: Path) -> None:
    """The plan, the layers and the hash agree with each other, but the arrays do not."""

    def fewer(layers: dict[str, Any]) -> None:
        layers["blocks/0/mlp"]["kept"] = layers["blocks/0/mlp"]["kept"][:-1]

    forge(copy, "config.json", lambda v: fewer_kept(v["path"]["plan"]["kept"]))
    plan = json.loads((copy / "config.json").read_text())["path"]["plan"]
    text = json.dumps(plan, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    forge(copy, "manifest.json", setting("path", "plan", to=digest))
    forge(copy, "manifest.json", lambda v: fewer(v["path"]["layers"]))
    forge(copy, "certificate.json", setting("plan", "hash", to=digest))
    forge(copy, "certificate.json", lambda v: fewer(v["layers"]))
    with pytest.raises(ExportError, match="keeps 4 experts, its arrays have others"):
        verify.verify(copy)


def fewer_kept(kept: dict[str, list[int]]) -> None:
    kept["blocks/0/mlp"] = kept["blocks/0/mlp"][:-1]


@pytest.mark.slow
def test_a_process_without_moezoo_checks_it(folder: Path, copy: Path) -> None:
    assert proof.checked(folder)[-1].endswith("is what it says.")
    # The folder's own copy, which its owner runs; the other one is never run.
    command = [sys.executable, "-I", str(folder / "verify.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("is what it says.\n"), done.stderr
    (copy / "verify.py").write_text("raise SystemExit('run')")
    forge(copy, "certificate.json", setting("test", "change", to=0.0))
    with pytest.raises(ExportError, match="^.*contradicts itself: test.change is not"):
        proof.checked(copy)


# --- files for other runtimes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_all_forms(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same path for ONNX Runtime, for LiteRT where it is installed, and as plain StableHLO."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    made = {"onnx": onnx_file, "stablehlo": stablehlo_file}
    made |= {"litert": litert_file} if find_spec("litert_converter") else {}
    plan = {"path": {"task": case.cut.task, "plan": json.loads(case.plan.to_json())}}
    content = Content(case.cut, case.task, FACTS, plan, stated(case), case.images[:2])

    def more(folder: Path) -> dict[str, Any]:
        given = case.images[:2]
        return {
            "formats": {n: f.write(folder, case.cut, case.task, given) for n, f in made.items()}
        }

    return export.write(tmp_path_factory.mktemp("forms") / "out", content, more=more)


def with_new_sums(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_other_formats_are_run_again(in_all_forms: Path, tmp_path: Path) -> None:
    said = dict(verify.verify(in_all_forms))["other formats"]
    assert "onnx at most" in said and "stablehlo (not run)" in said
    assert ("litert at most" in said) == bool(find_spec("litert_converter"))
    shutil.copytree(in_all_forms, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    told = dict(verify.verify(tmp_path / "copy"))["files"]
    assert told.endswith("not listed, and not looked at: notes.txt")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty graph": (lambda f: (f / "model.onnx").write_bytes(b""), "model.onnx"),
    "half a graph": (
        lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:5000]),
        "model.onnx cannot be read",
    ),
    "no StableHLO": (
        lambda f: (f / "model.batch1.stablehlo").write_bytes(b"\xff" * 1000),
        "model.batch1.stablehlo is no file of its kind",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_broken_files_are_found_whatever_the_sums(
    name: str, in_all_forms: Path, tmp_path: Path
) -> None:
    change, says = DAMAGE[name]
    shutil.copytree(in_all_forms, tmp_path / "copy")
    change(tmp_path / "copy")
    with_new_sums(tmp_path / "copy")
    with pytest.raises(ExportError, match=says):
        verify.verify(tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "says"),
    [
        (None, "formats is None"),
        (7, "formats is 7"),
        ({}, "formats and files do not agree about model.onnx"),
        ({"coreml": {}}, "formats has 'coreml', which is none of onnx, litert, stablehlo"),
        ({"onnx": {"opset": 20}}, r"formats\.onnx\.largest_difference is missing"),
    ],
)
def test_what_is_said_of_other_formats_has_a_form(
    to: Any, says: str, in_all_forms: Path, tmp_path: Path
) -> None:
    shutil.copytree(in_all_forms, tmp_path / "copy")
    file = tmp_path / "copy" / "manifest.json"
    manifest = json.loads(file.read_text())
    changed = manifest["formats"] | to if isinstance(to, dict) and "onnx" in to else to
    file.write_text(json.dumps(manifest | {"formats": changed}))
    with pytest.raises(ExportError, match=says):
        verify.verify(tmp_path / "copy")


def test_programs_that_are_not_ours_are_told(copy: Path) -> None:
    assert "programs: those that load and check are this version's" in proof.checked(copy)
    (copy / "predict.py").write_text("import os\nos.abort()\n")
    with_new_sums(copy)
    said = proof.checked(copy)
    assert any(line.startswith("programs: predict.py are not this version's") for line in said)


def test_a_path_that_is_no_table_is_refused(copy: Path) -> None:
    file = copy / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"path": 7}))
    with pytest.raises(ExportError, match="path is 7"):
        verify.verify(copy)
