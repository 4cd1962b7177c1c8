"""Attention experts: padding, precision, gradients, more of them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.context import NO_TASK
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import trunc_normal
from moezoo.nn.moa import HeadExperts, MoA, keys_and_values
from moezoo.nn.routers import LinearRouter
from moezoo.ops import grouped

B, T, D, E, K, F = 2, 5, 8, 4, 2, 6
X = jax.random.normal(jax.random.key(0), (B, T, D))


def layer(dtype=jnp.float32) -> MoA:
    rngs, strong = nnx.Rngs(0), partial(trunc_normal, std=0.5)
    heads = HeadExperts(E, D, F, init=strong, dtype=dtype, rngs=rngs)
    router = LinearRouter(D, E, K, init=strong, rngs=rngs)
    return MoA(router, heads, grouped.reference, keys_and_values(heads, rngs))


@jax.jit
def run(moa: MoA, x_BTD: jax.Array, mask_N: jax.Array | None = None):
    return moa(x_BTD, NO_TASK, None, mask_N)


@pytest.mark.slow
def test_padding_is_not_looked_at() -> None:
    moa = layer()
    short = run(moa, X[:, :3]).y_ND.reshape(B, 3, D)
    mask_BT = jnp.broadcast_to(jnp.arange(T) < 3, (B, T))
    spoiled = jnp.where(mask_BT[..., None], X, jnp.nan)
    padded, record = run(moa, spoiled, mask_BT.reshape(-1))
    padded = padded.reshape(B, T, D)
    np.testing.assert_allclose(padded[:, :3], short, rtol=1e-5, atol=1e-6)
    assert not np.any(padded[:, 3:]) and np.all(record.routing.experts_NK[3:5] == -1)


def test_rows_do_not_see_each_other() -> None:
    moa = layer()
    both = run(moa, X).y_ND.reshape(B, T, D)
    for row in range(B):
        np.testing.assert_allclose(run(moa, X[row : row + 1]).y_ND, both[row], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_every_parameter_has_a_finite_gradient() -> None:
    parts = module.split(layer())

    @jax.jit
    @jax.grad
    def slopes(params):
        return jnp.sum(jnp.sin(module.merge(parts.definition, params, parts.stats)(X).y_ND))

    for path, leaf in module.flatten(slopes(parts.params)).items():
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path


@pytest.mark.slow
def test_bfloat16_stays_close_with_a_float32_router() -> None:
    exact, half = run(layer(), X), run(layer(jnp.bfloat16), X.astype(jnp.bfloat16))
    assert half.y_ND.dtype == jnp.bfloat16
    assert half.record.routing.logits_NE.dtype == jnp.float32
    same_N = np.all(exact.record.routing.experts_NK == half.record.routing.experts_NK, axis=1)
    assert same_N.sum() > B * T / 2
    np.testing.assert_allclose(half.y_ND.astype(jnp.float32)[same_N], exact.y_ND[same_N], atol=0.1)


def test_heads_without_a_unit_are_refused() -> None:
    with pytest.raises(UserError, match="4 experts with 0"):
        HeadExperts(4, 8, 0, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HeadExperts, MLPExperts])
def test_more_experts_stand_behind_the_old_ones(kind) -> None:
    few = kind(E, D, F, rngs=nnx.Rngs(0))
    many = few.more(3, rngs=nnx.Rngs(1))
    assert (few.count, many.count) == (E, E + 3)
    before = module.flatten(module.split(few).params)
    for path, stack in module.flatten(module.split(many).params).items():
        np.testing.assert_array_equal(stack[:E], before[path])
        assert path.endswith("bias") or np.std(stack[E:]) > 0.01
