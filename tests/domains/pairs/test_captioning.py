"""Captions as a path: the full model's sentences, folded where a condition decides."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.data.source import ArraySource, Info
from moezoo.deploy import onnx_file
from moezoo.deploy.path import TaskPath, unread
from moezoo.domains.images.export import photos
from moezoo.domains.pairs.captioning import Captioner, caption_path, caption_task, with_captions
from moezoo.domains.pairs.data.words import END, MARKS, PAD, Vocabulary
from moezoo.nn import module
from tests.domains.pairs.test_export import IMAGE, SIZE, config
from tests.models.tiny import filled, quick_jit

NEW = 5
LEVELS = ["attribute", "task", "dense", "modality", "token", "context"]


@cache
def captioner(level: str) -> Captioner:
    parts = filled(lambda: config(level).build({}, SIZE, nnx.Rngs(0)))
    parts.params["log_temperature"] = jnp.log(0.07)
    return Captioner(module.merge(*parts), "caption", NEW)


@cache
def path_of(level: str) -> TaskPath:
    return caption_path(captioner(level), "caption", photos(SIZE))


@pytest.mark.parametrize(
    "level",
    ["attribute", *(pytest.param(name, marks=pytest.mark.slow) for name in LEVELS[1:])],
)
def test_the_path_writes_the_full_models_sentences(level: str) -> None:
    path, full = path_of(level), captioner(level)
    parts = module.split(full)

    def whole(params: Any, image: Any) -> Any:
        return module.merge(parts.definition, params, {})(image).predictions["caption"]

    wanted = quick_jit(whole)(parts.params, IMAGE)
    found = quick_jit(path.call)(path.weights, IMAGE)
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-4, atol=1e-5)
    assert found.logits.shape == (3, NEW, 11) and path.exact
    np.testing.assert_array_equal(found.violations_B, [0, 0, 0])
    assert np.ptp(wanted, axis=0).max() > 1e-2, "images differ"


def test_what_decides_is_gone_and_nothing_is_unread() -> None:
    path = path_of("attribute")
    assert {layer["kind"] for layer in path.report.values()} == {"exact_fold"}
    assert not [n for n in path.weights if "level" in n or "experts" in n]
    assert unread(path.call, path.weights, path.input.batch(1)) == []
    assert path.own_count and path.weights["words"].shape == (11, 8)


@pytest.mark.slow
def test_where_tokens_decide_all_experts_stay() -> None:
    report = path_of("token").report
    assert list(report) == [f"encoder/blocks/0/{half}/level" for half in ("attn", "mlp")]
    assert {layer["kind"] for layer in report.values()} == {"whole"}


@pytest.mark.slow
def test_onnx_runtime_writes_the_same(tmp_path) -> None:
    """The loop over words is written out."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    task = caption_task(Vocabulary(map(chr, range(97, 104))))
    told = onnx_file.write(tmp_path, path_of("attribute"), task, IMAGE)
    assert told["largest_difference"] <= 1e-5 and told["nodes"] > 100 * NEW


def test_true_captions_end_with_their_mark() -> None:
    words = Vocabulary.of(["a bed.", "a red sofa"])
    info = Info("made", "test", (1, 1), (), {})
    source = ArraySource(info, {"image": np.zeros((2, 1, 1, 3), np.uint8)}, ["A bed.", "a red"])
    rows = with_captions(source, words, 5)
    first, second = (rows[i]["caption"] for i in range(2))
    assert list(first[3:]) == [END, PAD] and list(second[2:]) == [END, PAD, PAD]
    task = caption_task(words)
    assert [words.words[i] for i in task.metric.written.of(first)] == ["a", "bed", "."]  # type: ignore[attr-defined]
    assert task.painting()["marks"] == len(MARKS) and task.painting()["kind"] == "sentence"
