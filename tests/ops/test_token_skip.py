"""Tokens that are skipped: gathered rows give what the mask gives, and room is respected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.ops.token_skip import TokenChoice, always, budget_loss, kept, on_kept, places

LOGITS = jax.random.normal(jax.random.key(0), (3, 7))
X = jax.random.normal(jax.random.key(1), (3, 7, 4))


def layer(x: jax.Array) -> jax.Array:
    return jnp.tanh(x) + 1.0


def found() -> TokenChoice:
    return always(kept(LOGITS), jnp.arange(7) > 0)


def test_gathered_tokens_are_the_masked_ones() -> None:
    gate = found()
    wanted = gate.keep_BT[..., None] * layer(X)
    most = int(gate.keep_BT.sum(1).max())
    for room in (most, 7):
        np.testing.assert_allclose(on_kept(layer, X, gate, room), wanted, rtol=1e-6)


def test_without_room_the_least_certain_are_skipped() -> None:
    gate = found()
    y = on_kept(layer, X, gate, 2)
    for b in range(3):
        computed = np.flatnonzero(np.asarray(y[b]).any(-1))
        logits = np.where(np.arange(7) > 0, np.asarray(LOGITS[b]), np.inf)
        kept_there = [t for t in np.argsort(-logits) if logits[t] > 0][:2]
        assert set(computed) == set(kept_there)
        assert 0 in computed  # always computed, whatever its logit


def test_values_are_hard_and_gradients_soft() -> None:
    keep = kept(LOGITS, jnp.zeros_like(LOGITS), 5.0).keep_BT
    np.testing.assert_array_equal(keep, (LOGITS > 0).astype(jnp.float32))
    grad = jax.grad(lambda x: kept(x, jnp.zeros_like(x), 5.0).keep_BT.sum())(LOGITS)
    soft = jax.nn.sigmoid(LOGITS / 5)
    np.testing.assert_allclose(grad, soft * (1 - soft) / 5, rtol=1e-5)


@pytest.mark.parametrize(("share", "room"), [(0.5, 4), (0.001, 1), (1.0, 7), (3 / 7, 3)])
def test_places(share: float, room: int) -> None:
    assert places(7, share) == room


def test_budget() -> None:
    keep = jnp.asarray([[[1.0, 1.0], [0.0, 0.0]]])  # one image, two layers, one of them empty
    found = budget_loss(keep, target=0.25, weight=2.0, least=0.1)
    np.testing.assert_allclose(found, 2 * (0.25**2 + 0.1), rtol=1e-6)
    assert budget_loss(keep, target=0.5, weight=2.0) == 0.0
