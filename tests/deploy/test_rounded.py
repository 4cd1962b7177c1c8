"""Weights in fewer bits: what is stored, what is computed with, what is said of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.bench import paths
from moezoo.deploy import export, onnx_file, rounded, stablehlo_file
from moezoo.deploy.export import Content
from moezoo.deploy.produce import Request
from moezoo.deploy.rounded import SCALE, restored
from moezoo.deploy.runtime import other_forms
from moezoo.deploy.runtime.forms import ExportError
from moezoo.deploy.runtime.load import load_export
from moezoo.errors import UserError
from tests.deploy.conftest import Case
from tests.deploy.test_export import FACTS
from tests.models.test_gradients import shrunk
from tests.models.tiny import loaded


@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_whole_numbers_are_the_nearest(shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    array[..., 0] = 0.0  # a channel that is never used
    stored = rounded.ROUNDED["int8"]("a/kernel", jnp.asarray(array))
    found = np.asarray(restored(stored)["a/kernel"])
    assert stored["a/kernel"].dtype == jnp.int8 and found.dtype == np.float32
    axes = (0, 1, 2) if array.ndim == 4 else (-2,)
    step = np.abs(array).max(axis=axes, keepdims=True) / rounded.LARGEST
    assert np.all(np.abs(found - array) <= step / 2 + 1e-6)
    assert np.all(found[..., 0] == 0)
    np.testing.assert_allclose(np.abs(found).max(axis=axes), np.abs(array).max(axis=axes), 1e-5)


@pytest.mark.parametrize(("kind", "least", "off"), [("int8", 0.25, 0.2), ("bfloat16", 0.5, 0.2)])
def test_a_path_computes_with_what_the_numbers_stand_for(
    case: Case, kind: str, least: float, off: float
) -> None:
    path = rounded.rounded(case.whole, kind)
    size, before = (sum(int(w.nbytes) for w in p.weights.values()) for p in (path, case.whole))
    assert least * before < size < (least + 0.25) * before
    plain = replace(case.whole, weights=restored(path.weights))
    images = case.images[:4]
    found, wanted = (jax.jit(p.call)(p.weights, images).logits for p in (path, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.any(np.asarray(found) != case.full_logits[:4])
    routers = [n for n in path.weights if "/router/" in n]
    assert routers and all(path.weights[n] is case.whole.weights[n] for n in routers)
    said = rounded.described(path, case.whole, kind)
    assert said["type"] == kind and said["bytes_before"] == before
    assert 0 < said["largest_rounding"] < 0.01
    assert 0 < said["rounded_arrays"] <= said["arrays"] == len(case.whole.weights)


def test_float32_stays_and_others_are_refused(case: Case) -> None:
    assert rounded.rounded(case.whole, "float32") is case.whole
    path = rounded.rounded(case.whole, "bfloat16")
    with pytest.raises(UserError, match="--weights int8 rounds float32, but this model has bfloat"):
        rounded.rounded(path, "int8")
    with pytest.raises(UserError, match="Unknown type of --weights 'int4'"):
        Request(weights="int4")
    with pytest.raises(UserError, match="ONNX runtimes hardly know bfloat16"):
        onnx_file.check("bfloat16")


@pytest.mark.slow
def test_an_export_of_rounded_weights_runs(case: Case, tmp_path: Path) -> None:
    path = rounded.rounded(case.cut, "int8")

    def more(folder: Path) -> dict:
        given = case.images[:2]
        both = {"onnx": onnx_file, "stablehlo": stablehlo_file}
        return {"formats": {k: f.write(folder, path, case.task, given) for k, f in both.items()}}

    content = Content(path, case.task, FACTS, {}, {}, case.images[:2])
    folder = export.write(tmp_path / "out", content, more=more)
    predictor = load_export(folder)
    assert predictor.self_check() <= 1e-5
    assert predictor.warmup(5) == [1, 2, 4, 8]
    rows = [predictor(case.images[:n])["logits"] for n in (3, 5)]
    np.testing.assert_allclose(rows[0], rows[1][:3], rtol=1e-4, atol=1e-4)
    held = json.loads((folder / "manifest.json").read_text())
    assert held["formats"]["onnx"]["largest_difference"] <= other_forms.OFF
    assert held["formats"]["stablehlo"]["largest_difference"] <= stablehlo_file.OFF
    assert re.fullmatch(r"\d+\.\d+\.\d+", held["formats"]["stablehlo"]["version"])
    assert {onnx_file.NAME, stablehlo_file.NAME} <= set(held["files"])
    assert b".py" not in (folder / stablehlo_file.NAME).read_bytes()
    assert any(SCALE in name for name in path.weights)
    assert (folder / "model.onnx").stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 0)
    content = Content(case.cut, case.task, FACTS, {}, {}, case.images[:2])

    def more(folder: Path) -> dict:
        return {"formats": {"onnx": onnx_file.write(folder, case.cut, case.task, case.images[:2])}}

    folder = export.write(tmp_path / "out", content, more=more)
    graph, apart = folder / onnx_file.NAME, folder / onnx_file.APART
    assert graph.stat().st_size < apart.stat().st_size and apart.stat().st_mode & 0o777 == 0o644
    held = json.loads((folder / "manifest.json").read_text())
    assert {onnx_file.NAME, onnx_file.APART} <= set(held["files"])
    assert load_export(folder).self_check() <= 1e-5
    apart.write_bytes(apart.read_bytes()[:-4])
    with pytest.raises(ExportError, match=onnx_file.APART):
        load_export(folder)


@pytest.mark.parametrize("name", ["rooms/mlore_tiny", "sounds/soft_moa_tiny"])
def test_routers_of_other_mixtures_keep_their_float32(name: str, tmp_path: Path) -> None:
    model, classes = loaded(replace(shrunk(name, tmp_path), start_from=None))
    exact, _ = paths.whole_path(model, classes, model.tasks[0].name)
    path = rounded.rounded(exact, "int8")
    routers = [n for n in exact.weights if "/router/" in n and exact.weights[n].ndim > 1]
    assert routers and all(path.weights[n] is exact.weights[n] for n in routers)
