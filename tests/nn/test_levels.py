"""Conditional routing at five levels, and maps that are merged before the product."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.condition_routers import AttributeRouter
from moezoo.nn.conditional import (
    ContextLevel,
    LinearByRow,
    MergedLinear,
    RowLevel,
    Summary,
    TokenLevel,
    decide,
)
from moezoo.nn.context import Context
from moezoo.nn.exploration import POLICIES, ExploringRouter, drawn, policy
from moezoo.nn.layers import trunc_normal
from moezoo.ops import grouped, weight_mixtures
from moezoo.ops.routing import softmax_then_top_k_renormalised, top_k_then_softmax
from moezoo.ops.weight_mixtures import Segments
from tests.fixtures import devices
from tests.models.tiny import quick_jit

B, T, D, E, K, F, A = 3, 5, 4, 6, 2, 7, 8
STRONG = partial(trunc_normal, std=1.0)
X = jax.random.normal(jax.random.key(0), (B, T, D))
ROWS = jnp.asarray([[1, 1, 0, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 1, 0, 1]], jnp.float32)


def mixed_after(x_BTI, kernel_EIO, bias_EO, weights_RE, row_BT) -> jax.Array:
    """The slow oracle: every map on every token, then each token's own mixture."""
    outputs_BTEO = jnp.einsum("bti,eio->bteo", x_BTI, kernel_EIO) + bias_EO
    return jnp.einsum("bteo,bte->bto", outputs_BTEO, weights_RE[row_BT])


def row_of_tokens(where: Segments, batch: int, tokens: int) -> np.ndarray:
    """The row of each token, one after the other."""
    row_BT = np.zeros((batch, tokens), int)
    for b in range(batch):
        for t in range(tokens):
            segment = sum(t >= split for split in where.splits)
            rows = where.rows if where.rows_BS is None else np.asarray(where.rows_BS)[b]
            row_BT[b, t] = rows[segment]
    return row_BT


@st.composite
def problems(draw):
    """Sizes, a place for each token, and a seed."""
    batch, tokens, experts = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
    )
    rows, segments = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    splits = tuple(draw(st.integers(0, tokens)) for _ in range(segments - 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    where = Segments(splits, tuple(int(r) for r in rng.integers(rows, size=segments)))
    if draw(st.booleans()):
        where = Segments(splits, rows_BS=jnp.asarray(rng.integers(rows, size=(batch, segments))))
    shapes = [(batch, tokens, 2), (experts, 2, 3), (experts, 3), (rows, experts)]
    return where, [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


@pytest.mark.slow
@settings(max_examples=8)
@given(problems())
def test_merging_by_segment_is_mixing_after_the_product(problem) -> None:
    where, arrays = problem
    row_BT = row_of_tokens(where, *arrays[0].shape[:2])

    def fast(x, kernel, bias, weights):
        return weight_mixtures.by_segment(
            x, weight_mixtures.merge(kernel, weights), weight_mixtures.merge(bias, weights), where
        )

    def slow(*given):
        return mixed_after(*given, row_BT)

    @quick_jit
    def both(*arrays):
        found = [jax.vjp(form, *arrays) for form in (fast, slow)]
        return [(y, pull(jnp.cos(y))) for y, pull in found]

    for a, b in zip(*map(jax.tree.leaves, both(*arrays)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_places_that_do_not_fit_are_refused() -> None:
    kernel, bias = jnp.zeros((2, D, F)), jnp.zeros((2, F))
    for where, says in [
        (Segments((T + 1,), (0, 1)), "do not cut 5 tokens"),
        (Segments((3, 2), (0, 1, 0)), "ascending"),
        (Segments((2,), (0,)), "2 segments, but rows for 1"),
        (Segments(rows=(2,)), "rows .2,. of 2 mixtures"),
    ]:
        with pytest.raises(ValueError, match=says):
            weight_mixtures.by_segment(X, kernel, bias, where)


def maps(outputs: int = F) -> MergedLinear:
    made = MergedLinear(E, D, outputs, init=STRONG, rngs=nnx.Rngs(0))
    made.bias.set_value(jax.random.normal(jax.random.key(2), (E, outputs)))
    return made


def row_level(**options) -> RowLevel:
    return RowLevel(AttributeRouter(A, 6, E, K, init=STRONG, rngs=nnx.Rngs(1), **options))


def token_level(width: int = D, **options) -> ExploringRouter:
    select = softmax_then_top_k_renormalised
    return ExploringRouter(width, E, K, select=select, init=STRONG, rngs=nnx.Rngs(1), **options)


LEVELS = {
    "rows": row_level,
    "token": lambda: TokenLevel(token_level(), grouped.blocks),
    "context": lambda: ContextLevel(
        token_level(2 * D), grouped.blocks, Summary(D, init=STRONG, rngs=nnx.Rngs(3))
    ),
}
TOLD = Context(attributes_RA=ROWS, where=Segments((2,), (0, 1)))


@pytest.mark.slow
def test_parts_of_the_outputs_and_folded_rows_are_those_of_the_whole() -> None:
    stack, level = maps(), row_level()
    decision = level.decide(X, TOLD)
    whole = decision(level.layer(stack), X)
    for part in (slice(None, 3), slice(3, None)):
        alone = stack(X, decision.weights_RE, TOLD.where, part)
        np.testing.assert_allclose(alone, whole[..., part], rtol=1e-5, atol=1e-6)
    folded = LinearByRow(stack.folds(decision.weights_RE))
    # The same merges and the same products, one after the other: the same bits.
    np.testing.assert_array_equal(folded(X, TOLD.where), whole)
    np.testing.assert_array_equal(decide(None, X, TOLD)(folded, X), whole)


@pytest.mark.parametrize("name", LEVELS)
def test_each_level_is_its_equation_in_value_and_gradient(name: str) -> None:
    """y = sum over the chosen e of g_e(r) E_e(x), r being what the level looks at."""
    level = LEVELS[name]()
    layers = [level.layer(maps()), level.layer(maps(2))]

    @quick_jit
    def run(x_BTD):
        decision = level.decide(x_BTD, TOLD)
        return decision.routing, [decision(layer, x_BTD) for layer in layers]

    routing, y = run(X)
    rows = routing.mask_N.shape[0]
    row_BT = row_of_tokens(TOLD.where, B, T) if name == "rows" else np.arange(B * T).reshape(B, T)
    weights_RE = np.zeros((rows, E), np.float32)
    for row, experts in enumerate(np.asarray(routing.experts_NK)):
        weights_RE[row, experts] = routing.weights_NK[row]
    np.testing.assert_allclose(weights_RE.sum(axis=1), 1.0, rtol=1e-5)
    assert rows == (2 if name == "rows" else B * T)

    def slow(x_BTD, kernel, layer):
        return mixed_after(x_BTD, kernel, layer.experts.bias.get_value(), weights_RE, row_BT)

    for layer, done in zip(layers, y, strict=True):
        kernel = layer.experts.kernel.get_value()
        np.testing.assert_allclose(done, slow(X, kernel, layer), rtol=1e-4, atol=1e-5)
    parts = module.split(layers[0])

    # The gradient through the layer alone: the decision is held.
    def loss(kernel, x_BTD) -> jax.Array:
        params = {"experts": parts.params["experts"] | {"kernel": kernel}}
        layer = module.merge(parts.definition, params, parts.stats)
        return jnp.sum(level.decide(X, TOLD)(layer, x_BTD) ** 2)

    def wanted(kernel, x_BTD) -> jax.Array:
        return jnp.sum(slow(x_BTD, kernel, layers[0]) ** 2)

    found = quick_jit(lambda *a: [jax.grad(f, argnums=(0, 1))(*a) for f in (loss, wanted)])
    kernel = parts.params["experts"]["kernel"]
    for a, b in zip(*map(jax.tree.leaves, found(kernel, X)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_summary_is_a_softmax_over_tokens_and_reads_no_padding() -> None:
    pool = Summary(D, init=STRONG, rngs=nnx.Rngs(3))
    mask_BT = np.arange(T) < np.asarray([[5], [3], [1]])
    spoiled = jnp.where(mask_BT[..., None], X, jnp.nan)
    for b in range(B):
        x_TD = np.asarray(X[b])[mask_BT[b]]
        scores = x_TD @ np.asarray(pool.probe.get_value())[:, 0] / np.sqrt(D)
        share = np.exp(scores - scores.max())
        found = pool(spoiled, jnp.asarray(mask_BT))[b]
        np.testing.assert_allclose(found, share @ x_TD / share.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_context_is_that_of_the_prefix_and_is_remembered() -> None:
    level = LEVELS["context"]()
    told = Context(prefix=2)
    first = level.decide(X, told)
    other = level.decide(X.at[:, 2:].set(0.0), Context(prefix=2))
    two = slice(0, 2)
    for b in range(B):
        np.testing.assert_array_equal(
            first.routing.logits_NE.reshape(B, T, E)[b, two],
            other.routing.logits_NE.reshape(B, T, E)[b, two],
        )
    later = level.decide(X[:, 3:4], replace(told, known=told.summaries))
    np.testing.assert_allclose(
        later.routing.logits_NE, first.routing.logits_NE.reshape(B, T, E)[:, 3], rtol=1e-5
    )
    whole = level.decide(X, Context())
    assert bool((whole.routing.logits_NE != first.routing.logits_NE).any())


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_noise_policies_act_with_a_key_only(name: str) -> None:
    explore, keys = policy(name, 8.0), [jax.random.key(seed) for seed in range(4)]
    for level in (row_level(explore=explore), TokenLevel(token_level(explore=explore), None)):
        quiet, *loud = (level.decide(X, TOLD, key).routing for key in (None, *keys))
        clean = row_level().decide(X, TOLD) if isinstance(level, RowLevel) else None
        if clean is not None:
            np.testing.assert_array_equal(quiet.experts_NK, clean.routing.experts_NK)
        changed = {
            "none": [],
            "vmoe": ["noisy_NE"],
            "rsample": ["experts_NK"],
            "jitter": ["logits_NE"],
        }[name]
        for field in ("logits_NE", "noisy_NE", "experts_NK"):
            found = [np.array_equal(getattr(quiet, field), getattr(one, field)) for one in loud]
            assert all(found) if not changed else (field not in changed or not all(found))
    # Weights of drawn experts are those of the clean softmax.
    if name == "rsample":
        level = row_level(explore=explore)
        found = level.decide(X, TOLD, keys[0]).routing
        probs = np.take_along_axis(np.asarray(found.probs_NE), np.asarray(found.experts_NK), 1)
        np.testing.assert_allclose(
            found.weights_NK, probs / probs.sum(1, keepdims=True), rtol=1e-4, atol=1e-6
        )


def test_rsample_draws_with_its_own_deviation() -> None:
    """Choices are those of the logits plus `std` times Gumbel noise."""
    key, found = jax.random.key(5), []
    for std in (0.0, 0.5, 50.0):
        routing = row_level(explore=policy("rsample", std)).decide(X, TOLD, key).routing
        gumbel = jax.random.gumbel(jax.random.fold_in(key, 2), routing.logits_NE.shape)
        wanted = jnp.argsort(-(routing.logits_NE + std * gumbel), axis=1)[:, :K]
        np.testing.assert_array_equal(routing.experts_NK, wanted)
        found.append(np.asarray(routing.experts_NK))
    assert (found[0] != found[2]).any()


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean vmoe"):
        policy("vmo")
    with pytest.raises(UserError, match="noise_std is -1"):
        policy("vmoe", -1.0)
    with pytest.raises(ValueError, match="Selection"):
        drawn(lambda logits, k: top_k_then_softmax(logits, k), X[0], jax.random.key(0))


@pytest.mark.slow
def test_padding_gets_no_map_where_tokens_decide() -> None:
    level = LEVELS["token"]()
    mask_BT = jnp.asarray(np.arange(T) < np.asarray([[5], [3], [1]]))
    layer = level.layer(maps())
    y = level.decide(X, Context(mask_BT=mask_BT))(layer, X)
    assert not np.asarray(y)[~np.asarray(mask_BT)].any()
    np.testing.assert_allclose(
        np.asarray(y)[np.asarray(mask_BT)],
        np.asarray(level.decide(X, Context())(layer, X))[np.asarray(mask_BT)],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.slow
def test_experts_and_batch_on_several_devices() -> None:
    """Stacks lie over two devices, examples over four: values and gradients are those of one."""
    mesh = Mesh(np.asarray(devices(8)).reshape(4, 2), ("data", "expert"))
    stack, level = maps(), row_level()
    x_BTD = jax.random.normal(jax.random.key(7), (4, T, D))
    routing = level.decide(x_BTD, TOLD)
    weights_RE = routing.weights_RE
    examples = Segments((2,), rows_BS=jnp.asarray([[0, 1], [1, 1], [1, 0], [0, 0]]))

    def both(kernel, bias, x, weights):
        out = []
        for where in (TOLD.where, examples):
            made = weight_mixtures.merge(kernel, weights), weight_mixtures.merge(bias, weights)
            out.append(weight_mixtures.by_segment(x, *made, where))
        return out

    def run(kernel, bias, x):
        y, pull = jax.vjp(lambda *a: both(*a, weights_RE), kernel, bias, x)
        return y, pull([jnp.cos(a) for a in y])

    args = (stack.kernel.get_value(), stack.bias.get_value(), x_BTD)
    alone = jax.jit(run)(*args)
    places = [P("expert"), P("expert"), P("data")]
    spread = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(args, places, strict=True)]
    together = jax.jit(run)(*spread)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
