"""A classifier through setup, one training step and an evaluation; tasks that do not fit models."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from moezoo.data.source import ArraySource, Info, Labels
from moezoo.domains.images import report as images_report
from moezoo.domains.images.data import batches as image_batches
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.errors import UserError
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module
from moezoo.train import constant, evaluate, report, step
from moezoo.train.config import Config, TrainConfig
from moezoo.train.domain import Classes
from moezoo.train.setup import make_builder, make_tasks
from tests.train import tiny

NAMES = ("dark", "bright")
MODEL = VMoEConfig(width=8, depth=2, heads=2, patch=8, mlp_ratio=2.0, experts=2, top_k=1)


def source(count: int = 12) -> ArraySource:
    """Images of noise, the brighter half of them called so."""
    rng = np.random.default_rng(0)
    label = (np.arange(count) % 3 == 0).astype(np.uint8)
    noise = rng.integers(0, 128, (count, *tiny.SIZE, 3))
    image = (noise + 127 * label[:, None, None, None]).astype(np.uint8)
    labels = {"scene": Labels(NAMES, np.zeros((2, 3), np.uint8))}
    return ArraySource(
        Info("toy", "train", tiny.SIZE, ("scene",), labels, kinds=KINDS),
        {"image": image, "scene": label},
    )


def config(**changes) -> Config:
    changed = {"tasks": ("scene",), "model": MODEL} | changes
    data = replace(Config("x", MODEL, ()).data, resolution=tiny.SIZE)
    return Config(name="toy", data=data, train=TrainConfig(batch=4), **changed)


@pytest.mark.parametrize(
    ("model", "tasks", "says"),
    [
        (MODEL, ("depth",), "VMoEConfig gives one answer for a whole example, but task depth"),
        (tiny.model(), ("scene",), "M3ViTConfig predicts every pixel, but task scene"),
    ],
)
def test_tasks_and_models_of_different_kinds_are_refused(model, tasks, says):
    with pytest.raises(UserError, match=says):
        make_tasks(config(model=model, tasks=tasks), Classes({"scene": 2}))


@pytest.mark.slow
def test_loss_balance_and_scores_of_a_classifier():
    data, settings = source(), config()
    tasks = make_tasks(settings, Classes.of(data.info))
    parts = module.create(make_builder(settings, tasks))
    weights = {"importance": 0.1, "load": 0.1, "switch": 0.1}
    loss = step.make_loss(parts.definition, tasks, weights, settings.data.domain.read)
    batch = image_batches.training(data, 4, 0, ("scene",)).batch(0)
    total, seen = jax.jit(loss)(parts.params, parts.stats, batch, jax.random.key(0))
    parts_of_it = [float(seen.metrics[f"balance/{name}"]) for name in weights]
    np.testing.assert_allclose(seen.metrics["loss/scene"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(total, np.log(2) + 0.1 * sum(parts_of_it), rtol=1e-5)
    count = evaluate.make_count(parts.definition, tasks, settings.data.domain.read)
    batches = image_batches.evaluation(data, 8, ("scene",))
    result = evaluate.evaluate(count, parts.params, parts.stats, tasks, batches)
    # Fresh logits are equal, so the first class is taken, which is that of two thirds.
    assert result.scores["scene"]["accuracy"] == pytest.approx(2 / 3)
    assert result.scores["scene"]["mean_class_accuracy"] == pytest.approx(1 / 2)
    assert result.usage["blocks/1/mlp"].sum() == (12 + 4) * 5
    constants = constant.scores(tasks, data, data, image_batches.evaluation)
    assert constants["scene"]["accuracy"] == pytest.approx(2 / 3)
    assert "| scene | accuracy" in report.score_table(tasks, result, constants)
    [column] = images_report.panels(tasks, {"scene": np.eye(2, dtype=np.float32)}, batch, 2)
    truths, predicted = column.shown.values()
    assert [t.shape for t in truths] == [p.shape for p in predicted]
    assert not np.array_equal(predicted[0], predicted[1]) and column.key is None


@pytest.mark.parametrize("routing", ["experts_choose", "soft"])
def test_losses_that_make_no_sense_are_left_out(routing):
    assert not replace(MODEL, routing=routing).balance_losses(5)
    assert set(MODEL.balance_losses(5)) == {"importance", "load", "switch"}
