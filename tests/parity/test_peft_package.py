"""Adapters that Hugging Face PEFT wrote, read here, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn import module
from moezoo.nn.injection import fold, inject
from moezoo.nn.lowrank import lora
from moezoo.weights import hf, peft

torch = pytest.importorskip("torch", reason="the extra 'parity' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'parity' is not installed")
theirs = pytest.importorskip("peft", reason="the extra 'parity' is not installed")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 6))


def base(folder: Path) -> Any:
    """A tiny Qwen2 (biases on q, k, v), written to disk."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def our_logits(model: Any) -> np.ndarray:
    return np.asarray(model(jnp.asarray(TOKENS, jnp.int32)).logits_BTV)


@pytest.mark.parametrize("rs", [False, True])
def test_reading_theirs(tmp_path: Path, rs: bool) -> None:
    options = theirs.LoraConfig(
        r=3, lora_alpha=7, use_rslora=rs, task_type="CAUSAL_LM", init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        rank_pattern={"v_proj": 2}, alpha_pattern={"o_proj": 5},
    )  # fmt: skip
    model = theirs.get_peft_model(base(tmp_path / "base"), options).eval()
    model.save_pretrained(tmp_path / "adapter")
    ours = module.merge(*hf.load(tmp_path / "base").parts)
    peft.attach(ours, peft.read(tmp_path / "adapter", ours))
    np.testing.assert_allclose(our_logits(ours), their_logits(model), **CLOSE)
    fold(ours)
    np.testing.assert_allclose(our_logits(ours), their_logits(model), **CLOSE)


def test_writing_for_them(tmp_path: Path) -> None:
    plain = base(tmp_path / "base")
    ours = module.merge(*hf.load(tmp_path / "base").parts)
    rngs = nnx.Rngs(1)

    def make(inputs: int, outputs: int) -> Any:
        update = lora(inputs, outputs, 2 if inputs == 24 else 4, alpha=3.0, rngs=rngs)
        update.up.set_value(jnp.asarray(np.random.default_rng(1).normal(size=update.up.shape)))
        return update

    inject(ours, ["layers/*"], make)
    peft.save(tmp_path / "adapter", ours, str(tmp_path / "base"))
    loaded = theirs.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_logits(loaded), our_logits(ours), **CLOSE)
