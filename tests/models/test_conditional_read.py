"""What a conditional encoder is asked in training: logits, and the decisions of all passes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.domains.pairs.pretrained import from_vit
from moezoo.models.conditional_moe.conditions import table_of
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.models.conditional_moe.reading import Reading, groups, joined, numbered
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.nn import module
from moezoo.ops import balance
from tests.models.tiny import filled, quick_jit

CONFIG = ConditionalMoEConfig.tiny(
    width=8, heads=2, experts=4, vocabulary=9, text_length=4, drop_path=0.2, stem="patch"
)
CANDIDATES = {"scene": np.array([[4, 0], [5, 6], [7, 0]], np.int32)}
READING = Reading(CANDIDATES, pad=0)
TEXT = jnp.asarray([[4, 5, 0], [6, 7, 8]])
IMAGE = jax.random.normal(jax.random.key(1), (2, 16, 8, 3))
BATCH = {
    "scene": {"image": IMAGE, "label": jnp.asarray([0, 2])},
    "caption": {"image": IMAGE, "text": TEXT, "targets": TEXT},
    "retrieval": {"image": IMAGE, "text": TEXT},
    "mlm": {"text": TEXT, "targets": TEXT},
}
NAMES = groups(table_of(CONFIG.conditions))


def parts(**changes) -> module.ModuleParts:
    config = replace(CONFIG, **changes)
    return filled(lambda: config.build({"scene": 3}, (16, 8), nnx.Rngs(0)))


def read(made: module.ModuleParts, batch=BATCH, key=None, train=False):
    def run(params, batch):
        model = module.merge(made.definition, params, made.stats)
        return READING(model, batch, key, train)

    return quick_jit(run)(made.params, batch)


def test_groups_are_sides_whose_image_and_text_are_apart_where_they_differ():
    assert NAMES[:5] == (
        "scene|input",
        "scene|target",
        "caption|input image",
        "caption|input text",
        "caption|target",
    )
    assert len(NAMES) == 13


@pytest.mark.slow
def test_logits_are_similarities_of_what_was_encoded():
    made = parts()
    output = read(made)

    def by_hand(params):
        model = module.merge(made.definition, params, made.stats)
        mask = TEXT != 0
        names = jnp.asarray(CANDIDATES["scene"])
        scenes = model.encode(EncoderInputs(None, names, names != 0), "scene|target").whole_BD
        scene = model.scores(model.encode(EncoderInputs(IMAGE), "scene|input").whole_BD, scenes)
        told = model.encode(EncoderInputs(IMAGE, TEXT, mask), "caption|input").text_BLD
        texts = model.encode(EncoderInputs(None, TEXT, mask), "retrieval|target").whole_BD
        pairs = model.scores(model.encode(EncoderInputs(IMAGE), "retrieval|input").whole_BD, texts)
        hidden = model.encode(EncoderInputs(None, TEXT, mask), "mlm|input").text_BLD
        return {
            "scene": scene,
            "caption": model.scores(told, model.words("caption|target")),
            "retrieval": pairs,
            "mlm": model.scores(hidden, model.words("mlm|target")),
        }

    wanted = quick_jit(by_hand)(made.params)
    assert set(output.predictions) == set(wanted)
    for task, logits in wanted.items():
        np.testing.assert_allclose(output.predictions[task], logits, 1e-4, 1e-5, err_msg=task)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["attribute", "task", "modality"])
def test_decisions_of_rows_are_counted_once_for_each_row_of_a_condition(level):
    records = read(parts(level=level)).records
    assert len(records) == 4  # attention and MLP of two blocks
    for record in records.values():
        said = [NAMES[i] for i in np.asarray(record.task_N)]
        assert len(said) == len(set(said)) == 9
        assert {"caption|input image", "caption|input text", "mlm|target"} <= set(said)


@pytest.mark.slow
def test_tokens_are_counted_under_the_row_of_their_part():
    made = parts(level="token")
    for record in read(made, {"caption": BATCH["caption"]}).records.values():
        said = np.array([NAMES[i] for i in np.asarray(record.task_N)])
        patches = 2  # and the special token, for each of two images
        assert (said == "caption|input image").sum() == 2 * (patches + 1)
        assert (said == "caption|input text").sum() == 2 * 3
        assert (said == "caption|target").sum() == 9 * 2  # every word and its special token
        assert record.routing.experts_NK.shape[0] == len(said)


@pytest.mark.slow
def test_passes_are_joined_in_order():
    made = parts()
    table = table_of(CONFIG.conditions)
    model = module.merge(made.definition, made.params, made.stats)
    one = model.encode(EncoderInputs(IMAGE), "scene|input").records
    path = next(iter(one))
    first = numbered(one[path], table, "scene|input", jnp.zeros(6, bool))
    second = numbered(one[path], table, "retrieval|input", jnp.zeros(6, bool))
    both = joined([{path: first}, {path: second}])[path]
    assert [NAMES[i] for i in both.task_N] == ["scene|input", "retrieval|input"]
    np.testing.assert_array_equal(both.routing.probs_NE[0], both.routing.probs_NE[1])


def test_balance_is_for_tokens_alone():
    tokens = filled(lambda: replace(CONFIG, level="token").build({}, (16, 8), nnx.Rngs(0)))
    rows = parts()
    for made, names in ((tokens, {"importance", "switch"}), (rows, set())):
        model = module.merge(made.definition, made.params, made.stats)
        assert set(model.balance_losses) == names
        assert all(isinstance(loss, balance.Together) for loss in model.balance_losses.values())


@pytest.mark.slow
def test_training_is_noisy_by_key_alone():
    made = parts()
    batch = {"scene": BATCH["scene"]}
    quiet = read(made, batch).predictions["scene"]
    noisy = [read(made, batch, jax.random.key(k), True).predictions["scene"] for k in (1, 1, 2)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2]) and not np.allclose(noisy[0], quiet)


def test_a_vision_transformers_parameters_find_their_places():
    vit = {
        "blocks/0/attn/qkv/kernel": np.ones((2, 6)),
        "patch_embed/proj/bias": np.ones(2),
        "pos_embed": np.arange(6.0).reshape(1, 3, 2),
        "cls_token": np.full((1, 1, 2), 10.0),
        "heads/scene/kernel": np.ones((2, 5)),
    }
    found = from_vit(vit)
    assert set(found) == {
        "encoder/blocks/0/attn/qkv/kernel",
        "tokens/patch_embed/proj/bias",
        "tokens/special",
        "tokens/image_positions",
        "heads/scene/kernel",
    }
    np.testing.assert_array_equal(found["tokens/special"], [[10.0, 11.0]])
    np.testing.assert_array_equal(found["tokens/image_positions"], [[2.0, 3.0], [4.0, 5.0]])
