"""Specialised conditions: the same features, dense cost, no router; a set shares what is equal."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from moezoo.backbones.generate import Settings
from moezoo.domains.pairs.conditions import ConditionSet, condition_path, condition_set, specialise
from moezoo.errors import UserError
from moezoo.models.conditional_moe.caption import caption
from moezoo.models.conditional_moe.conditions import Mixed
from moezoo.models.conditional_moe.model import ConditionalMoE, ConditionalMoEConfig
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.nn import module
from tests.models.tiny import filled, quick_jit

SIZES: dict[str, Any] = {"width": 8, "depth": 3, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
SIZES |= {"experts": 4, "vocabulary": 11, "text_length": 6, "layer_scale": 1.0}
IMAGE = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
TEXT = jnp.asarray([[9, 1, 2], [9, 4, 5]])
PICTURE, WORDS, BOTH = EncoderInputs(IMAGE), EncoderInputs(None, TEXT), EncoderInputs(IMAGE, TEXT)
# Every row of the table occurs: the six different conditions.
WANTED = {
    "scene|input": PICTURE,
    "counts|input": PICTURE,
    "retrieval|target": WORDS,
    "mlm|input": WORDS,
    "caption|target": WORDS,
    "caption|input": BOTH,
}


@cache
def parts_of(level: str, **changes: Any) -> module.ModuleParts:
    config = ConditionalMoEConfig(**(SIZES | {"level": level} | changes))
    return filled(lambda: config.build({}, (8, 8), nnx.Rngs(0)))


def model_of(level: str = "attribute", **changes: Any) -> ConditionalMoE:
    return module.merge(*parts_of(level, **changes))


@cache
def the_set() -> ConditionSet:
    return condition_set(model_of(), WANTED)


@pytest.mark.parametrize("condition", WANTED)
def test_a_path_is_the_conditional_model_without_router_and_experts(condition: str) -> None:
    path, inputs, parts = the_set().paths[condition], WANTED[condition], parts_of("attribute")
    assert not any(word in name for name in path.weights for word in ("level", "router", "experts"))

    def whole(params: Any, inputs: EncoderInputs) -> jax.Array:
        return module.merge(parts.definition, params, {}).encode(inputs, condition).x_BTD

    own = quick_jit(path.encode)(path.weights, inputs)
    np.testing.assert_allclose(own, quick_jit(whole)(parts.params, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"level": "attribute"},
    {"level": "attribute", "mlp_gates": "separate", "top_k": 1},
    {"level": "modality"},
    {"level": "task"},
])  # fmt: skip
def test_in_the_same_order_of_merges_the_bits_are_the_same(changes: dict[str, Any]) -> None:
    """Operation by operation, both models multiply the same matrices."""
    model = model_of(**changes, depth=1)
    made = specialise(model, "caption|input", BOTH)
    np.testing.assert_array_equal(
        made.encode(BOTH, "caption|input").x_BTD, model.encode(BOTH, "caption|input").x_BTD
    )
    assert not any("level" in name for name in module.flatten(module.split(made).params))


def test_a_path_costs_what_the_dense_model_costs() -> None:
    """FLOPs of the compiled programs, to the last one, and parameters."""
    dense = condition_path(model_of("dense"), "scene|input", PICTURE).cost()
    own = the_set().paths["scene|input"].cost()
    assert own.flops == dense.flops > 0
    assert own.parameters == dense.parameters and own.bytes == 4 * own.parameters


def test_a_set_shares_what_is_equal() -> None:
    made = the_set()
    each = {name: path.cost().parameters for name, path in list(made.paths.items())[:2]}
    # An image to classify and one to find by its counts have the same attributes: all is shared.
    assert made.shared("scene|input", "counts|input") == each["scene|input"]
    merged = {n for n in made.names["scene|input"] if "/blocks/0/" in n and n.endswith("kernel")}
    assert len(merged) == 4
    for name in merged:
        digests = {
            made.names[c][name] for c in WANTED if c != "caption|input" and name in made.names[c]
        }
        assert len(digests) == 4  # images, names, texts, words
    dense_block = "encoder/blocks/1/attn/qkv/kernel"
    assert len({made.names[c][dense_block] for c in WANTED}) == 1
    alone = sum(int(np.prod(a.shape)) for p in made.paths.values() for a in p.weights.values())
    assert made.parameters < alone
    for name in WANTED:
        for weight, a in made.weights(name).items():
            np.testing.assert_array_equal(a, made.paths[name].weights[weight])


def test_all_conditions_of_a_table_have_as_many_matrices_as_different_rows() -> None:
    """Twelve conditions, six rows of attributes: each mixture once, the rest of the model once."""
    model = model_of(depth=1)
    kinds = {"scene|input": PICTURE, "counts|input": PICTURE, "retrieval|input": PICTURE}
    kinds["caption|input"] = BOTH
    made = condition_set(model, {name: kinds.get(name, WORDS) for name in model.table.names})
    different = len(model.table.distinct())
    assert len(made.names) == 12 and different == 6
    merged, alike = 0, {}
    for layer, outputs in (("attn/qkv", 24), ("attn/proj", 8), ("mlp/fc1", 16), ("mlp/fc2", 8)):
        path = f"encoder/blocks/0/{layer}/"
        for leaf, size in (("kernel", outputs * (16 if layer == "mlp/fc2" else 8)),
                           ("bias", outputs)):  # fmt: skip
            digests = {d for names in made.names.values() for n, d in names.items()
                       if n.startswith(path) and n.endswith(leaf)}  # fmt: skip
            assert len(digests) == different
            merged += size
    for names in made.names.values():
        alike |= {n: made.arrays[d].size for n, d in names.items()
                  if not n.startswith("encoder/blocks/0/")
                  or n.split("/")[3] in ("norm1", "norm2", "scale1", "scale2")}  # fmt: skip
    assert made.parameters == sum(alike.values()) + different * merged


def test_a_set_says_what_each_path_costs() -> None:
    model = model_of(depth=1)
    made = condition_set(model, {"scene|input": PICTURE, "retrieval|target": WORDS})
    costs = made.costs()
    assert list(costs) == ["scene|input", "retrieval|target"]
    for name, cost in costs.items():
        dense = condition_path(model_of("dense", depth=1), name, made.paths[name].inputs).cost()
        assert cost.flops == dense.flops > 0 and cost.parameters == dense.parameters


@pytest.mark.slow
def test_captions_of_a_specialised_model_are_the_models() -> None:
    model, settings = model_of(), Settings(new=4, pad=10)
    words = model.words("caption|target")
    example = EncoderInputs(IMAGE, jnp.zeros((2, 4), int))
    made = specialise(model, "caption|input", example)

    def run(model: Any, image: jax.Array) -> Any:
        return caption(model, image, "caption|input", words, settings, bos=9).tokens_BT

    def compiled(model: ConditionalMoE) -> Any:
        parts = module.split(model)
        merged = lambda params, image: run(module.merge(parts.definition, params, {}), image)  # noqa: E731
        return quick_jit(merged)(parts.params, IMAGE)

    np.testing.assert_array_equal(compiled(made), compiled(model))


@pytest.mark.slow
def test_a_path_can_be_exported_for_any_batch() -> None:
    path = the_set().paths["retrieval|target"]
    (batch,) = export.symbolic_shape("b")
    flat = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in path.weights.items()}

    def call(weights: Any, text_BL: jax.Array) -> jax.Array:
        return path.encode(weights, EncoderInputs(None, text_BL))

    lowered = export.export(jax.jit(call))(flat, jax.ShapeDtypeStruct((batch, 3), jnp.int32))
    again = export.deserialize(lowered.serialize())
    found = again.call(dict(path.weights), TEXT)
    np.testing.assert_allclose(found, path.encode(path.weights, WORDS), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_specialised_is_refused() -> None:
    with pytest.raises(UserError, match="blocks/0/attn decides by tokens"):
        specialise(model_of("token"), "scene|input", PICTURE)
    made = specialise(model_of(), "scene|input", PICTURE)
    with pytest.raises(UserError, match="specialised for scene.input; it cannot be asked"):
        made.encode(WORDS, "mlm|input")
    with pytest.raises(UserError, match="asked under mlm.input and scene.input"):
        made.encode(WORDS, Mixed(("mlm|input", "scene|input"), jnp.zeros(2, int)))
    with pytest.raises(UserError, match="with other inputs"):
        made.encode(WORDS, "scene|input")
    with pytest.raises(UserError, match="No condition"):
        condition_set(model_of(), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "dense", "deployed"),
    [(ConditionalMoEConfig(), 124, 167), (ConditionalMoEConfig.large(), 354, 505)],
    ids=["base", "large"],
)
def test_images_with_texts_need_as_many_more_parameters_as_published(config, dense, deployed):
    """In millions, of the release's table; its vocabulary, which both have, is larger than ours."""
    size = (224, 224)
    inputs = EncoderInputs(jnp.zeros((1, *size, 3)), jnp.zeros((1, 2), jnp.int32))

    def build() -> ConditionalMoE:
        return specialise(config.build({}, size, nnx.Rngs(0)), "caption|input", inputs)

    def plain() -> ConditionalMoE:
        return replace(config, level="dense").build({}, size, nnx.Rngs(0))

    more = module.count(module.abstract(build).params) - module.count(module.abstract(plain).params)
    assert round(more / 1e6) == deployed - dense
