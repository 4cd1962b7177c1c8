"""Pretrained vision transformers of every form: their own function, or a refusal by name."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.vit import ViT, ViTConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights import hf_vit_names, vit, vit_source
from moezoo.weights.fold import Normalisation
from moezoo.weights.vit import Target, misfits
from tests.models.tiny import filled, quick_jit
from tests.weights import vit_files
from tests.weights.vit_files import DINO_NAMES, VIT_NAMES, folder, timm, transformers

CONFIG = ViTConfig(
    width=vit_files.WIDTH,
    depth=vit_files.DEPTH,
    heads=vit_files.HEADS,
    patch=vit_files.PATCH,
    mlp_ratio=2.0,
)
HF = {
    "model_type": "vit", "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 16, "patch_size": 4,
}  # fmt: skip
PIXELS = np.random.default_rng(2).random((2, 16, 16, 3))
HEAD = {"head/kernel", "head/bias"}
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3)


@cache
def model() -> module.ModuleParts:
    return filled(lambda: ViT(CONFIG, (16, 16), classes=5, rngs=nnx.Rngs(0)))


def target(told: int | None = 3) -> Target:
    flat = module.flatten(model().params)
    return Target({path: a.shape for path, a in flat.items()}, (4, 4), 3, told)


@cache
def program() -> Any:
    def tokens(params: Any, x: Any) -> Any:
        trunk = module.merge(model().definition, params, model().stats)
        y_BTD = trunk.embed(x)
        for block in trunk.blocks:
            y_BTD = block(y_BTD).x_BTD
        return trunk.norm(y_BTD)

    return quick_jit(tokens)


def ours(found: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Tokens of a model that begins with these arrays."""
    flat = module.flatten(model().params)
    assert found.keys() == flat.keys() - HEAD
    params = module.unflatten({**flat, **{p: jax.numpy.asarray(a) for p, a in found.items()}})
    return np.asarray(program()(params, x.astype(np.float32)))


def assert_same(mine: np.ndarray, theirs: np.ndarray) -> None:
    a, b = mine.ravel().astype(np.float64), theirs.ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 1 - 1e-5
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", ["", "ls{0}.gamma", "gamma_{0}"])
def test_layer_scale_is_folded_exactly(scale: str, tmp_path: Path) -> None:
    arrays = timm(scale=scale)
    path = vit_files.write(tmp_path / "vit.safetensors", arrays)
    assert_same(ours(vit.trunk(path, target()), PIXELS), vit_files.features(arrays, PIXELS))


def test_a_class_token_without_a_position(tmp_path: Path) -> None:
    arrays = timm(tokens=0)
    path = vit_files.write(tmp_path / "vit.safetensors", arrays)
    assert_same(ours(vit.trunk(path, target()), PIXELS), vit_files.features(arrays, PIXELS))


@pytest.mark.parametrize("tokens", [0, 3])
def test_registers_and_norms_on_queries_of_timm(tokens: int, tmp_path: Path) -> None:
    """Registers have positions there or not; no head of ours reads them."""
    w = timm(tokens=tokens, registers=2, normed=CONFIG.width // CONFIG.heads)
    source = vit_source.source(vit_files.write(tmp_path / "vit.safetensors", w))
    told = vit.options(source)
    assert (told["registers"], told["qk_norm"]) == (2, "layer")
    config = replace(CONFIG, registers=2, qk_norm="layer")
    parts = filled(lambda: ViT(config, (16, 16), classes=5, rngs=nnx.Rngs(0)))
    flat = module.flatten(parts.params)
    fits = Target({path: a.shape for path, a in flat.items()}, (4, 4), 3, 3)
    found = {path: jax.numpy.asarray(a) for path, a in vit.read(source, fits).items()}
    assert found.keys() == flat.keys() - HEAD
    model = module.merge(parts.definition, module.unflatten({**flat, **found}), parts.stats)
    mine = quick_jit(lambda x: model.norm(model.run(model.embed(x))))(PIXELS.astype(np.float32))
    assert_same(np.asarray(mine), vit_files.features(w, PIXELS))


IMAGES = {
    "half": ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, lambda x: (x - 0.5) / 0.5),
    "one_number": ({"image_mean": 0.5, "image_std": 0.25}, lambda x: (x - 0.5) / 0.25),
    "colours": (
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1.0, 2.0], "do_normalize": True},
        lambda x: (x - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 1.0, 2.0]),
    ),
    "raw": ({"do_normalize": False}, lambda x: x),
    "bytes": ({"do_normalize": False, "do_rescale": False}, lambda x: 255 * x),
    "minus_one": (
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        lambda x: 2 * x - 1,
    ),
}


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_folders_of_transformers_see_pixels_as_they_want_them(name: str, tmp_path: Path) -> None:
    images, theirs = IMAGES[name]
    w = timm()
    made = folder(tmp_path / "m", transformers(w, VIT_NAMES, "vit."), HF, images)
    mine = (PIXELS - np.array(vit.PIXELS.mean)) / np.array(vit.PIXELS.std)
    for path in (made, made / "model.safetensors"):
        source = vit_source.source(path)
        assert source.heads == 3 and set(source.beyond) == {"classifier.weight", "classifier.bias"}
        found = vit.read(source, target(None))
    assert_same(ours(found, mine), vit_files.features(w, theirs(PIXELS)))


@pytest.mark.parametrize(
    ("names", "prefix", "changes"),
    [
        (VIT_NAMES, "", {}),
        (VIT_NAMES, "deit.", {"model_type": "deit"}),
        (DINO_NAMES, "dinov2.", {"model_type": "dinov2"}),
    ],
)
def test_names_of_transformers(names: dict, prefix: str, changes: dict, tmp_path: Path) -> None:
    w = timm(scale="ls{0}.gamma" if names is DINO_NAMES else "")
    stored = transformers(w, names, prefix) | {"pooler.dense.weight": np.zeros((2, 2), "f")}
    made = folder(tmp_path / "m", stored, HF | changes)
    found = vit.trunk(made, target(None))
    assert_same(ours(found, PIXELS), vit_files.features(w, PIXELS))


def test_queries_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    more = {f"encoder.layer.0.crossed.{n}.weight": np.ones((12, 12), "f") for n in hf_vit_names.QKV}
    made = folder(tmp_path / "m", transformers(timm(), VIT_NAMES, "vit.") | more, HF)
    with pytest.raises(UserError, match=r"it has encoder.layer.0.crossed.query.weight, for which"):
        vit.trunk(made, target(None))


def test_folders_of_timm(tmp_path: Path) -> None:
    w = timm()
    told = {"architecture": "vit_own_patch4_16", "pretrained_cfg": {"mean": [0.5] * 3}}
    told["pretrained_cfg"]["std"] = [0.25] * 3  # type: ignore[index]
    found = vit.trunk(folder(tmp_path / "m", w, told), target(), pixels=PLAIN)
    assert_same(ours(found, PIXELS), vit_files.features(w, (PIXELS - 0.5) / 0.25))
    source = vit_source.source(folder(tmp_path / "n", w, {"architecture": "vit_own_patch4_16"}))
    assert source.heads is None and source.pixels is None
    told = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 3, "embed_dim": 12}}
    assert vit_source.source(folder(tmp_path / "o", w, told)).heads == 3


@pytest.mark.parametrize("name", ["do_normalize", "do_rescale"])
def test_null_in_a_preprocessor_is_no_default(name: str, tmp_path: Path) -> None:
    """transformers takes it for false."""
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, name: None}
    made = folder(tmp_path / "m", transformers(timm(), VIT_NAMES, "vit."), HF, images)
    with pytest.raises(UserError, match=f"{name} is None, it must be true or false"):
        vit_source.source(made)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"architecture": "vit_small_patch16_rope_ape_224.naver_in1k"}, "rotates queries and keys"),
        ({"architecture": "vit_base_patch16_rpn_224.sw_in1k"}, "norms behind attention"),
        ({"architecture": "vit_base_patch32_clip_quickgelu_224"}, "another GELU"),
        (
            {"architecture": "vit_own_patch4_16", "model_args": {"act_layer": "silu"}},
            "model_args.act_layer is not known",
        ),
        (
            {"architecture": "vit_own_patch4_16", "model_args": {"pos_embed": "none"}},
            "model_args.pos_embed is 'none'",
        ),
    ],
)
def test_architectures_of_timm_that_arrays_do_not_tell(
    told: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        vit_source.source(folder(tmp_path / "m", timm(), told))


ONE = np.ones((12,), np.float32)
UNKNOWN: dict[str, Any] = {
    "reg_token": np.ones((1, 4, 12), "f"), "register_tokens": np.ones((1, 4, 12), "f"),
    "norm_pre.weight": ONE, "ln_pre.weight": ONE, "blocks.0.attn.q_norm.weight": ONE[:4],
    "blocks.1.attn.k_norm.bias": ONE[:4], "blocks.0.attn.relative_position_bias_table": ONE,
    "rel_pos_bias.relative_position_bias_table": ONE, "blocks.2.attn.rel_pos_h": ONE,
    "blocks.0.mlp.fc1_g.weight": np.ones((24, 12), "f"), "blocks.0.mlp.w12.weight": ONE,
    "blocks.0.mlp.norm.weight": ONE, "blocks.0.attn.norm.weight": ONE,
    "blocks.0.ls3.gamma": ONE, "blocks.0.attn.sinks": ONE, "pos_drop.scale": ONE, "something": ONE,
    "patch_embed.norm.weight": ONE, "blocks.0.gamma_3": ONE,
}  # fmt: skip


# What a model here can have, and the tests' has not, is called by our path.
OURS = {
    "reg_token": "register_tokens",
    "blocks.0.attn.q_norm.weight": "blocks/0/attn/query_norm/scale",
    "blocks.1.attn.k_norm.bias": "blocks/1/attn/key_norm/bias",
}


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_what_has_no_place_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = vit_files.write(tmp_path / "vit.safetensors", timm() | {name: UNKNOWN[name]})
    called = OURS.get(name, name)
    with pytest.raises(UserError, match=called.replace(".", r"\.")) as raised:
        vit.trunk(path, target())
    assert "place" in str(raised.value)
    without = vit.trunk(path, target(), (called,))
    assert without.keys() == module.flatten(model().params).keys() - HEAD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.mlp.fc1.weight": np.ones((48, 12), "f")}, "its blocks/0/mlp is gated"),
        ({"blocks.0.ls1.gamma": ONE[:5]}, "ls1 of .5. scales no output"),
        ({"blocks.0.ls1.gamma": ONE, "blocks.0.gamma_1": ONE}, "two arrays for blocks/0/ls1"),
        ({"norm.weight": np.ones((12,), np.int32)}, "norm.weight in .* holds no floats"),
        (
            {"norm.weight": np.ones((12, 2), "f")},
            r"its norm/scale is \[12, 2\], the model's \[12\]",
        ),
        ({"blocks.0.attn.qkv.weight": ONE}, "of other dimensions than a vision transformer's"),
        ({"patch_embed.proj.weight": np.ones((12, 48), "f")}, "of other dimensions"),
        ({"pos_embed": np.ones((1, 20, 12), "f")}, "positions of 20 tokens, which are no square"),
        ({"pos_embed": np.ones((17, 12), "f")}, "positions of 12 tokens"),
        ({"norm.bias": np.full((12,), np.nan, "f")}, "norm.bias in .* not finite"),
        ({"norm.bias": np.full((12,), 1e200)}, "norm.bias in .* not finite"),
    ],
)
def test_arrays_that_make_no_trunk(change: dict, words: str, tmp_path: Path) -> None:
    path = vit_files.write(tmp_path / "vit.safetensors", timm() | change)
    with pytest.raises(UserError, match=words):
        vit.trunk(path, target())


def test_heads_that_the_file_does_not_tell(tmp_path: Path) -> None:
    path = vit_files.write(tmp_path / "vit.safetensors", timm())
    with pytest.raises(UserError, match="it does not tell its attention heads"):
        vit.trunk(path, target(None))
    with pytest.raises(UserError, match="it has 4 attention heads, the model 3"):
        vit.trunk(path, target(4))
    told = vit_source.source(folder(tmp_path / "m", transformers(timm(), VIT_NAMES), HF))
    wrong = misfits(told, target(4))
    assert [w.why for w in wrong] == ["it has 3 attention heads, start_heads is 4"]


def test_what_pre_training_put_on_top_is_ignored_and_named(tmp_path: Path) -> None:
    names = ["head_dist.weight", "fc_norm.weight", "pre_logits.fc.weight", "decoder_embed.weight"]
    names += ["decoder_pos_embed", "decoder_blocks.0.norm1.weight", "mask_token", "attn_pool.q"]
    more = {name: np.ones((2, 2), np.int16) for name in names}  # not even read
    path = vit_files.write(tmp_path / "vit.safetensors", timm() | more)
    source = vit_source.source(path)
    assert set(source.beyond) == {*more, "head.weight", "head.bias"}
    assert_same(ours(vit.read(source, target()), PIXELS), vit_files.features(timm(), PIXELS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'; only 'gelu'"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps is 0.1"),
        ({"hidden_size": 16}, "has width 12, but the config.json beside it 16"),
        ({"num_attention_heads": "3"}, "num_attention_heads is '3'"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"image_size": [8, 32]}, "has 17 positions, but .* tells of 2 x 8 patches"),
        ({"image_size": 32}, "has 17 positions, but .* tells of 8 x 8 patches"),
        ({"image_size": [16.0, 16]}, "image_size.0. is 16.0"),
        ({"model_type": "swin"}, "not that of a vision transformer that is read here"),
        ({"model_type": None}, "not that of a vision transformer that is read here"),
    ],
)
def test_configurations_of_other_models(changes: dict, words: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "m", transformers(timm(), VIT_NAMES), HF | changes)
    for path in (made, made / "model.safetensors"):
        with pytest.raises(UserError, match=words):
            vit.trunk(path, target())


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"do_normalize": True}, "does not say image_mean and image_std"),
        ({"image_mean": [0.5] * 4, "image_std": [1.0] * 3}, "image_mean has 4 entries"),
        ({"image_mean": [0.5] * 3, "image_std": [1.0, 0.0, 1.0]}, "image_std.1. is 0.0"),
        ({"do_normalize": 1}, "do_normalize is 1, it must be true or false"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
    ],
)
def test_preprocessing_that_cannot_be_had(images: dict, words: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "m", transformers(timm(), VIT_NAMES), HF, images)
    with pytest.raises(UserError, match=words):
        vit.trunk(made, target())
