"""From tokens to one vector: the attention pool by hand, norms of queries and keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn import module
from moezoo.nn.attention import Attention, AttentionPool, first_token, mean_token
from moezoo.nn.layers import ScaleNorm
from tests.models.tiny import filled

X = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 8)))


def softmax(a: np.ndarray) -> np.ndarray:
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def heads(a: np.ndarray, count: int) -> np.ndarray:
    return a.reshape(*a.shape[:2], count, -1).transpose(0, 2, 1, 3)


def standard(a: np.ndarray) -> np.ndarray:
    return (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)


def linear(p: dict, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(p["kernel"]) + np.asarray(p["bias"])


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    mixed = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def test_first_and_mean():
    np.testing.assert_array_equal(first_token(X), X[:, 0])
    np.testing.assert_allclose(mean_token(X), X.mean(1), rtol=1e-6)


@pytest.mark.slow
def test_queries_and_keys_are_normalised_head_by_head():
    parts = filled(lambda: Attention(8, 2, make_norm=ScaleNorm, rngs=nnx.Rngs(0)))
    p = parts.params
    q, k, v = (heads(a, 2) for a in np.split(linear(p["qkv"], X), 3, axis=-1))
    q, k = (standard(a) * p[f"{n}_norm"]["scale"] for a, n in ((q, "query"), (k, "key")))
    wanted = linear(p["proj"], attended(q, k, v))
    np.testing.assert_allclose(module.merge(*parts)(X), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_attention_pool_by_hand():
    parts = filled(
        lambda: AttentionPool(8, 2, 12, activation=lambda x: x, make_norm=None, rngs=nnx.Rngs(0))
    )
    p = parts.params
    q = heads(linear(p["query"], np.repeat(np.asarray(p["probe"]), 2, axis=0)), 2)
    k, v = (heads(a, 2) for a in np.split(linear(p["key_value"], X), 2, axis=-1))
    pooled = linear(p["proj"], attended(q, k, v))[:, 0]
    normed = standard(pooled) * np.asarray(p["norm"]["scale"]) + np.asarray(p["norm"]["bias"])
    wanted = pooled + linear(p["mlp"]["fc2"], linear(p["mlp"]["fc1"], normed))
    np.testing.assert_allclose(module.merge(*parts)(X), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_norms_fit_heads_of_any_width():
    attention = Attention(8, 2, head_width=6, make_norm=ScaleNorm, rngs=nnx.Rngs(0))
    assert attention(jnp.ones((1, 3, 8))).shape == (1, 3, 8)
    assert attention.query_norm.scale.shape == attention.key_norm.scale.shape == (6,)
