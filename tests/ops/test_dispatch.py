"""Plans: order, slots, and the two gathers that go through them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import UserError
from moezoo.ops import dispatch
from moezoo.ops.capacity import (
    as_chosen,
    by_lot,
    by_position,
    by_position_across_ranks,
    by_probability,
    by_probability_across_ranks,
    capacity,
    expert_capacity,
    renormalised_after_dropping,
)
from moezoo.ops.dispatch import (
    Slots,
    block_slots,
    combine,
    rows_of_choices,
    sort_by_expert,
    sorted_slots,
    spread,
)
from moezoo.ops.routing import draw_lots
from tests.ops import oracle
from tests.ops.cases import Shape as Layer
from tests.ops.cases import arrays, assert_trees_close, mlp, problem, router

seeds = st.integers(0, 2**31 - 1)
N, E, K, BLOCK = 23, 5, 2, 4


def random_experts(seed: int) -> np.ndarray:
    """Distinct experts per token, some rows without any."""
    rng = np.random.default_rng(seed)
    experts_NK = np.argsort(rng.random((N, E)) * rng.random(E), axis=1)[:, :K]
    return np.where(rng.random((N, 1)) < 0.2, -1, experts_NK).astype(np.int32)


def check_slots(plan: Slots, experts_NK: np.ndarray) -> None:
    """Each choice of an expert is in one slot, and that slot says so."""
    choice_S, slot_NK = np.asarray(plan.choice_S), np.asarray(plan.slot_NK)
    np.testing.assert_array_equal(slot_NK >= 0, experts_NK >= 0)
    assert (choice_S >= 0).sum() == (experts_NK >= 0).sum()
    for n, k in np.argwhere(experts_NK >= 0):
        assert choice_S[slot_NK[n, k]] == n * K + k


plans = jax.jit(
    lambda experts_NK: (
        (plan := sort_by_expert(experts_NK, E)),
        rows_of_choices(plan.order),
        sorted_slots(plan, K),
        block_slots(plan, K, BLOCK),
    )
)


@given(seed=seeds)
def test_plans(seed: int) -> None:
    experts_NK = random_experts(seed)
    plan, row, in_rows, in_blocks = plans(experts_NK)
    group = np.where(experts_NK < 0, E, experts_NK).ravel()
    np.testing.assert_array_equal(plan.order, np.argsort(group, kind="stable"))
    np.testing.assert_array_equal(np.asarray(row)[plan.order], np.arange(N * K))
    sizes = np.bincount(group, minlength=E + 1)[:E]
    np.testing.assert_array_equal(plan.end_E, np.cumsum(sizes))
    np.testing.assert_array_equal(plan.end_E - plan.start_E, sizes)
    check_slots(in_rows, experts_NK)
    check_slots(in_blocks.slots, experts_NK)
    choice_PB = np.asarray(in_blocks.slots.choice_S).reshape(-1, BLOCK)
    for expert, choices in zip(in_blocks.expert_P, choice_PB, strict=True):
        assert set(experts_NK.ravel()[choices[choices >= 0]]) <= {int(expert)}


def test_large_keys_are_sorted_another_way_with_the_same_result() -> None:
    experts_NK = random_experts(0)
    group = jnp.where(experts_NK < 0, E, experts_NK).reshape(-1)
    packed = dispatch._stable_order(group, E)
    np.testing.assert_array_equal(dispatch._stable_order(group, 2**31), packed)


@given(seed=seeds)
def test_spread_and_combine_and_their_derivatives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts_NK = random_experts(seed)
    in_blocks = plans(experts_NK)[3].slots
    x_ND, w_NK = arrays((rng.normal(size=(N, 3)), rng.normal(size=(N, K))))
    y_SD, r_SD = arrays(rng.normal(size=(2, *in_blocks.choice_S.shape, 3)))
    spoiled_SD = jnp.where(in_blocks.choice_S[:, None] < 0, jnp.nan, y_SD)
    values, slopes = both_ways(in_blocks, x_ND, spoiled_SD, w_NK, r_SD)

    chosen = experts_NK >= 0
    expected_SD = np.zeros(y_SD.shape)
    sum_ND, dx_ND = np.zeros((N, 3)), np.zeros((N, 3))
    dw_NK, dy_SD = np.zeros((N, K)), np.zeros(y_SD.shape)
    for n, k in np.argwhere(chosen):
        s = int(in_blocks.slot_NK[n, k])
        expected_SD[s] = x_ND[n]
        sum_ND[n] += np.asarray(w_NK[n, k] * y_SD[s])
        dx_ND[n] += np.asarray(r_SD[s])
        dw_NK[n, k] = np.sum(np.asarray(y_SD[s] * x_ND[n]))
        dy_SD[s] = np.asarray(w_NK[n, k] * x_ND[n])
    assert_trees_close(values, (expected_SD, sum_ND))
    assert_trees_close(slopes, (dx_ND, dy_SD, dw_NK))


@jax.jit
def both_ways(plan: Slots, x_ND, y_SD, w_NK, r_SD):
    """Values of `spread` and `combine`; derivatives along r_SD and along x_ND."""
    x_SD, pull_spread = jax.vjp(lambda x: spread(x, plan), x_ND)
    sum_ND, pull_combine = jax.vjp(lambda y, w: combine(y, w, plan), y_SD, w_NK)
    return (x_SD, sum_ND), (pull_spread(r_SD)[0], *pull_combine(x_ND))


LAYER = Layer(n=24, e=4, k=2, d=3, f=2)
# A priority, and a key that sorts (token, rank, weight, lot) in the same way.
PRIORITIES = {
    "position": (by_position, lambda n, rank, first, weight, lot: (rank, n)),
    "probability": (by_probability, lambda n, rank, first, weight, lot: (rank, -first, n)),
    "position_across": (by_position_across_ranks, lambda n, rank, first, weight, lot: (n, rank)),
    "probability_across": (
        by_probability_across_ranks,
        lambda n, rank, first, weight, lot: (-weight, n, rank),
    ),
    "lot": (by_lot, lambda n, rank, first, weight, lot: (-lot, n, rank)),
}


@pytest.mark.parametrize("priority", list(PRIORITIES))
@pytest.mark.parametrize("slots", [1, 5])
def test_capacity_drops_what_does_not_fit(priority: str, slots: int) -> None:
    p = problem(LAYER, seed=slots, padded=0.2)
    p = p._replace(logits_NE=p.logits_NE + [2.0, 0.0, 0.0, 0.0])  # one popular expert
    routing = router("softmax_then_top_k", LAYER.k)(arrays(p.logits_NE), p.mask_N)
    routing = draw_lots(routing, jax.random.key(slots))
    which, key = PRIORITIES[priority]
    chosen = [
        oracle.choose("softmax_then_top_k", logits, LAYER.k) if real else {}
        for logits, real in zip(p.logits_NE, p.mask_N, strict=True)
    ]
    places = [(n, rank) for n in range(LAYER.n) for rank in range(len(chosen[n]))]
    weight = {(n, rank): list(chosen[n].values())[rank] for n, rank in places}
    lot = np.asarray(routing.lot_NK)
    places.sort(key=lambda p: key(*p, weight[p[0], 0], weight[p], lot[p]))
    kept = oracle.keep_by_capacity(chosen, slots, places)
    dropped = sum(len(c) for c in chosen) - sum(len(c) for c in kept)
    assert dropped > 0
    shared = [{e: w / sum(c.values()) for e, w in c.items()} for c in kept]
    for reweigh, left in ((as_chosen, kept), (renormalised_after_dropping, shared)):
        backend = capacity(slots=slots, priority=which, reweigh=reweigh)
        applied = jax.jit(backend, static_argnums=0)(mlp, *arrays((p.params, p.x_ND)), routing)
        assert int(applied.dropped) == dropped
        assert_trees_close(applied.y_ND, oracle.layer(p.params, p.x_ND, left))


def test_without_lots_the_position_decides() -> None:
    p = problem(LAYER, seed=0)
    routing = router("softmax_then_top_k", LAYER.k)(arrays(p.logits_NE), p.mask_N)
    np.testing.assert_array_equal(by_lot(routing), by_position(routing))


def test_capacity_rules() -> None:
    assert expert_capacity(10, 4, 1.0) == 3
    assert expert_capacity(10, 4, 1.0, round) == 2
    assert expert_capacity(10, 4, 1.0, math.ceil, multiple_of=4) == 4
    assert expert_capacity(10, 4, 1.0, minimum=7) == 7
    with pytest.raises(UserError, match="0 slots .10 choices, 4 experts, factor 0.0.*dropless"):
        expert_capacity(10, 4, 0.0)


def test_a_capacity_that_cannot_run_raises() -> None:
    p = problem(LAYER, seed=0)
    routing = router("softmax_then_top_k", LAYER.k)(arrays(p.logits_NE), p.mask_N)
    with pytest.raises(UserError, match="raise the capacity factor"):
        capacity(factor=0.0)(mlp, *arrays((p.params, p.x_ND)), routing)
    with pytest.raises(UserError, match="at least one"):
        capacity(slots=0)
