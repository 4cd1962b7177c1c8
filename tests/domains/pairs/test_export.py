"""A run on pairs as a classifier: the full model's scores, dense cost, nothing of texts, an export.

Its commands are tested in test_tools.py.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import export
from moezoo.deploy.certificate import apart
from moezoo.deploy.manifest import Facts
from moezoo.deploy.path import PathLayer, TaskPath, shapes, unread
from moezoo.deploy.runtime.load import load_export
from moezoo.domains.images.export import photos
from moezoo.domains.pairs.export import (
    KEPT,
    MERGED,
    ConditionedClassifier,
    classifier_path,
    statement_of,
)
from moezoo.models.conditional_moe.model import ConditionalMoE, ConditionalMoEConfig
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.nn import module
from moezoo.ops.flops import product_flops
from tests.models.tiny import filled, quick_jit
from tests.tasks.tables import build

SIZES: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
SIZES |= {"experts": 4, "vocabulary": 11, "text_length": 6, "layer_scale": 1.0, "pool": "mean"}
SIZE, PAD = (8, 8), 10
NAMES = np.asarray([[1, PAD, PAD], [4, 5, PAD], [2, 3, 6]], np.int32)
IMAGE = np.random.default_rng(0).normal(size=(3, *SIZE, 3)).astype(np.float32)
SLOW = pytest.mark.slow
LEVELS: list[Any] = ["attribute", "task", "dense"]
LEVELS += [pytest.param(level, marks=SLOW) for level in ("modality", "token", "context")]


def config(level: str, **changes: Any) -> ConditionalMoEConfig:
    """Where there are experts, they are in block 0 of 2."""
    sizes: dict[str, Any] = SIZES | {"level": level} | changes
    return ConditionalMoEConfig(**sizes)


@cache
def classifier(level: str, **changes: Any) -> ConditionedClassifier:
    parts = filled(lambda: config(level, **changes).build({}, SIZE, nnx.Rngs(0)))
    parts.params["log_temperature"] = jnp.log(0.07)
    return ConditionedClassifier(module.merge(*parts), "scene", NAMES, PAD)


@cache
def path_of(level: str, **changes: Any) -> TaskPath:
    return classifier_path(classifier(level, **changes), "scene", photos(SIZE))


def scores(model: ConditionalMoE, image: Any) -> jax.Array:
    """The full model's, as its own interface gives them."""
    query = model.encode(EncoderInputs(image), "scene|input").whole_BD
    names = EncoderInputs(text_BL=jnp.asarray(NAMES), mask_BL=jnp.asarray(NAMES != PAD))
    return model.scores(query, model.encode(names, "scene|target").whole_BD)


@pytest.mark.parametrize("level", LEVELS)
def test_the_path_gives_the_full_models_scores(level: str) -> None:
    path, full = path_of(level), classifier(level)
    parts = module.split(full)

    def both(params: Any, image: Any) -> Any:
        model = module.merge(parts.definition, params, {})
        return scores(model.model, image), model(image).predictions["scene"]

    wanted, in_training = quick_jit(both)(parts.params, IMAGE)
    np.testing.assert_allclose(in_training, wanted, rtol=1e-6, atol=1e-6)
    found = quick_jit(path.call)(path.weights, IMAGE)
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-5, atol=1e-5)
    assert found.violations_B.tolist() == [0, 0, 0] and path.exact
    assert np.ptp(wanted, axis=0).min() > 1e-2, "images differ"


@pytest.mark.parametrize("level", ["attribute", "task"])
def test_the_path_is_as_large_and_as_dear_as_that_of_a_dense_model(level: str) -> None:
    """Names, shapes, and FLOPs of the lowered programs to the last one."""
    own, dense = path_of(level), path_of("dense")
    assert shapes(own.weights) == shapes(dense.weights)
    assert own.layers == {} and flops(own) == flops(dense) > 0


def flops(path: TaskPath) -> float:
    given = shapes(path.weights), path.input.batch(1)
    analysed: Any = jax.jit(path.call).lower(*given).cost_analysis()
    return analysed["flops"]


def test_nothing_of_texts_routers_and_other_tasks_is_left() -> None:
    path = path_of("attribute")
    rest = {n for n in path.weights if not n.startswith("model/encoder/")}
    assert rest == {"candidates", "temperature"} | {
        f"model/tokens/{n}"
        for n in (
            "special",
            "modality",
            "image_positions",
            "patch_embed/bias",
            "patch_embed/kernel",
        )
    }
    assert not [n for n in path.weights if "level" in n or "experts" in n]
    assert path.weights["model/tokens/modality"].shape == (1, 8)
    assert path.weights["candidates"].shape == (3, 8)
    np.testing.assert_allclose(jnp.sum(path.weights["candidates"] ** 2, 1), 1, rtol=1e-4)
    assert path.weights["temperature"] == pytest.approx(0.07)
    assert unread(path.call, path.weights, path.input.batch(1)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("level", "changes"), [
    ("attribute", {}),
    ("token", {}),
    pytest.param("context", {"mlp_gates": "separate", "stem": "conv"}, marks=SLOW),
])  # fmt: skip
def test_the_formula_counts_the_products_of_the_program(
    level: str, changes: dict[str, Any]
) -> None:
    """Where tokens decide, blocks of tokens are filled up: the program may do more."""
    path, made = path_of(level, **changes), config(level, **changes)
    traced = jax.make_jaxpr(path.call)(shapes(path.weights), path.input.batch(1))
    wanted = 2 * made.macs(SIZE, {"scene": len(NAMES)}).total
    if level == "attribute":
        assert product_flops(traced) == wanted
    assert product_flops(traced) >= wanted


def test_where_tokens_decide_routers_and_experts_stay() -> None:
    path = path_of("token")
    assert list(path.layers) == [f"encoder/blocks/0/{half}/level" for half in ("attn", "mlp")]
    for layer in path.layers.values():
        assert layer == PathLayer("token", 4, (0, 1, 2, 3), 2)
    assert path.weights["model/encoder/blocks/0/attn/level/router/kernel"].shape == (8, 4)
    assert path.weights["model/encoder/blocks/0/mlp/fc1/experts/kernel"].shape == (4, 8, 16)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["attribute", "context"])
def test_an_export_runs_for_itself_and_says_what_it_is(tmp_path, level: str) -> None:
    labels = ("bedroom", "office", "playroom")
    task = build("scene", classes=3, names=labels)
    about = Facts(labels=labels)
    path = path_of(level)
    stated = apart(classifier(level), path, IMAGE)
    assert stated["parameters"] == module.count(module.split(classifier(level)).params)
    assert stated["images"] == 3 and stated["largest_difference"] < 1e-5 * stated["largest_logit"]
    assert statement_of(level) == (MERGED if level == "attribute" else KEPT)
    content = export.Content(path, task, about, {}, {"full_model": stated}, IMAGE)
    predictor = load_export(export.write(tmp_path / "made", content))
    assert predictor.self_check() <= 1e-5
    found = predictor(np.full((5, 20, 30, 3), 99, np.uint8))
    assert found["logits"].shape == (5, 3) and found["prediction"].dtype == np.int32
    manifest = json.loads((tmp_path / "made/manifest.json").read_text())
    assert manifest["task"]["labels"] == list(labels) and manifest["picture"]["kind"] == "label"
    assert manifest["versions"]["platforms"] == ["cpu", "cuda", "tpu"]
