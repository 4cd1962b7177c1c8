"""Causal grouped-query attention, its cache, padding, packing and adapters' context."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn.causal_attention import Cache, CausalAttention, KeyValues, attend, positions, visible
from moezoo.nn.context import Context, LayerOutput, apply_linear
from moezoo.nn.layers import Linear, RMSNorm, normal
from tests.backbones import decoder_oracle as oracle

B, T, H, G, D = 2, 5, 6, 2, 4
RNG = np.random.default_rng(0)
MASK = np.array([[False, True, True, True, True], [True, True, True, False, False]])
SEGMENTS = np.array([[7, 7, 2, 2, 2], [1, 1, 3, 0, 0]])


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_every_head_attends_to_what_its_token_sees(groups: int) -> None:
    q, k, v = draw(B, T, H, D), draw(B, T, groups, D), draw(B, T, groups, D)
    seen = np.asarray(visible(jnp.asarray(MASK), jnp.asarray(SEGMENTS), B, T))
    found = attend(jnp.asarray(q), KeyValues(jnp.asarray(k), jnp.asarray(v)), jnp.asarray(seen))
    assert np.isfinite(found).all()
    for b in range(B):
        for h in range(H):
            shared = h // (H // groups)
            wanted = oracle.attention(q[b, :, h], k[b, :, shared], v[b, :, shared], seen[b])
            mine = np.asarray(found)[b, :, h * D : (h + 1) * D]
            np.testing.assert_allclose(mine[MASK[b]], wanted[MASK[b]], rtol=1e-4, atol=1e-5)


def test_scores_and_softmax_are_float32_in_half_precision() -> None:
    q, k = jnp.full((1, 2, 1, 1), 16.0), jnp.asarray([16.0, 16.0625]).reshape(1, 2, 1, 1)
    v = jnp.asarray([0.0, 1.0]).reshape(1, 2, 1, 1)
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    found = attend(half[0], KeyValues(half[1], half[2]), visible(None, None, 1, 2))
    # 16.0625 becomes 16 in bfloat16, and both scores are 256: no difference may be made up.
    assert found.dtype == jnp.bfloat16 and float(found[0, 1, 0]) == 0.5
    seen = jnp.ones((1, 2, 2), bool)
    text = str(jax.make_jaxpr(lambda q, k, v: attend(q, KeyValues(k, v), seen))(*half))
    assert "preferred_element_type=float32" in text


def test_visible_and_positions_by_definition() -> None:
    seen = np.asarray(visible(jnp.asarray(MASK), jnp.asarray(SEGMENTS), B, T))
    place = np.asarray(positions(jnp.asarray(MASK), jnp.asarray(SEGMENTS)))
    for b in range(B):
        for t in range(T):
            before = [
                s for s in range(T) if s < t and MASK[b, s] and SEGMENTS[b, s] == SEGMENTS[b, t]
            ]
            own = [t] if MASK[b, t] else []
            assert np.flatnonzero(seen[b, t]).tolist() == before + own
            if MASK[b, t]:
                assert place[b, t] == len(before)


def test_positions_go_on_where_earlier_calls_stopped() -> None:
    found = positions(jnp.asarray(MASK), None, jnp.asarray([3, 0]))
    np.testing.assert_array_equal(found[0, 1:], [3, 4, 5, 6])
    np.testing.assert_array_equal(found[1, :3], [0, 1, 2])


def test_a_cache_counts_tokens_and_shows_those_before() -> None:
    cache = Cache.empty(1, B, 8, (G, D), (G, D), jnp.float32).reserved(jnp.asarray(MASK))
    np.testing.assert_array_equal(cache.lengths_B, MASK.sum(1))
    np.testing.assert_array_equal(
        cache.visible(T)[:, :, :T], visible(jnp.asarray(MASK), None, B, T)
    )
    cache = cache.reserved(jnp.asarray([[True], [False]]))
    assert int(cache.used) == T + 1
    seen = np.asarray(cache.visible(1))
    assert np.flatnonzero(seen[0, 0]).tolist() == [1, 2, 3, 4, 5]
    assert np.flatnonzero(seen[1, 0]).tolist() == [0, 1, 2]
    kv = cache.layers[0].written(
        KeyValues(jnp.ones((B, 1, G, D)), jnp.ones((B, 1, G, D))), cache.used - 1
    )
    np.testing.assert_array_equal(kv.keys_BSGD.sum((0, 2, 3)) > 0, np.arange(8) == T)


def test_groups_must_divide_heads() -> None:
    with pytest.raises(UserError, match="4 heads of keys and values must divide the 6 heads"):
        CausalAttention(8, 6, 4, 2, rngs=nnx.Rngs(0))


def test_rms_norm_works_in_float32() -> None:
    norm = RMSNorm(D, epsilon=1e-3)
    norm.scale.set_value(jnp.asarray(draw(D)))
    x = draw(3, D)
    wanted = [oracle.rms_norm(v, np.asarray(norm.scale.get_value()), 1e-3) for v in x]
    np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, rtol=1e-5)
    # 300 squared is beyond float16.
    large = norm(jnp.full((1, D), 300.0, jnp.float16))
    assert large.dtype == jnp.float16 and np.isfinite(large).all()


def test_linear_without_a_bias_has_no_such_parameter() -> None:
    layer = Linear(3, 2, bias=False, param_dtype=jnp.bfloat16, init=normal, rngs=nnx.Rngs(0))
    assert layer.bias is None and layer.kernel.get_value().dtype == jnp.bfloat16
    kernel = layer.kernel.get_value().astype(jnp.float32)
    np.testing.assert_array_equal(layer(jnp.eye(3)), kernel)


class Asking:
    """An adapter as `apply_linear` sees it."""

    wants_context = True

    def __init__(self, record: Any):
        self.record = record

    def __call__(self, x, context: Context) -> LayerOutput:
        return (
            LayerOutput(context.path, (self.record, context.key)) if self.record else LayerOutput(x)
        )


def test_only_layers_that_ask_are_told_the_context() -> None:
    context = Context(key=jax.random.key(0)).within("layers/3").within("attn")
    assert apply_linear(lambda x: x + 1, 1, context, "q") == 2
    assert apply_linear(Asking(None), 1, context, "k") == 1
    assert context.records == {}
    assert apply_linear(Asking("a"), 1, context, "v") == "layers/3/attn/v"
    apply_linear(Asking("b"), 1, context, "o")
    assert {path: r[0] for path, r in context.records.items()} == {
        "layers/3/attn/v": "a",
        "layers/3/attn/o": "b",
    }
    keys = [jax.random.key_data(r[1]) for r in context.records.values()]
    assert not np.array_equal(*keys)
    again = context.collecting()
    apply_linear(Asking("a"), 1, again, "v")
    assert list(again.records) == ["layers/3/attn/v"]
    np.testing.assert_array_equal(jax.random.key_data(again.records["layers/3/attn/v"][1]), keys[0])
