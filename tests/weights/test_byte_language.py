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
from moezoo.backbones.generate import Settings, generate, padded
from moezoo.nn import module
from moezoo.weights import hf

END, PAD = 256, 257  # behind the bytes
SENTENCES = ["the router chooses experts.", "two experts, one token.", "Köln is a city."]
CONFIG = DecoderConfig(
    vocabulary=258, width=64, depth=2, heads=4, groups=2, hidden=128, length=128, qk_norm=True
)


@pytest.mark.slow
def test_a_decoder_learns_packed_sentences(tmp_path: Path) -> None:
    rows = [[*text.encode(), END] for text in SENTENCES]
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
    assert abs(losses[0] - np.log(258)) < 0.2  # it begins knowing nothing
    assert losses[-1] < 0.05

    hf.save(tmp_path / "m", CONFIG, params, more={"eos_token_id": END})
    loaded = hf.load(tmp_path / "m").parts
    tokens, mask = padded([row[:6] for row in rows], PAD)
    settings = Settings(new=40, stop=hf.stop_tokens(tmp_path / "m"), pad=PAD)
    made, lengths = generate(loaded, tokens, settings, mask_BT=mask)
    for row, more, length in zip(rows, np.asarray(made), lengths, strict=True):
        assert [*row[:6], *more[:length]] == row
