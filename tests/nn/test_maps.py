"""Experts and routers of feature maps against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate
from scipy.special import erf

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.context import NO_TASK
from moezoo.nn.maps import (
    ConstantRouter,
    ConvExpert,
    GridRouter,
    LowRankConv,
    MLPRouter,
    joined,
    map_experts,
    mixture,
    placed,
    pooled,
)
from moezoo.ops.routing import route, softmax_then_top_k, top_k_then_softmax
from tests.models.tiny import filled

X = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)


def conv(x_BHWC: np.ndarray, p: dict) -> np.ndarray:
    """A convolution with zeros around the map, one output channel at a time."""
    kernel = np.asarray(p["kernel"])
    maps = [
        sum(
            correlate(image[..., i], kernel[:, :, i, o], mode="same")
            for i in range(image.shape[-1])
        )
        for image in x_BHWC
        for o in range(kernel.shape[-1])
    ]
    stacked = np.stack(maps).reshape(len(x_BHWC), kernel.shape[-1], *x_BHWC.shape[1:3])
    return np.moveaxis(stacked, 1, -1) + np.asarray(p["bias"])


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def standard(x: np.ndarray, p: dict, epsilon: float = 1e-5) -> np.ndarray:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return y * np.asarray(p["scale"]) + np.asarray(p["bias"])


def linear(x: np.ndarray, p: dict) -> np.ndarray:
    return x @ np.asarray(p["kernel"]) + np.asarray(p["bias"])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_convolutional_expert_by_hand():
    parts = filled(lambda: ConvExpert(5, 6, rngs=nnx.Rngs(0)))
    p, s = parts.params, parts.stats
    x = conv(conv(X, p["proj"]), p["conv"])
    norm = {k: np.asarray(v) for k, v in {**p["norm"], **s["norm"]}.items()}
    x = (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
    wanted = conv(gelu(x), p["out"])
    np.testing.assert_allclose(module.merge(*parts)(X), wanted, rtol=1e-4, atol=1e-5)


def test_a_low_rank_convolution_is_one_convolution_of_that_rank():
    parts = filled(lambda: LowRankConv(5, 2, rngs=nnx.Rngs(0)))
    down, up = parts.params["down"], parts.params["up"]
    merged = np.einsum("hwir,ro->hwio", down["kernel"], up["kernel"][0, 0])
    bias = down["bias"] @ up["kernel"][0, 0] + up["bias"]
    assert np.linalg.matrix_rank(merged.reshape(-1, 5)) == 2
    wanted = conv(X, {"kernel": merged, "bias": bias})
    np.testing.assert_allclose(module.merge(*parts)(X), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="rank 0"):
        LowRankConv(5, 0, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 2 * 3 * 4], ids=["per image", "per place"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_mixture_weighs_whole_maps_or_places(rows: int, k: int):
    logits = np.random.default_rng(1).normal(size=(rows, 3)).astype(np.float32)
    maps = np.random.default_rng(2).normal(size=(3, *X.shape)).astype(np.float32)

    def run(logits, maps):
        return mixture(tuple(maps), route(logits, k=k))

    weights = softmax(logits)
    weights[weights < np.sort(weights, axis=1)[:, [-k]]] = 0
    weights = weights.reshape(2, *((3, 4) if rows > 2 else (1, 1)), 3)
    wanted = sum(weights[..., e, None] * maps[e] for e in range(3))
    np.testing.assert_allclose(run(logits, maps), wanted, rtol=1e-5, atol=1e-6)
    dmaps = jax.grad(lambda m: jnp.sum(run(logits, m) ** 2))(jnp.asarray(maps))
    by_hand = np.stack([2 * wanted * weights[..., e, None] for e in range(3)])
    np.testing.assert_allclose(dmaps, by_hand, rtol=1e-4, atol=1e-5)


def test_routers_of_rows_by_hand():
    parts = filled(lambda: MLPRouter(5, 4, 3, 3, rngs=nnx.Rngs(0)))
    router = module.merge(*parts)
    for rows, x_ND in ((pooled, X.mean((1, 2))), (placed, X.reshape(-1, 5))):
        hidden = gelu(linear(x_ND, parts.params["fc1"]))
        logits = linear(hidden, parts.params["fc2"])
        found = router(rows(jnp.asarray(X)), NO_TASK)
        np.testing.assert_allclose(found.logits_NE, logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.probs_NE, softmax(logits), rtol=1e-4, atol=1e-5)
    constant = ConstantRouter(4, 4)(pooled(jnp.asarray(X)), NO_TASK)
    np.testing.assert_allclose(constant.weights_NK, np.full((2, 4), 0.25))


@pytest.mark.slow
@pytest.mark.parametrize("select", [softmax_then_top_k, top_k_then_softmax])
def test_the_grid_router_by_hand(select):
    make = lambda: GridRouter(8, 12, 4, 2, select=select, rngs=nnx.Rngs(0))  # noqa: E731
    parts = filled(make)
    p, router = parts.params, module.merge(*parts)
    x = np.random.default_rng(3).normal(size=(2, 3, 4, 8)).astype(np.float32)
    flat = x.reshape(2, 12, 8)
    places = linear(gelu(standard(linear(flat, p["describe"]), p["norm"])), p["project"])
    added = linear(flat.swapaxes(1, 2), p["weigh"])[..., 0]
    summed = linear(gelu(standard(added, p["norm_sum"])), p["describe_sum"])
    out = linear(np.concatenate([places.mean(1), summed], -1), p["out"])
    found = router(jnp.asarray(x))
    np.testing.assert_allclose(found.routing.logits_NE, out[:, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mix_B, out[:, 8], rtol=1e-4, atol=1e-5)
    assert np.isfinite(found.routing.weights_NK).all()
    key = jax.random.key(0)
    noisy = router(jnp.asarray(x), NO_TASK, key).routing
    eps = jax.random.normal(key, (2, 4))
    np.testing.assert_allclose(noisy.noisy_NE, out[:, :4] + out[:, 4:8] * eps, rtol=1e-4, atol=1e-5)


def test_decisions_of_tasks_join_row_after_row():
    logits = [np.eye(3, dtype=np.float32)[[i, i]] for i in range(2)]
    whole = joined([route(a, k=2) for a in logits])
    assert whole.experts_NK.shape == (4, 2) and whole.noise_scale_NE.shape == (4, 3)
    np.testing.assert_array_equal(whole.experts_NK[:, 0], [0, 1, 0, 1])


def test_no_expert_is_refused():
    with pytest.raises(UserError, match="0 experts"):
        map_experts(0, lambda i, rngs: LowRankConv(5, 2, rngs=rngs), nnx.Rngs(0))
