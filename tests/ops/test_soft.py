"""Soft MoE against one token, slot and expert at a time; padding, order, empty rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops.soft import similarity, soft_apply, soft_route
from tests.ops import oracle
from tests.ops.cases import Shape, arrays, assert_trees_close, mlp, problem

B, T, E, S, D = 2, 5, 3, 2, 4
LAYER = Shape(n=B * T, e=E, k=1, d=D, f=3)


def layer(params, x_BTD, slots_DES, scale, mask_BT, **noise):
    routing = soft_route(x_BTD, slots_DES, scale, mask_BT=mask_BT, **noise)
    return soft_apply(mlp, params, x_BTD, routing)


@cache
def runner() -> Any:
    """Jitted output and gradients of sum(output ** 2)."""

    def run(params, x_BTD, slots_DES, scale, mask_BT):
        def loss(*args):
            y_BTD = layer(*args, mask_BT)
            return jnp.sum(y_BTD.astype(jnp.float32) ** 2), y_BTD

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, x_BTD, slots_DES, scale)

    return jax.jit(run)


def draw(seed: int) -> tuple[Any, np.ndarray, np.ndarray, float, np.ndarray]:
    p = problem(LAYER, seed, padded=0.3)
    slots_DES = np.random.default_rng(seed).normal(size=(D, E, S))
    return p.params, p.x_ND.reshape(B, T, D), slots_DES, 2.5, p.mask_N.reshape(B, T)


def by_oracle(params, x_BTD, slots_DES, scale, mask_BT) -> np.ndarray:
    y_BTD = np.zeros(x_BTD.shape)
    unit_DES = slots_DES / np.linalg.norm(slots_DES, axis=0)
    for b in range(len(x_BTD)):
        real = np.flatnonzero(mask_BT[b])
        if not len(real):
            continue
        x = x_BTD[b, real]
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        logits = scale * np.einsum("td,des->tes", unit, unit_DES)
        outputs = np.zeros((E, S, D))
        for e in range(E):
            for s in range(S):
                outputs[e, s] = oracle.expert(params, e, oracle.softmax(logits[:, e, s]) @ x)
        for place, t in enumerate(real):
            weights = oracle.softmax(logits[place].ravel()).reshape(E, S)
            y_BTD[b, t] = np.einsum("es,esd->d", weights, outputs)
    return y_BTD


@pytest.mark.slow
@given(seed=st.integers(0, 2**31 - 1))
def test_against_the_oracle_with_anything_in_the_padding(seed: int) -> None:
    params, x_BTD, slots_DES, scale, mask_BT = draw(seed)
    spoiled = np.where(mask_BT[..., None], x_BTD, np.nan)
    grads, y_BTD = runner()(*arrays((params, spoiled, slots_DES, scale)), mask_BT)
    expected = by_oracle(params, x_BTD, slots_DES, scale, mask_BT)
    assert_trees_close(y_BTD, expected, atol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.asarray(grads[1])[~mask_BT].any()


def test_gradients_against_finite_differences() -> None:
    params, x_BTD, slots_DES, scale, mask_BT = draw(3)
    grads, _ = runner()(*arrays((params, x_BTD, slots_DES, scale)), mask_BT)
    rng = np.random.default_rng(4)
    step = jax.tree.map(lambda a: rng.normal(size=np.shape(a)), (params, x_BTD, slots_DES, scale))

    def moved(h: float) -> float:
        near = jax.tree.map(lambda a, s: a + h * s, (params, x_BTD, slots_DES, scale), step)
        return float(np.sum(by_oracle(*near, mask_BT) ** 2))

    slope = sum(
        float(np.sum(np.asarray(a, np.float64) * b))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True)
    )
    assert slope == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-3)


@pytest.mark.slow
def test_order_of_tokens_rows_and_experts() -> None:
    params, x_BTD, slots_DES, scale, _ = draw(5)
    mask_BT = np.ones((B, T), bool)

    def run(params, x_BTD, slots_DES):
        return np.asarray(runner()(*arrays((params, x_BTD, slots_DES, scale)), mask_BT)[1])

    base = run(params, x_BTD, slots_DES)
    tokens, experts = [3, 0, 4, 1, 2], [2, 0, 1]
    assert_trees_close(run(params, x_BTD[:, tokens], slots_DES), base[:, tokens])
    assert_trees_close(run(params, x_BTD[::-1].copy(), slots_DES), base[::-1])
    renamed = jax.tree.map(lambda a: a[experts], params)
    assert_trees_close(run(renamed, x_BTD, slots_DES[:, experts]), base)
    alone = layer(*arrays((params, x_BTD[:1], slots_DES, scale)), mask_BT[:1])
    assert_trees_close(alone, base[:1])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens: int) -> None:
    params, x_BTD, slots_DES, scale, _ = draw(6)
    x_BTD, mask_BT = x_BTD[:, :tokens], np.ones((B, tokens), bool)
    y_BTD = layer(*arrays((params, x_BTD, slots_DES, scale)), mask_BT)
    assert y_BTD.shape == (B, tokens, D)
    assert_trees_close(y_BTD, by_oracle(params, x_BTD, slots_DES, scale, mask_BT), atol=1e-4)


@pytest.mark.slow
def test_bfloat16_tokens_and_float32_mixtures() -> None:
    params, x_BTD, slots_DES, scale, mask_BT = draw(7)
    wide = by_oracle(params, x_BTD, slots_DES, scale, mask_BT)
    half, x16 = arrays((params, x_BTD), jnp.bfloat16)
    routing = soft_route(x16, arrays(slots_DES), jnp.float32(scale), mask_BT=mask_BT)
    assert {leaf.dtype for leaf in routing[:3]} == {jnp.dtype(jnp.float32)}
    y_BTD = soft_apply(mlp, half, x16, routing)
    assert y_BTD.dtype == jnp.bfloat16
    assert_trees_close(y_BTD.astype(jnp.float32), wide, rtol=0.1, atol=0.15)


def test_noise_needs_a_key() -> None:
    _, x_BTD, slots_DES, scale, _ = draw(8)
    args = (*arrays((x_BTD, slots_DES)), jnp.float32(scale))
    quiet, still = soft_route(*args), soft_route(*args, noise_std=3.0)
    np.testing.assert_array_equal(quiet.logits_BTES, still.logits_BTES)
    loud = soft_route(*args, noise_std=3.0, key=jax.random.key(0))
    assert 1.5 < float(jnp.std(loud.logits_BTES - quiet.logits_BTES)) < 4.5


@pytest.mark.slow
def test_similarity_of_equal_and_of_orthogonal_rows() -> None:
    np.testing.assert_allclose(similarity(jnp.ones((2, 3, 4))), 1.0, rtol=1e-6)
    np.testing.assert_allclose(similarity(jnp.eye(4)[None]), 0.0, atol=1e-6)
