"""The unified encoder: five levels and a dense one, scores, captions, conditions of a batch."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.generate import Settings
from moezoo.errors import UserError
from moezoo.models.conditional_moe.caption import caption
from moezoo.models.conditional_moe.conditions import (
    PUBLISHED,
    ROOMS,
    ConditionTable,
    Mixed,
    one_condition,
)
from moezoo.models.conditional_moe.model import ConditionalMoE, ConditionalMoEConfig
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.nn import module, surgery
from tests.models.tiny import filled, quick_jit

SIZES: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
SIZES |= {"conditions": (*ROOMS, "pair|input 11011000 11010100"), "experts": 4}
SIZES |= {"vocabulary": 11, "text_length": 6, "layer_scale": 1.0}
BLOCK = "encoder/blocks/0"
LEVELS = ("dense", "token", "context", "modality", "task", "attribute")
IMAGE = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
TEXT = jnp.asarray([[9, 1, 2, 3], [9, 4, 5, 0], [9, 0, 0, 0]])
MASK = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], bool)


def config(**changes: Any) -> ConditionalMoEConfig:
    """Conditional layers in block 0 of 2; 4 patches."""
    return ConditionalMoEConfig(**(SIZES | changes))


@cache
def parts_of(**changes: Any) -> module.ModuleParts:
    return filled(lambda: config(**changes).build({"scene": 5}, (8, 8), nnx.Rngs(0)))


def model_of(**changes: Any) -> ConditionalMoE:
    return module.merge(*parts_of(**changes))


@cache
def reader(condition: str, **changes: Any) -> Any:
    """Compiled: inputs to the features of all tokens under a condition."""
    parts = parts_of(**changes)

    def run(params: Any, inputs: EncoderInputs) -> jax.Array:
        return module.merge(parts.definition, params, parts.stats).encode(inputs, condition).x_BTD

    return partial(quick_jit(run), parts.params)


def jitted(function: Any, parts: module.ModuleParts, *given: Any) -> Any:
    """`function(model, *given)` in one compiled program."""

    def run(params: Any, *given: Any) -> Any:
        return function(module.merge(parts.definition, params, parts.stats), *given)

    return quick_jit(run)(parts.params, *given)


def test_experts_stand_in_even_blocks_and_their_arrays_are_stacked() -> None:
    flat = module.flatten(module.abstract(lambda: config().build({}, (8, 8), nnx.Rngs(0))).params)
    stacked = {name: a.shape for name, a in flat.items() if "/experts/" in name}
    assert stacked["encoder/blocks/0/attn/qkv/experts/kernel"] == (4, 8, 24)
    assert stacked["encoder/blocks/0/mlp/fc2/experts/kernel"] == (4, 16, 8)
    assert len(stacked) == 8 and not any("/blocks/1/" in name for name in stacked)
    assert flat["encoder/blocks/1/mlp/fc2/kernel"].shape == (16, 8)


SLOW = ("dense", "context", "modality", "task")


@pytest.mark.slow
@pytest.mark.parametrize(
    "level", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LEVELS]
)
def test_every_level_trains_all_that_it_has(level: str) -> None:
    """Scene labels from names: one loss, gradients of routers and maps, padding has no say."""
    parts = parts_of(level=level, depth=1)

    def loss(params: Any, text: jax.Array) -> tuple[jax.Array, Any]:
        model = module.merge(parts.definition, params, parts.stats)
        query = model.encode(EncoderInputs(IMAGE), "scene|input", key=jax.random.key(1), train=True)
        names = model.encode(EncoderInputs(None, text, MASK), "scene|target")
        scores = model.scores(query.whole_BD, names.whole_BD)
        found = -jnp.mean(jnp.diagonal(jax.nn.log_softmax(scores)))
        return found, (scores, query.records)

    gradient = quick_jit(jax.grad(loss, has_aux=True))
    grads, (scores, records) = gradient(parts.params, TEXT)
    _, (spoiled, _) = gradient(parts.params, jnp.where(MASK, TEXT, 7))
    np.testing.assert_array_equal(scores, spoiled)
    assert scores.shape == (3, 3) and scores.dtype == jnp.float32
    temperature = np.exp(parts.params["log_temperature"])
    assert bool(np.all(np.abs(scores) <= 1 / max(temperature, 0.01) + 1e-3))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    flat = module.flatten(grads)
    idle = {name for name, g in flat.items() if not np.any(g)}
    # Top-2 weights add up to 1 and rows of one condition differ, so every router learns.
    assert not {name for name in idle if "router/kernel" in name or "log_temperature" in name}
    expected = set() if level == "dense" else {f"{BLOCK}/{h}/level" for h in ("attn", "mlp")}
    assert set(records) == expected
    model = module.merge(*parts)
    assert all(surgery.get(model, path).router.k == 2 for path in records)
    rows = {"token": 15, "context": 15}.get(level, 1)
    assert all(r.routing.experts_NK.shape == (rows, 2) for r in records.values())


def test_scores_are_cosines_over_the_temperature() -> None:
    model = model_of()
    query, candidates = (jax.random.normal(jax.random.key(i), (n, 8)) for i, n in ((1, 2), (2, 5)))
    q, c = np.asarray(query, np.float64), np.asarray(candidates, np.float64)
    q, c = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (q, c))
    temperature = float(np.exp(model.log_temperature.get_value()))
    np.testing.assert_allclose(model.scores(query, candidates), q @ c.T / temperature, rtol=1e-4)
    model.log_temperature.set_value(jnp.float32(-50.0))
    np.testing.assert_allclose(
        model.scores(query, candidates), q @ c.T / 0.01, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("level", ["attribute", pytest.param("context", marks=pytest.mark.slow)])
def test_captions_are_the_greedy_choices_of_one_causal_pass(level: str) -> None:
    """Steps from kept keys and values give what reading the whole caption at once gives."""
    settings = Settings(new=5, stop=(), pad=10)

    def run(model: ConditionalMoE, image: jax.Array) -> Any:
        words = model.words("caption|target")
        made = caption(model, image, "caption|input", words, settings, bos=9)
        before = jnp.full((image.shape[0], 1), 9)
        text = jnp.concatenate([before, made.tokens_BT[:, :-1]], axis=1)
        read = model.encode(EncoderInputs(image, text), "caption|input")
        return made, model.scores(read.text_BLD, words)

    made, scores = jitted(run, parts_of(level=level, depth=1), IMAGE)
    assert scores.shape == (3, 5, 11)
    np.testing.assert_array_equal(made.tokens_BT, np.argmax(scores, axis=-1))
    np.testing.assert_array_equal(made.lengths_B, 5)


@pytest.mark.slow
def test_a_caption_ends_at_its_stop_and_sees_nothing_behind_itself() -> None:
    def run(model: ConditionalMoE, image: jax.Array, text: jax.Array) -> Any:
        words = model.words("caption|target")
        read = model.encode(EncoderInputs(image, text), "caption|input")
        later = model.encode(EncoderInputs(image, text.at[:, 3].set(8)), "caption|input")
        every = Settings(new=3, stop=tuple(range(10)), pad=10)
        none = Settings(new=3, stop=(), pad=10)
        made = (caption(model, image, "caption|input", words, s, bos=9) for s in (every, none))
        return read, later, *made

    read, later, stopped, whole = jitted(run, parts_of(depth=1), IMAGE, TEXT)
    np.testing.assert_array_equal(read.x_BTD[:, :-1], later.x_BTD[:, :-1])
    assert bool((read.x_BTD[:, -1] != later.x_BTD[:, -1]).any())
    np.testing.assert_array_equal(whole.lengths_B, 3)
    for made, length, free in zip(
        stopped.tokens_BT, stopped.lengths_B, whole.tokens_BT, strict=True
    ):
        ends = [place for place, token in enumerate(free.tolist()) if token < 10]
        assert length == (ends[0] + 1 if ends else 3)
        np.testing.assert_array_equal(made[:length], free[:length])
        np.testing.assert_array_equal(made[length:], 10)


@pytest.mark.slow
def test_a_mixed_batch_is_its_conditions_one_by_one() -> None:
    names = ("scene|target", "mlm|input", "text_scene|target")

    def run(model: ConditionalMoE, text: jax.Array, which_B: jax.Array) -> Any:
        return model.encode(EncoderInputs(None, text), Mixed(names, which_B)).x_BTD

    order = (2, 0, 1)
    mixed = jitted(run, parts_of(), TEXT, jnp.asarray(order))
    for row, place in enumerate(order):
        alone = reader(names[place])(EncoderInputs(None, TEXT))
        np.testing.assert_allclose(mixed[row], alone[row], rtol=1e-4, atol=1e-5)


def test_conditions_of_equal_attributes_are_one_condition_and_others_are_not() -> None:
    scene, counts, target = (
        reader(name)(EncoderInputs(IMAGE))
        for name in ("scene|input", "counts|input", "scene|target")
    )
    np.testing.assert_array_equal(scene, counts)
    assert bool((target != scene).any())
    assert len(ConditionTable(ROOMS).distinct()) == len(ConditionTable(PUBLISHED).distinct()) == 6
    assert one_condition(("mlm|input",) * 3) == "mlm|input"


def test_one_expert_and_separate_gates_of_an_mlp() -> None:
    changes = {"top_k": 1, "mlp_gates": "separate", "gate_activation": "gelu", "noise": "rsample"}

    def run(model: ConditionalMoE, image: jax.Array) -> Any:
        key = jax.random.key(0)
        return model.encode(EncoderInputs(image), "scene|input", key=key, train=True).records

    records = jitted(run, parts_of(**changes), IMAGE)
    assert set(records) == {f"{BLOCK}/{p}" for p in ("attn/level", "mlp/level", "mlp/level2")}
    for record in records.values():
        assert record.routing.experts_NK.shape == (1, 1)
        assert 0 < float(record.routing.weights_NK[0, 0]) < 1
    first, second = (records[f"{BLOCK}/mlp/{name}"] for name in ("level", "level2"))
    assert bool((first.routing.logits_NE != second.routing.logits_NE).any())


REFUSED = {
    "an unknown condition": (lambda m: m.encode(EncoderInputs(IMAGE), "scen|input"),
                             "did you mean scene.input"),
    "a mixed batch": (lambda m: m.encode(EncoderInputs(IMAGE), ("scene|input", "counts|input")),
                      "mixes the conditions scene.input and counts.input"),
    "no example": (lambda m: m.encode(EncoderInputs(IMAGE), ()), "batch is empty"),
    "no candidate": (lambda m: m.scores(jnp.ones((2, 8)), jnp.zeros((0, 8))),
                     "at least one candidate"),
    "no input": (lambda m: m.encode(EncoderInputs(), "scene|input"), "neither an image nor a text"),
    "half an input": (lambda m: m.encode(EncoderInputs(IMAGE), "caption|input"),
                      "an image with a text; the inputs are an image alone"),
    "an unknown symbol": (lambda m: m.encode(EncoderInputs(None, TEXT + 9), "mlm|input"),
                          "token 18, the model knows 0 to 10"),
    "a text without a batch": (lambda m: m.encode(EncoderInputs(None, TEXT[0]), "mlm|input"),
                               "The text has shape .4,.; it must be .batch, tokens."),
    "an image without a batch": (lambda m: m.encode(EncoderInputs(IMAGE[0]), "scene|input"),
                                 "The image has shape .8, 8, 3.; it must be .batch, height"),
    "numbers for ids": (lambda m: m.encode(EncoderInputs(None, TEXT / 2), "mlm|input"),
                        "type float32; token ids are integers"),
    "a mask of another text": (lambda m: m.encode(EncoderInputs(None, TEXT, MASK[:2]), "mlm|input"),
                               "shape .2, 4., the text .3, 4."),
    "a mask without a text": (lambda m: m.encode(EncoderInputs(IMAGE, None, MASK), "scene|input"),
                              "the text None"),
    "images and texts that are no pairs": (
        lambda m: m.encode(EncoderInputs(IMAGE[:2], TEXT), "caption|input"),
        "2 images with 3 texts are no pairs"),
    "a mixed batch of nothing": (
        lambda m: m.encode(EncoderInputs(IMAGE), Mixed((), jnp.zeros(3, int))),
        "names no condition"),
    "a mixed batch of another size": (
        lambda m: m.encode(EncoderInputs(IMAGE), Mixed(("scene|input",), jnp.zeros(2, int))),
        "shape .2,., but there are 3 examples"),
    "a mixed batch of other conditions": (
        lambda m: m.encode(EncoderInputs(IMAGE), Mixed(("scene|input",), jnp.asarray([0, 0, 1]))),
        "condition number 1 of a mixed batch that names 1: count from 0 to 0"),
    "a long text": (lambda m: m.encode(EncoderInputs(None, jnp.zeros((1, 7), int)), "mlm|input"),
                    "Texts of 7 tokens do not fit into the model's 6 positions"),
    "conditions that do not mix": (
        lambda m: m.encode(EncoderInputs(IMAGE, TEXT),
                           Mixed(("scene|input", "caption|input"), jnp.zeros(3, int))),
        "not all of them are read causally"),
    "conditions of one row and of two": (
        lambda m: m.encode(EncoderInputs(IMAGE, TEXT),
                           Mixed(("scene|input", "pair|input"), jnp.zeros(3, int))),
        "different numbers of rows"),
    "a text that is not causal": (
        lambda m: caption(m, IMAGE, "scene|input", jnp.ones((2, 8)), Settings(new=2), bos=9),
        "not read causally"),
    "a caption too long": (
        lambda m: caption(m, IMAGE, "caption|input", jnp.ones((2, 8)), Settings(new=7), bos=9),
        "7 tokens does not fit"),
    "a text that begins with no token": (
        lambda m: caption(m, IMAGE, "caption|input", jnp.ones((2, 8)), Settings(new=2), bos=11),
        "bos is 11, the model knows tokens 0 to 10"),
    "padding that is no token": (
        lambda m: caption(m, IMAGE, "caption|input", jnp.ones((2, 8)), Settings(2, pad=-1), bos=9),
        "settings.pad is -1"),
    "words of another model": (
        lambda m: caption(m, IMAGE, "caption|input", jnp.ones((12, 8)), Settings(new=2), bos=9),
        "12 words to choose from, the model knows 11"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_sentence(what: str) -> None:
    call, says = REFUSED[what]
    with pytest.raises(UserError, match=says):
        call(model_of())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"level": "atribute"}, "did you mean attribute"),
        ({"location": "even"}, "Unknown location"),
        ({"noise": "vmo"}, "did you mean vmoe"),
        ({"noise_std": -1.0}, "noise_std is -1"),
        ({"top_k": 5}, "top_k is 5"),
        ({"heads": 3}, "heads is 3"),
        ({"temperature": 0.001}, "temperature is 0.001"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"text_length": 0}, "text_length is 0"),
        ({"dispatch": "block"}, "blocks"),
        ({"conditions": ()}, "empty"),
        ({"conditions": ("a|input 10", "b|input 101")}, "of b.input have 3 entries, .* a.input 2"),
        ({"conditions": ("a|input 10 101",)}, "rows of a.input have 2 and 3"),
        ({"conditions": ("a|input",)}, "is no line of a table"),
        ({"conditions": ("a|input 12",)}, "is no line of a table"),
        ({"conditions": ("a|input 1", "a|input 0")}, "has a.input twice"),
    ],
)
def test_bad_configurations_are_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config(**changes)


def test_a_task_without_attributes_is_refused() -> None:
    with pytest.raises(UserError, match="Task depth has no attributes.*depth.input"):
        config().build({"depth": 1}, (8, 8), nnx.Rngs(0))
