"""Decoders against transformers: logits, padded batches, greedy text, folders read and written.

Needs torch and transformers beside moezoo, in one environment; makes its models itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.backbones.generate import Settings, generate
from moezoo.nn import module
from moezoo.weights import hf, hf_files

torch = pytest.importorskip("torch", reason="torch is not installed (extra parity)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra parity)"
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large weights: with 0.02 a wrong rotation would hardly show in the logits.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0} | {
    "original_max_position_embeddings": 16
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
# The tests' texts are longer than this, so that the base really grows.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
DEEP_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
GROUPED = {
    "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 14,
}  # fmt: skip
QWEN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_many_heads": ("Llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "llama_mlp_bias": ("Llama", {"mlp_bias": True, "head_dim": 6}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3_tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral_all": ("Mixtral", {"num_local_experts": 2, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", QWEN_EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe_dense_layers": (
        "Qwen3Moe",
        QWEN_EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [1]},
    ),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "eos_token_id": 2}),
    "olmoe_renormalised": (
        "Olmoe",
        {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True, "eos_token_id": 2},
    ),
    "qwen2_moe": ("Qwen2Moe", QWEN_EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen2_moe_plain": (
        "Qwen2Moe",
        QWEN_EXPERTS
        | {"shared_expert_intermediate_size": 40, "qkv_bias": False, "mlp_only_layers": [0]},
    ),
    "dots1": ("Dots1", GROUPED | {"norm_topk_prob": True, "head_dim": 8}),
    "dots1_bias": ("Dots1", GROUPED | {"attention_bias": True, "head_dim": 12}),
    "glm4_moe": ("Glm4Moe", GROUPED | {"head_dim": 16, "attention_bias": True}),
    "glm4_moe_norms": (
        "Glm4Moe",
        GROUPED | {"head_dim": 16, "use_qk_norm": True, "partial_rotary_factor": 0.25},
    ),
    "deepseek_v3": ("DeepseekV3", GROUPED | LATENT | {"n_group": 3, "topk_group": 2}),
    "deepseek_v3_yarn": (
        "DeepseekV3",
        GROUPED
        | LATENT
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_interleave": False}
        | {"attention_bias": True, "norm_topk_prob": False, "rope_parameters": DEEP_YARN},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        GROUPED
        | LATENT
        | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
        | {"norm_topk_prob": False},
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        GROUPED
        | LATENT
        | {"q_lora_rank": None, "attention_bias": True, "rope_parameters": DEEP_YARN}
        | {"norm_topk_prob": False},
    ),
}
SHARDED = {"llama3", "qwen3", "mixtral"}  # one of each kind of head, and experts
QUICK = ("llama3", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
# One more of each family; their other variants are claims.
SLOW = ("llama_mlp_bias", "qwen2_moe", "dots1", "glm4_moe_norms", "deepseek_v2")
CASES = [
    m
    if m in QUICK
    else pytest.param(m, marks=pytest.mark.slow if m in SLOW else pytest.mark.claims)
    for m in MODELS
]


class Pair(NamedTuple):
    """Their model, its folder, and what we load from there."""

    theirs: Any
    folder: Path
    ours: hf.PublishedModel


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, changes = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # they begin with biases of 0 and norms of 1
        for name, tensor in theirs.named_parameters():
            if name.endswith("bias") or "norm" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
        for name, tensor in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):  # in the range of the scores
                tensor.add_(0.2 * torch.randn_like(tensor))
    folder = tmp_path_factory.mktemp(request.param)
    limit = "20KB" if request.param in SHARDED else "1GB"
    theirs.save_pretrained(folder, max_shard_size=limit, safe_serialization=True)
    return Pair(theirs, folder, hf.load(folder))


def prompts(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of three texts of different lengths, padded on one side."""
    rng = np.random.default_rng(0)
    lengths, longest = (11, 5, 8), 11
    tokens, mask = np.zeros((3, longest), np.int64), np.zeros((3, longest), bool)
    for row, length in enumerate(lengths):
        part = slice(longest - length, None) if side == "left" else slice(0, length)
        tokens[row, part] = rng.integers(3, SIZES["vocab_size"], length)
        mask[row, part] = True
    return tokens, mask


def their_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    return found.logits.float().numpy()


def test_the_folder_was_really_sharded(pair: Pair) -> None:
    files = list(pair.folder.glob("*.safetensors"))
    assert len(files) > 3 or not (pair.folder / hf.INDEX).exists()


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(pair: Pair, side: str) -> None:
    tokens, mask = prompts(side)
    ours = module.merge(*pair.ours.parts)
    found = ours(jnp.asarray(tokens, jnp.int32), mask_BT=jnp.asarray(mask)).logits_BTV
    wanted = their_logits(pair.theirs, tokens, mask)
    if pair.ours.config.rope.scaling == "dynamic" and side == "left":
        # Without position ids they count padding in front, which here changes the base.
        positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        with torch.no_grad():
            given = {"attention_mask": torch.tensor(mask).long(), "position_ids": positions}
            wanted = pair.theirs(torch.tensor(tokens), **given).logits.numpy()
    assert np.abs(wanted[mask]).max() > 1
    np.testing.assert_allclose(np.asarray(found)[mask], wanted[mask], **CLOSE)


def test_greedy_text(pair: Pair) -> None:
    tokens, mask = prompts("left")
    with torch.no_grad():
        wanted = pair.theirs.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=12,
            do_sample=False,
        ).numpy()[:, tokens.shape[1] :]
    stop = hf.stop_tokens(pair.folder)
    assert stop == (2,)
    found = generate(pair.ours.parts, tokens, Settings(new=12, stop=stop), mask_BT=mask)
    # They stop making columns when every row has ended.
    wanted = np.pad(wanted, ((0, 0), (0, 12 - wanted.shape[1])))
    np.testing.assert_array_equal(found.tokens_BT, wanted)


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 15_000])
def test_what_we_write_loads_there(pair: Pair, shard_bytes: int, tmp_path: Path) -> None:
    folder = tmp_path / "written"
    hf.save(folder, pair.ours.config, pair.ours.parts.params, shard_bytes=shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes < hf.SHARD_BYTES)
    again, told = type(pair.theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    tokens, mask = prompts("right")
    # Not the pair's own: a dynamic rotation depends on what a model has seen before.
    fresh = type(pair.theirs).from_pretrained(pair.folder).eval()
    wanted, found = (their_logits(model, tokens, mask)[mask] for model in (fresh, again.eval()))
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert hf.load(folder).config == pair.ours.config


def test_experts_in_one_stack(pair: Pair, tmp_path: Path) -> None:
    """The form that transformers 5 has in memory holds the same numbers, and names nothing new."""
    if not pair.ours.config.experts.count:
        pytest.skip("no experts: both forms are the same file")
    pair.theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    files = hf_files.tensor_files(tmp_path / "fused")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in files)
    again = module.flatten(hf.load(tmp_path / "fused").parts.params)
    for path, leaf in module.flatten(pair.ours.parts.params).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(pair: Pair, dtype: str, tmp_path: Path) -> None:
    kind = type(pair.theirs)
    half = kind.from_pretrained(pair.folder, dtype=getattr(torch, dtype))
    half.save_pretrained(tmp_path / dtype)
    loaded = hf.load(tmp_path / dtype, param_dtype=dtype)
    flat = module.flatten(loaded.parts.params)
    # Routers compute in float32 whatever the model does, and are that in memory.
    assert {str(leaf.dtype) for path, leaf in flat.items() if "/router/" not in path} == {dtype}
    kernel = half.state_dict()["model.layers.1.self_attn.o_proj.weight"].float().numpy().T
    np.testing.assert_array_equal(flat["layers/1/attn/o/kernel"].astype(jnp.float32), kernel)
    hf.save(tmp_path / "again", loaded.config, loaded.parts.params)
    back = kind.from_pretrained(tmp_path / "again", dtype="auto")
    for name, tensor in half.state_dict().items():
        assert back.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(back.state_dict()[name], tensor), name
