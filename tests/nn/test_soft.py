"""The Soft MoE layer, and linear maps that are merged before the product."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.conditional import MergedLinear
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import trunc_normal
from moezoo.nn.soft import SoftMoE, SoftRouter

B, T, D, E, S, F = 3, 4, 6, 4, 2, 5
X = jax.random.normal(jax.random.key(0), (B, T, D))
STRONG = partial(trunc_normal, std=1.0)


def layer(noise_std: float = 0.0) -> SoftMoE:
    router = SoftRouter(D, E, S, noise_std=noise_std, rngs=nnx.Rngs(0))
    return SoftMoE(router, MLPExperts(E, D, F, init=STRONG, rngs=nnx.Rngs(1)))


@pytest.mark.slow
def test_it_stands_in_the_place_of_an_mlp() -> None:
    soft = layer()
    y_BTD, routing = soft.mix(X)
    np.testing.assert_array_equal(soft(X), y_BTD)
    assert soft.router.decision == "soft" and y_BTD.shape == X.shape
    np.testing.assert_allclose(routing.dispatch_BTES.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(routing.combine_BTES.sum(axis=(2, 3)), 1.0, rtol=1e-5)
    parts = module.split(soft)
    assert module.flatten(parts.params)["router/kernel"].shape == (D, E, S)
    assert parts.params["router"]["scale"] == 1.0 and not parts.stats


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_and_padding_gives_none() -> None:
    parts = module.split(layer())
    mask_BT = jnp.arange(T) < jnp.asarray([[4], [2], [0]])
    spoiled = jnp.where(mask_BT[..., None], X, jnp.nan)

    def loss(params, x_BTD):
        y_BTD = module.merge(parts.definition, params, parts.stats)(x_BTD, mask_BT=mask_BT)
        return jnp.sum(y_BTD**2), y_BTD

    (params, dx), y_BTD = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(parts.params, spoiled)
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(params))
    assert not y_BTD[~mask_BT].any() and not dx[~mask_BT].any()
    np.testing.assert_allclose(y_BTD[1, :2], layer()(X[1:2, :2])[0], atol=1e-5)


def test_noise_needs_a_key_and_slots_are_needed() -> None:
    noisy = layer(noise_std=2.0)
    np.testing.assert_array_equal(noisy(X), layer()(X))
    assert bool((noisy(X, jax.random.key(1)) != noisy(X)).any())
    with pytest.raises(UserError, match="0 slots"):
        SoftRouter(D, E, 0, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_merging_before_the_product_is_mixing_after_it() -> None:
    maps = MergedLinear(E, D, F, init=STRONG, rngs=nnx.Rngs(0))
    maps.bias.set_value(jax.random.normal(jax.random.key(2), (E, F)))
    weights_BE = jax.nn.softmax(jax.random.normal(jax.random.key(3), (B, E)))
    outputs = jnp.einsum("btd,edf->betf", X, maps.kernel.get_value())
    outputs += maps.bias.get_value()[:, None]
    expected = jnp.einsum("be,betf->btf", weights_BE, outputs)
    np.testing.assert_allclose(maps(X, weights_BE), expected, rtol=1e-4, atol=1e-4)
    for row in range(B):
        alone = maps(X[row : row + 1], weights_BE[row : row + 1])
        np.testing.assert_allclose(alone[0], expected[row], rtol=1e-4, atol=1e-4)
        folded = maps.fold(weights_BE[row])
        np.testing.assert_allclose(folded(X[row]), alone[0], rtol=1e-5, atol=1e-5)
    one_for_all = maps(X, weights_BE[:1])
    np.testing.assert_allclose(one_for_all[0], expected[0], rtol=1e-4, atol=1e-4)
    fewer = maps.take([2, 0])
    picked = jnp.zeros((1, E)).at[0, 2].set(1.0)
    np.testing.assert_allclose(fewer(X, jnp.asarray([[1.0, 0.0]])), maps(X, picked), atol=1e-5)
    assert maps.count == E and fewer.count == 2


def test_merged_maps_compute_in_their_own_type() -> None:
    maps = MergedLinear(E, D, F, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert maps(X, jnp.ones((1, E))).dtype == jnp.bfloat16
    with pytest.raises(UserError, match="at least 1"):
        MergedLinear(0, D, F, rngs=nnx.Rngs(0))
