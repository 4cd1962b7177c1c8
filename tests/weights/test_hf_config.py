"""`config.json` in both of its spellings, and what of it is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.errors import UserError
from moezoo.nn.latent_attention import LatentConfig
from moezoo.nn.rope import RopeConfig, magnitude
from moezoo.weights.hf_config import from_hf, names_of, to_hf
from moezoo.weights.names import DECODER

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


# DeepSeek-V3 with experts that go together with its defaults.
DEEP = {"model_type": "deepseek_v3", "num_key_value_heads": 4}
DEEP2 = DEEP | {"model_type": "deepseek_v2", "num_experts_per_tok": 6}
SPARSE = {
    "mixtral": ({}, ExpertsConfig(8, 2, 50)),
    "qwen3_moe": (
        {"qk_norm": True},
        ExpertsConfig(9, 3, 20, "softmax_then_top_k", every=2, dense=(1,)),
    ),
    "olmoe": (
        {"qk_norm": True, "qk_norm_over": "width", "qkv_bias": True, "out_bias": True},
        ExpertsConfig(9, 3, 50, "softmax_then_top_k_renormalised"),
    ),
    "qwen2_moe": ({"qkv_bias": True}, ExpertsConfig(9, 3, 20, shared=40)),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_decoders_with_experts_are_read_as_written(kind: str) -> None:
    parts, experts = SPARSE[kind]
    config = DecoderConfig(
        100, 32, 4, 4, 2, head_width=6, hidden=50, length=50, experts=experts, **parts
    )
    told = to_hf(config)
    assert told["model_type"] == kind and from_hf(told, "here") == config
    told.pop("num_local_experts")  # transformers writes one of both names
    assert from_hf(told, "here") == config
    others = [tuple(n.ours for n in names_of(config)), tuple(n.ours for n in DECODER)]
    assert len(set(others)) == 2  # its experts have names in files


def test_defaults_of_families_with_experts() -> None:
    found = {kind: from_hf(SIZES | {"model_type": kind}, "here").experts for kind in SPARSE}
    shares = "softmax_then_top_k"
    assert found == {
        "mixtral": ExpertsConfig(8, 2, 50),
        "qwen3_moe": ExpertsConfig(128, 8, 768, shares),
        "olmoe": ExpertsConfig(64, 8, 50, shares),
        "qwen2_moe": ExpertsConfig(60, 4, 1408, shares, shared=5632),
    }


def test_dense_layers_beyond_the_last_name_nothing() -> None:
    values = SIZES | {"model_type": "qwen3_moe", "mlp_only_layers": [7, 1], "num_experts": 16}
    assert from_hf(values, "here").experts.dense == (1,)
    with pytest.raises(UserError, match="experts.dense names layer 3, but the depth is 3"):
        DecoderConfig(depth=3, experts=ExpertsConfig(8, dense=(3,)))


def test_yarn_scales_of_deepseek() -> None:
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 10}
    found = from_hf(LLAMA | {"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "here")
    wanted = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert magnitude(found.rope) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "Unknown model_type in here 'bert': known: .*llama, mixtral"),
        (
            {"model_type": "deepseek_v32"},
            "here: model_type deepseek_v32 is not supported, because its attention looks at a",
        ),
        (
            {"model_type": "deepseek_v3"},
            "here: num_key_value_heads is 2, but latent attention has as many as num_attention",
        ),
        (
            DEEP2 | {"norm_topk_prob": True},
            "here: norm_topk_prob is True, which transformers' code of this family does not follow",
        ),
        (
            DEEP2 | {"topk_method": "noaux_tc"},
            "here: topk_method is 'noaux_tc'; only greedy and group_limited_greedy can be loaded",
        ),
        ({"model_type": "dots1"}, "here: n_routed_experts is missing; download it again"),
        ({"model_type": "dots1", "max_window_layers": 2}, "sliding_window is not given, but slid"),
        (DEEP | {"n_group": 3}, "here: experts.groups is 3, which does not divide experts.count"),
        ({"model_type": "deepseek"}, "deepseek is not supported, because transformers has no code"),
        ({"model_type": "mixtral", "sliding_window": 9}, "here: sliding_window is 9, but sliding"),
        (
            # Every layer of it has them then, whatever max_window_layers says.
            {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 9}
            | {"model_type": "qwen3_moe"},
            "here: use_sliding_window is True, but",
        ),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "here: clip_qkv is 8.0, but clipped"),
        ({"model_type": "mixtral", "num_local_experts": 1}, "here: experts.top_k is 2, but"),
        ({"model_type": "mixtral", "num_experts_per_tok": 1}, "a single expert 1 whatever its"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "here: num_local_experts is 0"),
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


GROUPED: dict[str, Any] = {"shared_weight": "one", "dense": (0,), "factor": 1.5}
CHOSEN: dict[str, Any] = {"choice": "score_plus_bias", "group_score": "two_best"}
SIGMOIDS = "sigmoid_then_top_k_renormalised"
DEEPSEEK: dict[str, DecoderConfig] = {
    "dots1": DecoderConfig(
        100, 32, 3, 4, 2, head_width=6, qk_norm=True,
        experts=ExpertsConfig(8, 3, 20, SIGMOIDS, shared=40, **GROUPED, **CHOSEN),
    ),
    "glm4_moe": DecoderConfig(
        100, 32, 3, 4, 2, head_width=8, qkv_bias=True, rope=RopeConfig(share=0.5),
        experts=ExpertsConfig(8, 3, 20, SIGMOIDS, shared=20, **GROUPED, **CHOSEN),
    ),
    "deepseek_v3": DecoderConfig(
        100, 32, 3, 4, 4, latent=LatentConfig(8, 12, 6, 4, 6, neighbours=False, growth=0.7),
        rope=RopeConfig(scaling="yarn", factor=4.0, original_length=16, magnitude=1.3),
        experts=ExpertsConfig(
            8, 3, 20, SIGMOIDS, groups=4, top_groups=2, shared=20, **GROUPED, **CHOSEN
        ),
    ),
    "deepseek_v2": DecoderConfig(
        100, 32, 3, 4, 4, latent=LatentConfig(8, 0, 6, 4, 6), qkv_bias=True, out_bias=True,
        experts=ExpertsConfig(
            8, 3, 20, "softmax_then_top_k", groups=4, top_groups=2, shared=20, **GROUPED
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEPSEEK)
def test_decoders_of_deepseeks_kind_are_read_as_written(kind: str) -> None:
    config = DEEPSEEK[kind]
    told = to_hf(config)
    assert told["model_type"] == kind and from_hf(told, "here") == config


def test_defaults_of_deepseek_v3() -> None:
    config = from_hf(SIZES | DEEP, "here")
    assert config.latent == LatentConfig(512)
    experts = config.experts
    assert (experts.count, experts.top_k, experts.groups, experts.top_groups) == (256, 8, 8, 4)
    assert (experts.dense, experts.shared, experts.factor) == ((0, 1, 2), 2048, 2.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DecoderConfig(out_bias=True), "No model of transformers has .*'out_bias': True"),
        # Experts whose weights are shares of all have norms on queries and keys, or a shared one.
        (
            DecoderConfig(experts=ExpertsConfig(8, selection="softmax_then_top_k")),
            "No model of transformers has .*'experts': .*'count': 8",
        ),
        (
            DecoderConfig(rope=RopeConfig(scaling="dynamic", factor=2.0)),
            "original_length is 2048; .* max_position_embeddings, which is 4096",
        ),
    ],
)
def test_not_to_be_written(config: DecoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_hf(config)
