"""Checkpoints of Uni-Perceiver-MoE's code: what they compute there, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from scipy.special import erf

import moezoo
from moezoo.configs.rooms.conditional_moe_tiny import config as TINY
from moezoo.domains.pairs.pretrained import ConditionalEncoders
from moezoo.errors import UserError
from moezoo.models.conditional_moe.conditions import PUBLISHED
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.nn import module
from moezoo.train import start
from moezoo.weights import uniperceiver
from moezoo.weights.uniperceiver_names import from_uni_perceiver, to_uni_perceiver

WIDTH, HEADS, DEPTH, EXPERTS, PATCH, SIDE, WORDS, LENGTH = 16, 2, 2, 3, 4, 3, 11, 50
Arrays = dict[str, np.ndarray]


def checkpoint(seed: int = 0, activation: int = 1) -> Arrays:
    """Every array of a small model under the published code's names, in its layouts."""
    random = np.random.default_rng(seed)
    state: Arrays = {}

    def put(name: str, *shape: int) -> None:
        state[name] = np.asarray(0.3 * random.normal(size=shape), np.float32)

    def linear(name: str, inputs: int, outputs: int) -> None:
        put(f"{name}.weight", outputs, inputs)
        put(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        put(f"{name}.weight", WIDTH)
        put(f"{name}.bias", WIDTH)

    put("token_embed.embeddings.weight", WORDS, WIDTH)
    put("token_embed.embeddings_pos.position_embeddings.weight", LENGTH, WIDTH)
    put("token_embed.embeddings_token_type.weight", 2, WIDTH)
    norm("token_embed.embeddings_norm")
    for kind in ("weight", "bias"):
        own = state[f"token_embed.embeddings_norm.{kind}"]
        state[f"video_embed.embeddings_norm.{kind}"] = own
    put("video_embed.embeddings.weight", WIDTH, 3, PATCH, PATCH)
    put("video_embed.embeddings.bias", WIDTH)
    put("video_embed.embeddings_type.weight", 1, WIDTH)
    put("video_embed.embeddings_st_pos.spatial_pos_embed.weight", SIDE**2, WIDTH)
    put("video_embed.embeddings_st_pos.temporal_pos_embed.weight", 8, WIDTH)
    sizes = {
        "self_attn.qkv_proj": (WIDTH, 3 * WIDTH),
        "self_attn.dense": (WIDTH, WIDTH),
        "linear1": (WIDTH, 2 * WIDTH),
        "linear2": (2 * WIDTH, WIDTH),
    }
    for layer in range(DEPTH):
        at = f"fused_encoder.layers.{layer}"
        norm(f"{at}.norm1")
        norm(f"{at}.norm2")
        put(f"{at}.gamma_1", WIDTH)
        put(f"{at}.gamma_2", WIDTH)
        for name, (inputs, outputs) in sizes.items():
            if layer % 2:
                linear(f"{at}.{name}", inputs, outputs)
                continue
            for e in range(EXPERTS):
                linear(f"{at}.{name}.experts.deepspeed_experts.{e}", inputs, outputs)
            put(f"{at}.{name}.gate.wg.weight", EXPERTS, WIDTH)
            linear(f"{at}.{name}.gate.tag_transform.0", 8, WIDTH)
            norm(f"{at}.{name}.gate.tag_transform.{activation}")
    norm("loss_prepare.ln_post")
    linear("loss_prepare.proj", WIDTH, WIDTH)
    put("loss_prepare.logit_scale_img_cls")
    return state


def normalised(x: np.ndarray, state: Arrays, name: str) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def decided(state: Arrays, gate: str, row: np.ndarray) -> np.ndarray:
    """The weights [E] of a gate for one row of attributes, two of which are not zero."""
    linear = f"{gate}.tag_transform.0"
    hidden = row @ state[f"{linear}.weight"].T + state[f"{linear}.bias"]
    behind = 1
    if f"{gate}.tag_transform.2.weight" in state:
        hidden, behind = gelu(hidden), 2
    logits = normalised(hidden, state, f"{gate}.tag_transform.{behind}")
    logits = logits @ state[f"{gate}.wg.weight"].T
    weights = np.exp(logits - logits.max())
    weights[np.argsort(-logits)[2:]] = 0
    return weights / weights.sum()


def mapped(x: np.ndarray, state: Arrays, name: str, weights: np.ndarray | None) -> np.ndarray:
    if weights is None:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    parts = (f"{name}.experts.deepspeed_experts.{e}" for e in range(EXPERTS))
    return sum(
        w * (x @ state[f"{part}.weight"].T + state[f"{part}.bias"])
        for w, part in zip(weights, parts, strict=True)
    )


def encoded(state: Arrays, x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """What the published code makes of tokens [T, D] under one row of attributes."""
    for layer in range(DEPTH):
        at = f"fused_encoder.layers.{layer}"
        first = second = None
        if not layer % 2:
            first = decided(state, f"{at}.self_attn.qkv_proj.gate", row)
            second = decided(state, f"{at}.linear1.gate", row)
        qkv = mapped(normalised(x, state, f"{at}.norm1"), state, f"{at}.self_attn.qkv_proj", first)
        q, k, v = (
            part.reshape(len(x), HEADS, -1).swapaxes(0, 1) for part in np.split(qkv, 3, axis=-1)
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(WIDTH / HEADS)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(x), WIDTH)
        x = x + state[f"{at}.gamma_1"] * mapped(y, state, f"{at}.self_attn.dense", first)
        hidden = mapped(normalised(x, state, f"{at}.norm2"), state, f"{at}.linear1", second)
        x = x + state[f"{at}.gamma_2"] * mapped(gelu(hidden), state, f"{at}.linear2", second)
    x = normalised(x, state, "loss_prepare.ln_post")
    return mapped(x, state, "loss_prepare.proj", None)


def of_image(state: Arrays, image: np.ndarray) -> np.ndarray:
    """Special token and patches of an image [H, W, 3], as they go into the first layer."""
    size = PATCH * SIDE
    patches = image.reshape(SIDE, PATCH, SIDE, PATCH, 3).transpose(0, 2, 4, 1, 3)
    assert image.shape == (size, size, 3)
    kernel = state["video_embed.embeddings.weight"].reshape(WIDTH, -1)
    x = patches.reshape(SIDE**2, -1) @ kernel.T + state["video_embed.embeddings.bias"]
    x = x + state["video_embed.embeddings_st_pos.spatial_pos_embed.weight"]
    x = x + state["video_embed.embeddings_st_pos.temporal_pos_embed.weight"][0]
    special = state["token_embed.embeddings.weight"][-1:]
    return normalised(np.concatenate([special, x]), state, "token_embed.embeddings_norm")


def of_text(state: Arrays, ids: np.ndarray) -> np.ndarray:
    words = state["token_embed.embeddings.weight"]
    x = words[ids] + state["token_embed.embeddings_pos.position_embeddings.weight"][: len(ids)]
    x = x + state["token_embed.embeddings_token_type.weight"][0]
    return normalised(np.concatenate([words[-1:], x]), state, "token_embed.embeddings_norm")


def options(path: Path) -> dict:
    return uniperceiver.options(uniperceiver.source(path)) | {"heads": HEADS}


def stored(folder: Path, state: Arrays) -> Path:
    path = folder / "model.safetensors"
    save_file(state, path)
    return path


@pytest.mark.parametrize("activation", [1, 2])
def test_it_computes_what_the_published_code_does(tmp_path: Path, activation: int) -> None:
    state = checkpoint(activation=activation)
    path = stored(tmp_path, {f"module.{name}": array for name, array in state.items()})
    config = ConditionalMoEConfig(**options(path), conditions=PUBLISHED)
    assert (config.location, config.vocabulary, config.mlp_ratio) == ("odd", WORDS - 1, 2.0)
    size = (PATCH * SIDE,) * 2
    made = module.create(lambda: config.build({"image_classification": 5}, size, nnx.Rngs(0)))
    parts = module.flatten(made.params)
    shapes = {name: leaf.shape for name, leaf in parts.items()}
    found = uniperceiver.read(uniperceiver.source(path), shapes, (SIDE, SIDE))
    assert set(parts) - set(found) == {"log_temperature"}
    merged = module.unflatten({name: jnp.asarray(found.get(name, parts[name])) for name in parts})
    model = module.merge(made.definition, merged, made.stats)

    random = np.random.default_rng(1)
    image = random.normal(size=(PATCH * SIDE, PATCH * SIDE, 3)).astype(np.float32)
    condition = "image_classification|input"
    row = model.table.entry(condition).rows_RA[0]
    ours = model.encode(EncoderInputs(image[None]), condition).x_BTD[0]
    np.testing.assert_allclose(ours, encoded(state, of_image(state, image), row), 1e-4, 1e-5)
    ids = random.integers(0, WORDS - 1, 5)
    row = model.table.entry("Vocab_Word").rows_RA[0]
    ours = model.encode(EncoderInputs(None, ids[None]), "Vocab_Word").x_BTD[0]
    np.testing.assert_allclose(ours, encoded(state, of_text(state, ids), row), 1e-4, 1e-5)


def test_there_and_back() -> None:
    state = checkpoint()
    found = from_uni_perceiver(state)
    assert not found.unknown
    back = to_uni_perceiver(found.arrays)
    assert not back.unknown
    again = from_uni_perceiver(back.arrays)
    assert set(again.arrays) == set(found.arrays)
    for path, array in found.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[path], err_msg=path)
    lost = set(state) - set(back.arrays)
    assert all(".self_attn.dense.gate." in n or "logit_scale" in n or "embeddings_type" in n
               for n in lost), lost  # fmt: skip


def test_a_model_and_a_run_begin_with_it(tmp_path: Path) -> None:
    path = stored(tmp_path, checkpoint())
    size = (2 * PATCH * SIDE, PATCH * SIDE)
    words = {"vocabulary": TINY.model.vocabulary, "text_length": TINY.model.text_length}
    model = moezoo.create(
        "conditional_moe_tiny",
        pretrained=path,
        model=options(path) | words,
        data={"resolution": size},
        start_heads=HEADS,
        start_without=("tokens/embed",),
    )
    own = model._loaded.model
    positions = own.tokens.image_positions.get_value()
    assert positions.shape == (2 * SIDE * SIDE, WIDTH), "resized to the images' grid"
    given = checkpoint()["loss_prepare.proj.weight"].T
    np.testing.assert_array_equal(own.encoder.projection.kernel.get_value(), given)
    assert "logit_scale" not in repr(model) and "Starting from" in model.about.origin


@pytest.mark.parametrize("pattern", ["nothing", "encoder/blocks/9", "["])
def test_patterns_that_name_nothing(tmp_path: Path, pattern: str) -> None:
    path = stored(tmp_path, checkpoint())
    config = replace(TINY, start_heads=HEADS, start_without=(pattern,))
    with pytest.raises(UserError, match="nothing that start_without's"):
        ConditionalEncoders().check(path, config)


def test_norms_of_their_own_behind_other_names(tmp_path: Path) -> None:
    state = {f"module.{name}": array for name, array in checkpoint().items()}
    for kind in ("weight", "bias"):
        state[f"video_embed.embeddings_norm.{kind}"] = 5 + state.pop(
            f"module.video_embed.embeddings_norm.{kind}"
        )
    with pytest.raises(UserError, match="without SHARE_LAYERNORM"):
        uniperceiver.source(stored(tmp_path, state))


def test_the_options_that_make_it_fit_are_named(tmp_path: Path) -> None:
    path = stored(tmp_path, checkpoint())
    assert start.owner(path).name == "pairs"
    with pytest.raises(UserError, match="does not fit the model: it does not tell its att") as told:
        ConditionalEncoders().check(path, TINY)
    said = str(told.value)
    for words in (
        "--start_heads 1 ",
        "--model.width 16",
        "--model.token_norm layer",
        "--model.epsilon 1e-05",
        "--model.projection linear",
        "--start_without tokens/embed",
        "are a guess",
    ):
        assert words in said
    assert "vocabulary" not in said and "text_length" not in said, "the data decide"
    fields = options(path) | {"heads": 1, "vocabulary": TINY.model.vocabulary}
    fields |= {"text_length": TINY.model.text_length}
    better = replace(TINY, start_heads=1, model=replace(TINY.model, **fields))
    with pytest.raises(UserError, match=r": add --start_without tokens/embed\.$"):
        ConditionalEncoders().check(path, better)
    ConditionalEncoders().check(path, replace(better, start_without=("tokens/embed",)))


SPACE = "video_embed.embeddings_st_pos.spatial_pos_embed.weight"
EXPERT = "fused_encoder.layers.0.linear1.experts.deepspeed_experts"


def changed(name: str, array: np.ndarray | None) -> Arrays:
    state = checkpoint()
    state.pop(name, None)
    return state if array is None else state | {name: array}


@pytest.mark.parametrize(
    ("name", "array", "why"),
    [
        ("prompt_embed.weight", np.zeros((2, WIDTH), np.float32), "has prompt_embed.weight, for"),
        ("fused_encoder.layers.0.linear1.experts.deepspeed_experts.1.bias", None, r"\[0, 2\] only"),
        ("video_embed.embeddings_norm.bias", np.ones(WIDTH, np.float32), "is another than"),
        ("loss_prepare.ln_post.bias", None, "lacks encoder/norm/bias"),
        ("fused_encoder.layers.1.linear1.bias", np.zeros(3, np.float32), r"is \[3\], the model's"),
        ("video_embed.embeddings.bias", np.zeros((), np.float32), r"of \[\], where .* 1 axes"),
        (SPACE, np.zeros((0, WIDTH), np.float32), r"of \[0, 16\], where .* none of them 0"),
        (SPACE, np.zeros(WIDTH, np.float32), r"of \[16\], where .* 2 axes"),
        (SPACE, np.zeros((8, WIDTH), np.float32), "positions of 8 patches are no square grid"),
        (f"{EXPERT}.1.bias", np.zeros(3, np.float32), "other shapes for some experts"),
        (f"{EXPERT}.{'9' * 5000}.bias", np.zeros(3, np.float32), "for which there is no place"),
        ("linear3.weight", np.zeros((2, 2), np.int32), "linear3.weight in .* holds no floats"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, array: np.ndarray | None, why: str) -> None:
    good = stored(tmp_path, checkpoint())
    config = replace(TINY, start_heads=HEADS, model=replace(TINY.model, **options(good)))
    bad = tmp_path / "bad"
    bad.mkdir()
    with pytest.raises(UserError, match=why):
        ConditionalEncoders().check(stored(bad, changed(name, array)), config)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    name = "loss_prepare.proj.bias"
    path = stored(tmp_path, changed(name, np.full(WIDTH, np.nan, np.float32)))
    with pytest.raises(UserError, match=f"{name} in .* not finite"):
        uniperceiver.read(uniperceiver.source(path), {}, (SIDE, SIDE))
