"""`config.json` in both of its spellings, and what of it is refused."""

from __future__ import annotations

import math

import pytest

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.nn.rope import RopeConfig, magnitude
from moezoo.weights.hf_config import from_hf, to_hf

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 50,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1e-5,
}
LLAMA = {"model_type": "llama"} | SIZES
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}


def test_both_spellings_of_rotation() -> None:
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    wanted = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_length=40)
    assert from_hf(old, "here").rope == from_hf(new, "here").rope == wanted
    oldest = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf(oldest, "here").rope == RopeConfig(
        scaling="linear", factor=2.0, original_length=77
    )


def test_families_and_their_defaults() -> None:
    llama, qwen2, qwen3 = (
        from_hf(SIZES | {"model_type": kind}, "here") for kind in ("llama", "qwen2", "qwen3")
    )
    assert (llama.qkv_bias, llama.qk_norm, llama.width_of_head) == (False, False, 8)
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.width_of_head) == (False, True, 128)
    biased = from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True}, "here", dtype="bfloat16")
    assert biased.qkv_bias and biased.out_bias and biased.mlp_bias and biased.dtype == "bfloat16"
    many = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert from_hf(many, "here").groups == 4


ROPES = [
    RopeConfig(theta=1e6),
    RopeConfig(scaling="linear", factor=2.0, original_length=50),
    RopeConfig(scaling="dynamic", factor=2.0, original_length=50),
    RopeConfig(scaling="llama3", factor=2.0, original_length=20, low_frequency=0.5),
    RopeConfig(scaling="yarn", factor=2.0, original_length=20, truncate=False, magnitude=1.5),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r.scaling)
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "out_bias": True, "qk_norm": True},
    ],
)
def test_what_is_written_is_read_equal(rope: RopeConfig, parts: dict) -> None:
    config = DecoderConfig(
        100, 32, 3, 4, 2, head_width=6, hidden=50, length=50, rope=rope, tied_head=True, **parts
    )
    assert from_hf(to_hf(config), "here") == config


def test_yarn_scales_of_deepseek() -> None:
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 10}
    found = from_hf(LLAMA | {"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "here")
    wanted = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert magnitude(found.rope) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "Unknown model_type in here 'mixtral': known: llama, qwen2"),
        ({"model_type": "qwen4"}, "Unknown model_type in here 'qwen4': did you mean qwen"),
        ({"hidden_act": "gelu"}, "here: hidden_act is 'gelu', but only silu"),
        ({"quantization_config": {"bits": 4}}, "here: quantization_config .* not supported"),
        (
            {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
            "here: use_sliding_window is True, but sliding windows are not supported",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
        ({"vocab_size": None}, "here: vocab_size is None, it must be a whole number"),
        ({"num_attention_heads": "4"}, "here: num_attention_heads is '4'"),
        ({"rms_norm_eps": "small"}, "here: rms_norm_eps is 'small', it must be a number"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "Unknown rope_type in here 'longro"),
        ({"partial_rotary_factor": 0.5}, "here: partial_rotary_factor is 0.5, but only 1"),
    ],
)
def test_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf(LLAMA | changes, "here")


def test_windows_that_no_layer_has_are_accepted() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 3}
    assert from_hf(LLAMA | {"model_type": "qwen2"} | windows, "here").depth == 3
    assert from_hf(LLAMA | windows | {"use_sliding_window": False}, "here").depth == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DecoderConfig(out_bias=True), "No model of transformers has .*'out_bias': True"),
        (
            DecoderConfig(rope=RopeConfig(scaling="dynamic", factor=2.0)),
            "original_length is 2048; .* max_position_embeddings, which is 4096",
        ),
    ],
)
def test_not_to_be_written(config: DecoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_hf(config)
