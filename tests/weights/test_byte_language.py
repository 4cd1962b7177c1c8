"""From text to text: a tiny decoder learns packed sentences and continues them, also once saved."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.generate import Settings, generate
from moezoo.nn import module
from moezoo.weights import hf
from moezoo.weights.tokenizer import ByteTokenizer

SENTENCES = ["the router chooses experts.", "two experts, one token.", "Köln is a city."]
CONFIG = DecoderConfig(
    vocabulary=259, width=64, depth=2, heads=4, groups=2, hidden=128, length=128, qk_norm=True
)


@pytest.mark.slow
def test_a_decoder_learns_packed_sentences(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    rows = [tokenizer.encode(text) + [tokenizer.id_of("eos")] for text in SENTENCES]
    tokens = np.concatenate(rows)[None].astype(np.int32)
    segments = np.concatenate([[i + 1] * len(row) for i, row in enumerate(rows)])[None]
    same = segments[:, 1:] == segments[:, :-1]
    parts = module.create(lambda: CONFIG.build(nnx.Rngs(0)))
    optimiser = optax.adam(3e-3)

    def loss(params):
        model = module.merge(parts.definition, params, parts.stats)
        logits = model(jnp.asarray(tokens), segments_BT=jnp.asarray(segments)).logits_BTV
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.where(same, each, 0).sum() / same.sum()

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = parts.params, optimiser.init(parts.params), []
    for _ in range(120):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert abs(losses[0] - np.log(259)) < 0.2  # it begins knowing nothing
    assert losses[-1] < 0.05

    hf.save(tmp_path / "m", CONFIG, params, more={"eos_token_id": tokenizer.id_of("eos")})
    loaded = hf.load(tmp_path / "m").parts
    starts = [text[:5] for text in SENTENCES]
    prompts = tokenizer.encode_batch(starts, side="left")
    settings = Settings(new=40, stop=hf.stop_tokens(tmp_path / "m"), pad=tokenizer.id_of("pad"))
    found = generate(loaded, prompts.tokens_BT, settings, mask_BT=prompts.mask_BT)
    ends = tokenizer.decode_batch(*found)
    assert [a + b for a, b in zip(starts, ends, strict=True)] == SENTENCES
