"""Low-rank mixtures against a loop over tokens and experts, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo.ops import lowrank
from moezoo.ops import lowrank as lowrank_merge
from moezoo.ops.routing import dense_weights, route, softmax_then_top_k_renormalised
from tests.models.tiny import quick_jit

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def slow(kind: str, x, a, b, gates) -> np.ndarray:
    """Token by token, expert by expert, in float64."""
    experts = gates.shape[1]
    downs = [a] * experts if kind == "one_down" else np.split(a, experts, axis=1)
    ups = np.split(b, experts, axis=0)
    y = np.zeros((len(x), b.shape[1]))
    for n, token in enumerate(x):
        if kind == "by_factor":
            down = sum(g * w for g, w in zip(gates[n], downs, strict=True))
            up = sum(g * w for g, w in zip(gates[n], ups, strict=True))
            y[n] = token @ down @ up
        else:
            for g, down, up in zip(gates[n], downs, ups, strict=True):
                y[n] += g * (token @ down @ up)
    return y


def differentiated(kind: str, x, a, b, gates, cot) -> list[np.ndarray]:
    """Gradients of sum(y * cot) in x, a, b and gates by central differences, float64."""
    args = [np.array(v, np.float64) for v in (x, a, b, gates)]
    found = []
    for place, value in enumerate(args):
        gradient = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [v.copy() for v in args]
                moved[place][index] += step
                sides.append(np.sum(slow(kind, *moved) * cot))
            gradient[index] = (sides[0] - sides[1]) / 2e-5
        found.append(gradient)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["by_block", "by_factor", "one_down"])
@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(0, 4),
    e=st.integers(1, 4),
    rank=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_mixtures_equal_the_loop(kind: str, n: int, e: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, o = 3, 2
    x, b = rng.normal(size=(n, d)), rng.normal(size=(e * rank, o))
    a = rng.normal(size=(d, rank if kind == "one_down" else e * rank))
    gates = rng.random((n, e)) * (rng.random((n, e)) > 0.4)
    cot = rng.normal(size=(n, o))

    def loss(*args):
        y = getattr(lowrank, kind)(*args)
        return jnp.sum(y * cot), y

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, y), grads = run(*(jnp.asarray(v, jnp.float32) for v in (x, a, b, gates)))
    np.testing.assert_allclose(y, slow(kind, x, a, b, gates), **CLOSE)
    wanted = differentiated(kind, x, a, b, gates, cot)
    for gradient, right in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(gradient, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("block", "k"), [(1, 3), (2, 2), (3, 1)])
def test_only_the_chosen_ranks(block: int, k: int) -> None:
    rng = np.random.default_rng(block)
    n, d, o, e = 7, 5, 4, 4
    x, a, b = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((n, d), (d, e * block), (e * block, o))
    )
    logits = jnp.asarray(rng.normal(size=(n, e)), jnp.float32)
    mask_N = jnp.arange(n) != 2

    def loss(kind: str, x, a, b, logits):
        chosen = route(logits, k=k, select=softmax_then_top_k_renormalised, mask_N=mask_N)
        if kind == "gathered":
            y = lowrank.gathered(x, a, b, chosen, block)
        else:
            y = lowrank.by_block(x, a, b, dense_weights(chosen, e))
        return jnp.sum(jnp.sin(y)), y

    both = []
    for kind in ("gathered", "masked"):
        run = jax.value_and_grad(
            lambda *args, kind=kind: loss(kind, *args), argnums=(0, 1, 2, 3), has_aux=True
        )
        both.append(quick_jit(run)(x, a, b, logits))
    ours, masked = both
    np.testing.assert_allclose(ours[0][1], masked[0][1], **CLOSE)
    assert not ours[0][1][2].any(), "padding gets nothing"
    for gradient, right in zip(ours[1], masked[1], strict=True):
        np.testing.assert_allclose(gradient, right, **CLOSE)


@pytest.mark.slow
def test_constant_gates_are_a_matrix() -> None:
    rng = np.random.default_rng(3)
    a, b, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 6), (6, 4), (3, 5)))
    gates = jnp.asarray([0.2, 0.0, 0.8])
    for combine in (lowrank.by_block, lowrank.by_factor):
        matrix = lowrank.delta(a, b, gates, combine)
        wanted = combine(x, a, b, jnp.broadcast_to(gates, (3, 3)))
        np.testing.assert_allclose(x @ matrix, wanted, **CLOSE)
    np.testing.assert_allclose(x @ lowrank.delta(a, b), lowrank.plain(x, a, b), **CLOSE)
    again = lowrank.stacked(*lowrank.unstacked(a, b, 3))
    np.testing.assert_array_equal(again[0], a)
    np.testing.assert_array_equal(again[1], b)


@pytest.mark.slow
def test_joint_updates() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 2, 4))
    weights = np.array([0.5, -1.0, 2.0])
    exact = np.einsum("e,edr,ero->do", weights, a, b)
    down, up = lowrank_merge.concatenated(jnp.asarray(a), jnp.asarray(b), jnp.asarray(weights))
    np.testing.assert_allclose(down @ up, exact, **CLOSE)
    down, up = lowrank_merge.truncated(jnp.asarray(a), jnp.asarray(b), jnp.asarray(weights))
    values = np.linalg.svd(exact, compute_uv=False)
    error = np.linalg.norm(down @ up - exact)
    np.testing.assert_allclose(error, np.linalg.norm(values[2:]), rtol=1e-4)
    whole = lowrank_merge.pruned_sums(jnp.asarray(a), jnp.asarray(b), jnp.asarray(weights), 1.0)
    plain = lowrank_merge.factor_sums(jnp.asarray(a), jnp.asarray(b), jnp.asarray(weights))
    np.testing.assert_allclose(whole[0] @ whole[1], plain[0] @ plain[1], **CLOSE)
