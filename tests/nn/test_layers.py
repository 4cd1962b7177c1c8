"""Dense layers, normalisations, attention, embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.attention import Attention
from moezoo.nn.conv import BatchNorm, Conv, ConvTranspose
from moezoo.nn.embed import PatchEmbed, grid_of
from moezoo.nn.layers import LayerNorm, Linear, drop_path, trunc_normal

KEY = jax.random.key(0)


def test_trunc_normal_is_cut_at_two_deviations():
    values = trunc_normal(KEY, (100, 100))
    assert float(jnp.abs(values).max()) <= 0.04 and 0.016 < float(values.std()) < 0.019


def test_layer_norm_works_in_float32_whatever_the_input():
    x = 1000 + jax.random.normal(KEY, (4, 64))
    y = LayerNorm(64)(x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-3)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-3)
    assert LayerNorm(64)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_linear_computes_in_its_type_with_float32_parameters():
    layer = Linear(3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((1, 3))).dtype == jnp.bfloat16
    assert layer.kernel.get_value().dtype == jnp.float32


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    y = np.asarray(drop_path(x, 0.25, KEY))
    per_example = y.reshape(4000, -1)
    assert all(np.ptp(row) == 0 for row in per_example)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.03


def test_drop_path_does_nothing_without_key_or_rate():
    x = jnp.ones((3, 2))
    assert drop_path(x, 0.5, None) is x and drop_path(x, 0.0, KEY) is x


@pytest.mark.slow
def test_convolutions_agree_with_their_definitions():
    x = jax.random.normal(KEY, (2, 5, 4, 3))
    conv = Conv(3, 2, rngs=nnx.Rngs(0))
    w, b = conv.kernel.get_value(), conv.bias.get_value()
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    wanted = sum(padded[:, i : i + 5, j : j + 4] @ w[i, j] for i in range(3) for j in range(3)) + b
    np.testing.assert_allclose(conv(x), wanted, atol=1e-5)
    strided = Conv(3, 2, stride=2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(strided(x), conv(x)[:, ::2, ::2], atol=1e-5)


def test_transposed_convolution_is_the_transpose_of_a_strided_one():
    up = ConvTranspose(2, 3, rngs=nnx.Rngs(0))
    down = Conv(3, 2, stride=2, rngs=nnx.Rngs(1))
    kernel = up.kernel.get_value()[::-1, ::-1].swapaxes(2, 3)
    down.kernel.set_value(kernel)
    down.bias.set_value(jnp.zeros(2))
    y = jax.random.normal(KEY, (1, 3, 4, 2))
    _, pull = jax.vjp(down, jnp.zeros((1, 6, 8, 3)))
    np.testing.assert_allclose(up(y) - up.bias.get_value(), pull(y)[0], atol=1e-5)


def test_batch_norm_keeps_running_statistics_as_documented():
    norm = BatchNorm(3)
    x = 2 + 3 * jax.random.normal(KEY, (4, 5, 6, 3))
    y = norm(x, train=True)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, atol=1e-3)
    flat = np.asarray(x).reshape(-1, 3)
    np.testing.assert_allclose(norm.mean.get_value(), 0.1 * flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(norm.var.get_value(), 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-4)
    before = module.split(norm).stats
    norm(x)
    jax.tree.map(np.testing.assert_array_equal, before, module.updated_stats(norm))


def test_batch_norm_statistics_carry_no_gradient():
    parts = module.split(BatchNorm(2))

    def running(x):
        norm = module.merge(*parts)
        norm(x, train=True)
        return sum(leaf.sum() for leaf in jax.tree.leaves(module.updated_stats(norm)))

    assert not jax.grad(running)(jax.random.normal(KEY, (1, 2, 2, 2))).any()


def test_attention_agrees_with_one_head_at_a_time():
    attention = Attention(8, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (2, 5, 8))
    q, k, v = jnp.split(attention.qkv(x), 3, axis=-1)
    mixed = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[..., part] @ k[..., part].swapaxes(1, 2) / 2.0
        mixed.append(jax.nn.softmax(scores) @ v[..., part])
    wanted = attention.proj(jnp.concatenate(mixed, -1))
    np.testing.assert_allclose(attention(x), wanted, atol=1e-6)


def test_attention_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(UserError, match="heads is 3"):
        Attention(8, 3, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_patches_are_embedded_row_by_row():
    embed = PatchEmbed(2, 4, rngs=nnx.Rngs(0))
    image = jax.random.normal(KEY, (1, 4, 6, 3))
    tokens = embed(image)
    assert tokens.shape == (1, 6, 4)
    second_row_third = jnp.einsum("pqc,pqcd->d", image[0, 2:4, 4:6], embed.kernel.get_value())
    np.testing.assert_allclose(tokens[0, 5], second_row_third, atol=1e-6)


@pytest.mark.parametrize(("size", "patch"), [((30, 32), 16), ((8, 8), 16), ((32, 32), 0)])
def test_images_that_do_not_split_are_refused(size, patch):
    with pytest.raises(UserError, match="patches"):
        grid_of(size, patch)
