"""What holds for every task: sums, padded rows, perfect and empty labels, shards, pictures."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moezoo.tasks.base import State, merge
from tests.tasks.samples import Sample, noise, nothing, perfect, tasks

ALL = tasks()
BEST = {"accuracy": 1.0, "mIoU": 1.0, "maxF": 1.0, "mean_angle": 0.0, "rmse": 0.0, "odsF": 1.0}


@cache
def counter(name: str):
    """The compiled counting function, shared by all tests of this file."""
    metric = ALL[name].metric
    return metric.count if metric.on_host else jax.jit(metric.count)


@cache
def slope(name: str):
    """The compiled loss and its gradient in the outputs."""
    return jax.jit(jax.value_and_grad(ALL[name].loss))


def random_sample(name: str) -> Sample:
    return noise(name, ALL[name].channels)


def equal(ours: State, other: State) -> None:
    assert ours.keys() == other.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, other[key], rtol=1e-5, atol=1e-6, err_msg=key)


every_task = pytest.mark.parametrize("name", list(ALL))


@every_task
def test_state_has_the_same_form_before_and_after(name: str) -> None:
    metric = ALL[name].metric
    before, part = metric.init(), counter(name)(*random_sample(name), np.ones(8, bool))
    assert {k: np.shape(v) for k, v in before.items()} == {k: np.shape(v) for k, v in part.items()}
    for key, value in before.items():
        assert np.issubdtype(value.dtype, np.integer) == np.issubdtype(
            np.asarray(part[key]).dtype, np.integer
        )


@every_task
def test_parts_add_up_to_the_whole(name: str) -> None:
    logits, label = random_sample(name)
    metric, total = ALL[name].metric, ALL[name].metric.init()
    for half in (slice(0, 4), slice(4, 8)):
        rows = np.zeros(8, bool)
        rows[half] = True
        total = merge(total, counter(name)(logits, label, rows))
    whole = counter(name)(logits, label, np.ones(8, bool))
    equal(total, whole)
    update = metric.update if metric.on_host else jax.jit(metric.update)
    equal(update(metric.init(), logits, label, np.ones(8, bool)), whole)


@every_task
def test_rows_of_padding_count_nowhere(name: str) -> None:
    logits, label = random_sample(name)
    rows = np.arange(8) < 5
    changed = logits.copy(), label.copy()
    changed[0][5:], changed[1][5:] = 7.0, 1
    equal(counter(name)(logits, label, rows), counter(name)(*changed, rows))
    padded, _ = slope(name)(logits, label, rows)
    short, _ = slope(name)(logits[:5], label[:5])
    np.testing.assert_allclose(padded, short, rtol=1e-5)


@every_task
def test_a_perfect_prediction_scores_best(name: str) -> None:
    task = ALL[name]
    scores = task.metric.compute(counter(name)(*perfect(name), np.ones(8, bool)))
    assert scores[task.headline] == pytest.approx(BEST[task.headline], abs=0.05)
    if name != "edge":
        assert scores[task.headline] == pytest.approx(BEST[task.headline], abs=1e-3)
    random_score = task.metric.compute(counter(name)(*random_sample(name), np.ones(8, bool)))
    better = scores[task.headline] > random_score[task.headline]
    assert better != task.lower_is_better


@every_task
def test_without_labels_loss_and_gradient_are_zero(name: str) -> None:
    logits, _ = random_sample(name)
    value, gradient = slope(name)(logits, nothing(name))
    assert value == 0 and not np.any(gradient)
    scores = ALL[name].metric.compute(counter(name)(logits, nothing(name), np.ones(8, bool)))
    assert np.isnan(scores[ALL[name].headline])


@every_task
def test_gradients_are_finite_at_zero_and_at_large_outputs(name: str) -> None:
    logits, label = random_sample(name)
    for scale in (0.0, 1e-20, 1e4):
        value, gradient = slope(name)(np.float32(scale) * logits, label)
        assert value.dtype == jnp.float32
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert np.abs(gradient).max() <= 1.0


@every_task
def test_half_precision_outputs_give_a_float32_loss(name: str) -> None:
    logits, label = random_sample(name)
    coarse = jnp.asarray(logits, jnp.bfloat16)
    value, _ = slope(name)(coarse, label)
    assert value.dtype == jnp.float32
    exact, _ = slope(name)(np.asarray(coarse, np.float32), label)
    np.testing.assert_allclose(value, exact, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n, task in ALL.items() if not task.metric.on_host])
def test_a_batch_on_eight_devices_counts_as_on_one(name: str) -> None:
    metric = ALL[name].metric
    logits, label = random_sample(name)
    rows = np.arange(8) < 7
    mesh = Mesh(np.array(jax.devices()), ("data",))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put((logits, label, rows), by_row)
    everywhere = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(metric.count, out_shardings=everywhere).lower(*placed).compile()
    equal(program(*placed), counter(name)(logits, label, rows))
    text = program.as_text()
    assert text is not None and "all-reduce" in text and "all-gather" not in text


@pytest.mark.parametrize("name", [n for n, task in ALL.items() if task.per_pixel])
def test_predictions_and_labels_have_pictures(name: str) -> None:
    task = ALL[name]
    logits, label = random_sample(name)
    prediction = np.asarray(task.postprocess(logits))
    paint = task.picture.fitted(label)
    for picture in (paint(prediction[0]), paint.label(label[0])):
        assert picture.shape == (*label.shape[1:3], 3) and picture.dtype == np.uint8
        assert picture.std() > 0
    assert not np.array_equal(paint.label(label[0])[0, 0], paint.label(label[0])[10, 10])
    assert paint.key([label[0]]) is not None


def test_postprocessed_values_are_in_range() -> None:
    outputs = {n: np.asarray(t.postprocess(random_sample(n).logits)) for n, t in ALL.items()}
    for name in ("semseg", "parts"):
        assert outputs[name].dtype == np.int32 and outputs[name].max() < ALL[name].channels
    np.testing.assert_allclose(np.linalg.norm(outputs["normals"], axis=-1), 1.0, rtol=1e-5)
    for name in ("saliency", "edge"):
        assert 0 < outputs[name].min() and outputs[name].max() < 1
    assert outputs["depth"].min() == 0
