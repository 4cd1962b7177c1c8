"""A decoder with experts pruned for one task, as transformers reads it: the same logits.

Needs torch, transformers and tokenizers beside moezoo; makes its models itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.cli import prune
from moezoo.domains.text.adapter import tokenizer_files
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.domains.text.domain import TextDataConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights import hf

torch = pytest.importorskip("torch", reason="torch is not installed (extra parity)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra parity)"
)
pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra text)")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LENGTH, COUNT, KEPT = 24, 6, 3
SIZES = {
    "vocab_size": ByteTokenizer.vocabulary,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
    "bos_token_id": ByteTokenizer.bos,
    "eos_token_id": ByteTokenizer.eos,
    "pad_token_id": ByteTokenizer.pad,
}
QWEN = {"num_experts": COUNT, "moe_intermediate_size": 24, "head_dim": 8}
GROUPED = {
    "n_routed_experts": COUNT, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 14,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": COUNT}),
    "qwen3_moe": ("Qwen3Moe", QWEN | {"norm_topk_prob": True}),
    "qwen3_moe_shares": ("Qwen3Moe", QWEN),
    "olmoe": ("Olmoe", {"num_experts": COUNT}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": COUNT, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
        | {"shared_expert_intermediate_size": 40},
    ),
    "glm4_moe": ("Glm4Moe", GROUPED | {"head_dim": 16}),
    "dots1": ("Dots1", GROUPED | {"norm_topk_prob": False}),
    "deepseek_v3": ("DeepseekV3", GROUPED | LATENT | {"n_group": 1, "topk_group": 1}),
    "deepseek_v2": ("DeepseekV2", GROUPED | LATENT | {"norm_topk_prob": False}),
}
EXACT = ("mixtral", "qwen3_moe", "glm4_moe", "dots1", "deepseek_v3")
QUICK = ("mixtral", "qwen3_moe")
SLOW = ("qwen2_moe", "deepseek_v3")  # shared experts and gates, groups and latent attention
CASES = [
    m
    if m in QUICK
    else pytest.param(m, marks=pytest.mark.slow if m in SLOW else pytest.mark.claims)
    for m in MODELS
]


class Pruned(NamedTuple):
    """Their whole model, the folder it was pruned to, and the name of its kind."""

    theirs: Any
    folder: Path
    kind: str


def lines(file: Path, count: int, seed: int) -> Path:
    """Examples of two tasks, of which one is asked for."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdef"), 4)) for _ in range(count)]
    made = [{"instruction": w, "output": w[::-1], "task": "reverse"} for w in words]
    made += [{"instruction": w, "output": w.upper(), "task": "upper"} for w in words]
    file.write_text("".join(json.dumps(line) + "\n" for line in made))
    return file


@pytest.fixture(scope="module", params=CASES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    folder = tmp_path_factory.mktemp(request.param)
    kind, changes = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):  # it begins with 0
                tensor.add_(0.2 * torch.randn_like(tensor))
    theirs.save_pretrained(folder / "whole")
    for name, content in tokenizer_files(TextDataConfig()).items():
        (folder / "whole" / name).write_bytes(content)
    words = [str(folder / "whole"), "--task", "reverse", "--keep", str(KEPT)]
    words += ["--train-file", str(lines(folder / "train.jsonl", 12, 0))]
    words += ["--test-file", str(lines(folder / "test.jsonl", 10, 1))]
    words += ["--length", str(LENGTH), "--batch", "4", "--out", str(folder / "pruned")]
    assert prune.main(words, "moezoo prune") == 0
    return Pruned(theirs, folder / "pruned", request.param)


def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(97, 103, (3, 11))


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens())).logits.float().numpy()


def test_transformers_reads_what_ours_computes(pruned: Pruned) -> None:
    again, told = type(pruned.theirs).from_pretrained(pruned.folder, output_loading_info=True)
    assert not any(told.values()), told
    config, parts = hf.load(pruned.folder)
    assert config.experts.count == KEPT
    found = np.asarray(module.merge(*parts)(jnp.asarray(tokens())).logits_BTV)
    wanted = their_logits(again.eval())
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert np.abs(wanted - their_logits(pruned.theirs)).max() > 0.01  # experts are really gone
    # The path that the certificate is about was compared with the folder when that was written.
    stated = json.loads((pruned.folder / "certificate.json").read_text())
    assert stated["folder"]["largest_difference"] < 1e-4
    # Biases on the choice, which their optimisers leave alone, are buffers there.
    biases = [b for n, b in again.named_buffers() if n.endswith("e_score_correction_bias")]
    arrays = (*again.parameters(), *biases)
    assert stated["folder"]["parameters"] == sum(array.numel() for array in arrays)


def test_their_model_cut_by_hand_is_the_same(pruned: Pruned) -> None:
    """Rows of the router and experts of the plan, taken from their own modules."""
    plan = json.loads((pruned.folder / "plan.json").read_text())
    state = pruned.theirs.state_dict()
    for layer, kept in plan["kept"].items():
        assert len(kept) == KEPT
        at = f"model.layers.{layer.split('/')[2]}.mlp."
        names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
        names += [n for n in ("gate.e_score_correction_bias",) if at + n in state]
        for name in names:
            state[at + name] = state[at + name][kept]
    config = type(pruned.theirs.config).from_pretrained(pruned.folder)
    cut = type(pruned.theirs)(config).eval()
    cut.load_state_dict(state)
    again = type(pruned.theirs).from_pretrained(pruned.folder).eval()
    np.testing.assert_array_equal(their_logits(again), their_logits(cut))


def test_the_certificate_says_what_it_may(pruned: Pruned) -> None:
    stated = json.loads((pruned.folder / "certificate.json").read_text())
    assert stated["task"] == "reverse" and stated["kind"] == "pruned"
    exact = "up to float32 rounding" in stated["statement"]
    assert exact == (pruned.kind in EXACT)
    held = stated["verification"]
    assert held["rows"] == 5 and stated["test"]["rows"] == 5 and stated["calibration"]["rows"] == 12
    assert [d["level"] for d in held["disagreement"]] == [0, 5, 10, 50]
    assert all(d["rate"] <= d["rate_at_most"] <= 1 for d in held["disagreement"])
    # Twelve rows of "abcd\n" with four letters of answer each, after the tokenizer's first token.
    assert stated["calibration"]["tokens"] > 12 * 8
    names = {p.name for p in pruned.folder.iterdir()}
    assert {"tokenizer.json", "generation_config.json", "calibration.npz"} <= names
    assert hf.stop_tokens(pruned.folder) == (ByteTokenizer.eos,)


def test_experts_in_groups_are_not_removed(tmp_path: Path) -> None:
    changes = GROUPED | LATENT | {"n_group": 2, "topk_group": 1}
    config = transformers.DeepseekV3Config(**(SIZES | changes))
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "whole")
    for name, content in tokenizer_files(TextDataConfig()).items():
        (tmp_path / "whole" / name).write_bytes(content)
    words = [str(tmp_path / "whole"), "--task", "reverse", "--keep", str(KEPT)]
    words += ["--train-file", str(lines(tmp_path / "train.jsonl", 2, 0))]
    words += ["--test-file", str(lines(tmp_path / "test.jsonl", 2, 1))]
    with pytest.raises(UserError, match="has its 6 experts in 2 groups .* none can be removed"):
        prune.main([*words, "--out", str(tmp_path / "pruned")], "moezoo prune")
    assert not (tmp_path / "pruned").exists()
