"""Cosines of tasks' gradients, by layer, against vectors written out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.deploy import interference
from moezoo.deploy.interference import Interference, cosines, layer_of, mean_between
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn import module


def test_layers_are_blocks_and_else_first_parts():
    assert layer_of("encoder/blocks/0/attn/qkv/kernel") == "encoder/blocks/0"
    assert layer_of("trunk/blocks/11/mlp/experts/fc1/kernel") == "trunk/blocks/11"
    assert layer_of("layers/3/attn/q/kernel") == "layers/3"
    assert layer_of("tokens/patch_embed/convs/0/kernel") == "tokens"
    assert layer_of("log_temperature") == "log_temperature"


def test_cosines_are_those_of_all_of_a_layers_parameters():
    rng = np.random.default_rng(0)
    tasks = [
        {
            "blocks/0/a": rng.normal(size=(2, 3)),
            "blocks/0/b": rng.normal(size=4),
            "x/c": np.ones(2),
            "t": 1,
        }
        for _ in range(3)
    ]
    tasks[2]["x/c"] = np.zeros(2)  # a task that does not use the layer
    found = cosines(tasks)
    long = [np.concatenate([t["blocks/0/a"].ravel(), t["blocks/0/b"]]) for t in tasks]
    for i in range(3):
        for j in range(3):
            wanted = long[i] @ long[j] / np.linalg.norm(long[i]) / np.linalg.norm(long[j])
            np.testing.assert_allclose(found["blocks/0"][i, j], wanted, 1e-12)
    np.testing.assert_allclose(found["x"][0, 1], 1)
    assert np.isnan(found["x"][2]).all() and set(found) == {"blocks/0", "x"}
    np.testing.assert_allclose(mean_between(found["x"]), 1)


def test_separate_experts_do_not_meet():
    one, other = np.zeros((2, 3)), np.zeros((2, 3))
    one[0], other[1] = 1.0, -1.0
    assert cosines([{"blocks/0/k": one}, {"blocks/0/k": other}])["blocks/0"][0, 1] == 0


def test_every_example_counts_alike_also_in_a_batch_that_is_not_full() -> None:
    class Mean(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))

    def read(model, batch, train):
        return MultiTaskOutput({"depth": batch["x"] @ model.w.get_value()}, {}, {})

    def loss(predicted_B, label_B, valid_B):
        return jnp.sum(jnp.where(valid_B, predicted_B * label_B, 0)) / jnp.sum(valid_B)

    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(5, 3)).astype("f4"), rng.normal(size=5).astype("f4")
    full, left = np.array([True] * 4), np.array([True, False, False, False])
    batches = [
        {"x": x[:4], "depth": label[:4], "valid": full},
        {"x": x[[4] * 4], "depth": label[[4] * 4], "valid": left},
    ]
    task = SimpleNamespace(name="depth", loss=loss)
    found = interference.gradients(module.split(Mean()), task, read, batches)  # type: ignore[arg-type]
    np.testing.assert_allclose(found["w"], (x * label[:, None]).mean(0), 1e-5)


def test_pictures_show_runs_of_different_layers(tmp_path: Path):
    table = np.array([[1.0, -0.7, np.nan], [-0.7, 1.0, np.nan], [np.nan] * 3])
    runs = {
        "dense": Interference(("a", "b", "c"), {"x/0": table, "x/1": table}),
        "moe": Interference(("a", "b", "c"), {"x/0": table}),
    }
    interference.draw(tmp_path / "p.png", runs)
    assert (tmp_path / "p.png").stat().st_size > 1000
