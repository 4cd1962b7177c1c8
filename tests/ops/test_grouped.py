"""Every backend under every selection against the slow oracle, in value and gradient."""

from __future__ import annotations

from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import UserError
from moezoo.ops import grouped
from moezoo.ops.routing import SELECTIONS, Routing
from tests.ops import oracle
from tests.ops.cases import (
    LOSSLESS,
    SHAPES,
    Problem,
    Shape,
    arrays,
    assert_trees_close,
    mlp,
    problem,
    router,
    runner,
)

seeds = st.integers(0, 2**31 - 1)
shapes = st.sampled_from(SHAPES)
selections = st.sampled_from(sorted(SELECTIONS))


def run(name: str, p: Problem, routing: Routing, cotangent_ND: np.ndarray):
    return runner(name)(arrays(p.params), arrays(p.x_ND), routing, arrays(cotangent_ND))


def by_oracle(select: str, p: Problem, k: int) -> np.ndarray:
    chosen = [
        oracle.choose(select, logits, k) if real else {}
        for logits, real in zip(p.logits_NE, p.mask_N, strict=True)
    ]
    return oracle.layer(p.params, p.x_ND, chosen)


@pytest.mark.parametrize("select", list(SELECTIONS))
@given(shape=shapes, seed=seeds)
def test_values_and_gradients(select: str, shape: Shape, seed: int) -> None:
    p = problem(shape, seed, padded=0.2)
    routing = router(select, shape.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    cotangent_ND = np.random.default_rng(seed).normal(size=p.x_ND.shape)
    expected_ND = by_oracle(select, p, shape.k)
    truth = run("reference", p, routing, cotangent_ND)
    for name in LOSSLESS:
        done = run(name, p, routing, cotangent_ND)
        assert_trees_close(done.y_ND, expected_ND, atol=1e-4)
        assert_trees_close(done[2:], truth[2:], rtol=1e-3, atol=1e-4)
        assert int(done.dropped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("select", list(SELECTIONS))
def test_gradients_against_finite_differences(select: str) -> None:
    shape = SHAPES[-1]
    p = problem(shape, seed=3)
    rng = np.random.default_rng(4)
    cotangent_ND = rng.normal(size=p.x_ND.shape)
    step = jax.tree.map(lambda a: rng.normal(size=a.shape), p)._replace(mask_N=p.mask_N)

    def moved(h: float) -> float:
        near = jax.tree.map(lambda a, s: a + h * s, p._replace(mask_N=0), step._replace(mask_N=0))
        y_ND = by_oracle(select, near._replace(mask_N=p.mask_N), shape.k)
        return float(np.sum(y_ND * cotangent_ND))

    @jax.jit
    def loss(params, x_ND, logits_NE):
        routing = router(select, shape.k)(logits_NE, jnp.asarray(p.mask_N))
        y_ND = grouped.blocks(mlp, params, x_ND, routing).y_ND
        return jnp.sum(y_ND * arrays(cotangent_ND))

    slopes = jax.grad(loss, (0, 1, 2))(*arrays((p.params, p.x_ND, p.logits_NE)))
    along = (step.params, step.x_ND, step.logits_NE)
    slope = sum(
        float(np.sum(np.asarray(a, np.float64) * b))
        for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(along), strict=True)
    )
    h = 1e-6
    assert slope == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=2e-4)


@given(seed=seeds, select=selections)
def test_permuting_tokens_or_experts(seed: int, select: str) -> None:
    shape = SHAPES[-1]
    p = problem(shape, seed)
    rng = np.random.default_rng(seed)
    tokens, experts = rng.permutation(shape.n), rng.permutation(shape.e)
    route = router(select, shape.k)
    mask_N, cotangent_ND = jnp.asarray(p.mask_N), np.ones_like(p.x_ND)
    plain = route(arrays(p.logits_NE), mask_N)
    by_token = route(arrays(p.logits_NE[tokens]), mask_N)
    by_expert = route(arrays(p.logits_NE[:, experts]), mask_N)
    moved = p._replace(params=jax.tree.map(lambda a: a[experts], p.params))
    for name in LOSSLESS:
        base = run(name, p, plain, cotangent_ND)
        shuffled = run(name, p._replace(x_ND=p.x_ND[tokens]), by_token, cotangent_ND)
        assert_trees_close(shuffled.y_ND, base.y_ND[tokens])
        renamed = run(name, moved, by_expert, cotangent_ND)
        assert_trees_close(renamed.y_ND, base.y_ND)
        old = jax.tree.map(lambda a: a[experts], base.dparams)
        assert_trees_close(renamed.dparams, old, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(LOSSLESS))
@given(seed=seeds, select=selections)
def test_padded_tokens_have_no_influence(name: str, seed: int, select: str) -> None:
    shape = SHAPES[-1]
    p = problem(shape, seed, padded=0.4)
    route = router(select, shape.k)
    mask_N1 = p.mask_N[:, None]
    cotangent_ND = np.random.default_rng(seed).normal(size=p.x_ND.shape)
    spoiled = p._replace(x_ND=np.where(mask_N1, p.x_ND, np.nan))
    spoiled_logits = np.where(mask_N1, p.logits_NE, np.nan)
    clean = run(name, p, route(arrays(p.logits_NE), p.mask_N), cotangent_ND)
    dirty = run(name, spoiled, route(arrays(spoiled_logits), p.mask_N), cotangent_ND)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(dirty.y_ND[~p.mask_N], 0.0)
    np.testing.assert_array_equal(dirty.dx_ND[~p.mask_N], 0.0)


def routing_of(experts_NK: np.ndarray, e: int, seed: int = 0) -> Routing:
    """A routing with the given experts and random weights."""
    n = experts_NK.shape[0]
    weights_NK = np.random.default_rng(seed).random(experts_NK.shape).astype(np.float32)
    zeros_NE = jnp.zeros((n, e))
    return Routing(
        experts_NK=jnp.asarray(experts_NK, jnp.int32),
        weights_NK=jnp.asarray(np.where(experts_NK < 0, 0.0, weights_NK)),
        probs_NE=zeros_NE,
        logits_NE=zeros_NE,
        noisy_NE=zeros_NE,
        noise_scale_NE=zeros_NE,
        mask_N=jnp.asarray((experts_NK >= 0).any(axis=1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "batched_blocks"])
@pytest.mark.parametrize(
    "sizes",
    [[0, 1, 15, 16, 17, 31, 0], [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 0, 400, 160]]
    + [[129, 0, 127, 128, 255, 256, 257, 384, 385, 1000], [511, 0, 512, 513, 255, 1400]],
    ids=["32", "64", "256", "512"],
)
def test_group_sizes_around_the_block_sizes(name: str, sizes: list[int]) -> None:
    experts_N1 = np.repeat(np.arange(len(sizes)), sizes)[:, None]
    experts_N1 = np.concatenate([experts_N1, np.full((5, 1), -1)])
    experts_N1 = np.random.default_rng(0).permutation(experts_N1)
    shape = Shape(len(experts_N1), len(sizes), 1, 3, 2)
    p = problem(shape, seed=1)
    routing = routing_of(experts_N1, shape.e)
    cotangent_ND = np.random.default_rng(2).normal(size=p.x_ND.shape)
    truth = run("reference", p, routing, cotangent_ND)
    done = run(name, p, routing, cotangent_ND)
    assert_trees_close(done, truth, rtol=1e-3, atol=2e-4)
    empty = np.asarray(sizes) == 0
    for leaf in jax.tree.leaves(done.dparams):
        np.testing.assert_array_equal(leaf[empty], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LOSSLESS))
def test_bfloat16_stays_close(name: str) -> None:
    shape = SHAPES[-1]
    p = problem(shape, seed=5)
    routing = router("softmax_then_top_k", shape.k)(arrays(p.logits_NE), p.mask_N)
    params, x_ND = arrays((p.params, p.x_ND), jnp.bfloat16)
    done = runner(name)(params, x_ND, routing, jnp.ones(p.x_ND.shape))
    truth = run("reference", p, routing, np.ones(p.x_ND.shape))
    assert done.y_ND.dtype == done.dx_ND.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(done.dparams)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda a: np.asarray(a, np.float32), done)
    assert_trees_close(wide, truth, rtol=0.1, atol=0.15)


def test_other_platforms_take_the_batched_form(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[-1]
    p = problem(shape, seed=6)
    routing = router("softmax_then_top_k", shape.k)(arrays(p.logits_NE), p.mask_N)

    def loss(params, x_ND):
        return jnp.sum(jnp.sin(grouped.blocks(mlp, params, x_ND, routing).y_ND))

    args = arrays((p.params, p.x_ND))
    loop = jax.jit(jax.value_and_grad(loss, (0, 1)))(*args)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*args)
    assert "while" not in str(program.jaxpr)
    assert_trees_close(program.lower().compile()(*args), loop, rtol=1e-3)


def test_auto_names_its_choice_once(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(grouped, "_announced", set())
    monkeypatch.setattr(grouped, "_heard", Event())
    shape = SHAPES[-1]
    p = problem(shape, seed=7)
    routing = router("softmax_then_top_k", shape.k)(arrays(p.logits_NE), p.mask_N)
    grouped.auto(mlp, arrays(p.params), arrays(p.x_ND), routing)
    assert capsys.readouterr().err == "", "nobody has asked"
    grouped.speak_of_choices()
    for _ in range(2):
        y_ND = grouped.auto(mlp, arrays(p.params), arrays(p.x_ND), routing).y_ND
    assert_trees_close(y_ND, by_oracle("softmax_then_top_k", p, shape.k), atol=1e-4)
    assert capsys.readouterr().err == "moezoo: dispatch blocks (cpu)\n"


def test_backends_by_name() -> None:
    assert {"reference", "capacity", "blocks", "ragged", "auto"} <= grouped.BACKENDS.keys()
    assert grouped.by_name("blocks") is grouped.blocks
    with pytest.raises(UserError, match="blokcs.*blocks"):
        grouped.by_name("blokcs")
