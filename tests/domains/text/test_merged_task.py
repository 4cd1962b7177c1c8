"""A decoder whose tasks decide what is added: merged for one of them, and asked as one of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.generate import Settings
from moezoo.domains.text import adapter, generation
from moezoo.domains.text.domain import TEMPLATES, TextDataConfig, task_number, tokenizer_of
from moezoo.domains.text.inference import TextInference, complete
from moezoo.errors import UserError
from moezoo.models.polytropon.model import PolyConfig
from moezoo.nn import module, surgery
from moezoo.nn.context import NO_TASK
from moezoo.nn.injection import Adapted, fold
from moezoo.weights import hf
from tests.models.tiny import filled

DECODER = DecoderConfig(vocabulary=259, width=8, depth=1, heads=2, groups=1, hidden=6, length=16)
DATA = TextDataConfig(name="instructions", length=16, only=("sort", "double"))


@pytest.fixture(scope="module")
def parts() -> module.ModuleParts:
    config = PolyConfig(decoder=DECODER, tasks=2, skills=2, rank=2, heads=2, pace=1.0)
    return filled(lambda: config.build({"lm": 259}, (1, 16), nnx.Rngs(0)))


@pytest.fixture
def trained(parts: module.ModuleParts, monkeypatch: pytest.MonkeyPatch) -> Any:
    def language_model(run: Path) -> tuple[Any, TextDataConfig]:
        return module.merge(parts.definition, parts.params, parts.stats), DATA

    monkeypatch.setattr(adapter, "language_model", language_model)
    monkeypatch.setattr(generation, "language_model", language_model)
    return language_model


def test_the_merged_decoder_of_a_task_is_that_task_s(tmp_path: Path, trained: Any) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for task, message in ((None, "needs a task"), ("sorting", "sort")):
        with pytest.raises(UserError, match=message):
            adapter.write_merged(run, out, task)
        assert not out.exists()
    adapter.write_merged(run, out, "sort")
    got = module.flatten(hf.load(out).parts.params)
    # Tasks are numbered in the order of their names.
    model = trained(run)[0]
    for path, layer in surgery.find(model, Adapted).items():
        kernel = np.asarray(layer.base.kernel.get_value())
        first, second = (layer.update.delta(layer.update.constant_gates(t)) for t in (0, 1))
        np.testing.assert_allclose(got[f"{path}/kernel"], kernel + second, rtol=1e-4, atol=1e-5)
        assert np.abs(first - second).max() > 1e-4


def test_a_prompt_is_answered_as_one_of_its_task(tmp_path: Path, trained: Any) -> None:
    for task, message in (
        (None, "the task decides what is computed: say which .* --task with one of double, sort"),
        ("sorting", "sort"),
    ):
        with pytest.raises(UserError, match=message):
            generation.open_speaker(tmp_path, task=task)
    settings, answers = Settings(new=6), {}
    for task in ("double", "sort"):
        speaker = generation.open_speaker(tmp_path, task=task)
        answers[task] = complete(speaker, ["ab", "c"], settings)
        model = trained(tmp_path)[0]
        fold(model, task_number(task, DATA))
        dense = speaker._replace(parts=module.split(model), context=NO_TASK)
        assert answers[task] == complete(dense, ["ab", "c"], settings)
        with pytest.raises(UserError, match="Nothing in .* depends on the task"):
            generation._context(tmp_path, model, DATA, task)
    assert answers["double"] != answers["sort"]


def test_a_loaded_model_answers_by_task(tmp_path: Path, trained: Any) -> None:
    loaded: Any = SimpleNamespace(model=trained(tmp_path)[0], tasks=("the task",))
    asked = TextInference(loaded, tokenizer_of(DATA), TEMPLATES[DATA.template], ("double", "sort"))
    assert list(asked.tasks) == ["double", "sort"]
    found = asked.predict(["ab"])
    speaker = generation.open_speaker(tmp_path, task="sort")
    assert found["sort"] == complete(speaker, ["ab"], Settings(new=128))
    assert list(asked.predict(["ab"], ["sort"])) == ["sort"]
    one, two = (asked.features(["ab"])[task] for task in ("double", "sort"))
    assert one.shape == (1, 8) and np.abs(one - two).max() > 1e-3
    usage = asked.usage(["ab"])
    (first, *_), (second, *_) = (list(usage[task].values()) for task in ("double", "sort"))
    assert first.sum() == pytest.approx(1) and np.abs(first - second).max() > 1e-3
    with pytest.raises(UserError, match="task of this model"):
        asked.predict(["ab"], ["lm"])
