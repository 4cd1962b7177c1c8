"""cuDNN's attention: by XLA's form of it against plain products, and when it is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import export, symbolic_shape

from moezoo.backbones.ast import ASTConfig
from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.vit import ViTConfig
from moezoo.errors import UserError
from moezoo.nn import causal_attention
from moezoo.nn.attention import attend
from moezoo.nn.causal_attention import KeyValues, visible
from moezoo.nn.latent_attention import LatentConfig
from moezoo.ops.attention import AttentionWay, by_kernel, takes_kernel
from tests.ops.blocked import CARDS, card

B, T, H, G, D = 2, 6, 4, 2, 8


def heads(count: int, seed: int, tokens: int = T, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, tokens, count, D), dtype)


def turned(*arrays: jax.Array) -> list[jax.Array]:
    return [jnp.swapaxes(a, 1, 2) for a in arrays]


def same(ours: Any, theirs: Any, *arrays: jax.Array, real: Any = None) -> None:
    """Value and derivatives of both, of tokens that are `real`."""
    real = jnp.ones((B, arrays[0].shape[1]), bool) if real is None else real
    dy = jax.random.normal(jax.random.key(9), (B, arrays[0].shape[1], H * D)) * real[..., None]

    def pulled(call: Any) -> Any:
        y, pull = jax.vjp(call, *arrays)
        return (y * real[..., None], *pull(dy))

    for mine, right in zip(jax.jit(pulled, static_argnums=0)(ours), pulled(theirs), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
def test_every_token_to_every_token(tokens: int) -> None:
    q, k, v = (heads(H, seed, tokens) for seed in range(3))
    same(by_kernel, lambda *a: attend(*turned(*a), way="plain"), q, k, v)


def test_groups_causes_padding_and_documents() -> None:
    q, k, v = heads(H, 0), heads(G, 1), heads(G, 2)
    mask = jnp.asarray([[False, True, True, True, True, True], [True] * T])
    seen = visible(mask, jnp.asarray([[0, 0, 0, 1, 1, 1], [0] * T]), B, T)

    def plain(q: Any, k: Any, v: Any) -> Any:
        return causal_attention.attend(q, KeyValues(k, v), seen, 0.3)

    same(lambda q, k, v: by_kernel(q, k, v, seen, 0.3), plain, q, k, v, real=mask)
    # Padding that sees nobody gets something finite, and so do the derivatives through it.
    _, pull = jax.vjp(lambda *a: by_kernel(*a, seen), q, k, v)
    assert all(np.isfinite(d).all() for d in pull(jnp.ones((B, T, H * D))))


def test_auto_takes_it_on_an_nvidia_gpu_in_16_bits_where_it_fits() -> None:
    def taken(*given: Any, way: AttentionWay = "auto", **changes: Any) -> bool:
        q, k, v = (jnp.zeros((B, T, H, D), "bfloat16") for _ in range(3))
        return takes_kernel(way, *({"q": q, "k": k, "v": v} | changes).values(), *given)

    wide, odd, narrow = (
        jnp.zeros((B, *n), "bfloat16") for n in ((T, H, 136), (5, H, D), (T, H, 4))
    )
    single = jnp.zeros((B, T, H, D))
    assert not taken() and not taken(way="plain") and taken(way="cudnn")
    with card(CARDS["mosaic_gpu_v2"]):
        assert taken() and not taken(way="plain")
        assert not taken(q=single, k=single, v=single)
        assert not taken(q=wide, k=wide, v=wide) and not taken(v=narrow)
        assert taken(q=odd, k=odd, v=odd) and not taken(
            jnp.ones((B, 5, 5), bool), q=odd, k=odd, v=odd
        )
        assert not taken(q=odd[:, :1])  # one token and a cache
    with card("AMD Instinct MI300X"):
        assert not taken()


def test_what_does_not_fit_is_refused_where_it_was_asked_for() -> None:
    given = "attention is cudnn, but "
    with pytest.raises(UserError, match=given + "its kernel is for bfloat16 and float16"):
        ViTConfig(attention="cudnn")
    with pytest.raises(UserError, match=given + "its heads are 20 wide"):
        ViTConfig(width=40, heads=2, dtype="bfloat16", attention="cudnn")
    with pytest.raises(UserError, match=given + "its kernel is for"):
        ASTConfig(attention="cudnn")
    decoder = DecoderConfig(dtype="bfloat16", attention="cudnn")
    with pytest.raises(UserError, match=given + "latent attention's values"):
        replace(decoder, latent=LatentConfig(rank=8))
    odd, values = jnp.zeros((1, 5, 2, 8), "bfloat16"), jnp.zeros((1, 5, 2, 16), "bfloat16")
    with pytest.raises(UserError, match="needs an even number of tokens"):
        takes_kernel("cudnn", odd, odd, odd, jnp.ones((1, 5, 5), bool))
    with pytest.raises(UserError, match="needs values of the keys' width"):
        takes_kernel("cudnn", odd, odd, values)


def test_an_export_for_any_number_of_rows_has_plain_products() -> None:
    (b,) = symbolic_shape("b")
    rows = [jax.ShapeDtypeStruct((b, H, T, D), "bfloat16")] * 3
    with card(CARDS["mosaic_gpu_v2"]):
        call = jax.jit(lambda *a: attend(*a, way="auto"))
        module = export(call, platforms=["cuda"])(*rows).mlir_module()
    assert "cudnn" not in module


def test_a_bias_keeps_plain_products() -> None:
    q, k, v = turned(*(heads(H, seed, dtype="bfloat16") for seed in range(3)))
    bias = jax.random.normal(jax.random.key(4), (1, H, T, T))
    wanted = attend(q, k, v, bias, way="plain")
    np.testing.assert_array_equal(attend(q, k, v, bias, way="cudnn"), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_itself_on_a_gpu(masked: bool) -> None:
    q, k, v = (heads(n, seed, 64, "bfloat16") for n, seed in ((H, 0), (G, 1), (G, 2)))
    seen = visible(None, None, B, 64) if masked else None
    everyone = jnp.ones((B, 64, 64), bool) if seen is None else seen
    assert takes_kernel("auto", q, k, v, seen)

    def pulled(call: Any, *arrays: Any) -> Any:
        y, pull = jax.vjp(call, *arrays)
        return y, *pull(jnp.ones_like(y))

    found = pulled(lambda *a: by_kernel(*a, seen), q, k, v)
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    wanted = pulled(lambda q, k, v: causal_attention.attend(q, KeyValues(k, v), everyone), *wide)
    for ours, theirs in zip(found, wanted, strict=True):
        off = jnp.abs(ours.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        assert off < 2e-2
