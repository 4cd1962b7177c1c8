"""The formulas of computation reordering give M3ViT's table 4."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from moezoo.deploy.reordering import (
    ZCU104,
    ExpertSizes,
    all_experts_mib,
    layer_seconds,
    reordered_mib,
    token_by_token_seconds,
)

SMALL = ExpertSizes(width=384, hidden=384, experts=16, k=4)
LAYERS, DENSE_MIB = 6, 4.828
# Tokens, and milliseconds of the rows ViT-small, MoE without and with reordering.
PASCAL, NYUD = (1025, 68.931, 637.478, 69.033), (1201, 84.418, 750.557, 84.538)


def test_memory_of_the_table() -> None:
    assert SMALL.expert_parameters == 295_680
    assert reordered_mib(DENSE_MIB, ZCU104, SMALL) == pytest.approx(4.840, abs=1e-3)
    assert all_experts_mib(DENSE_MIB, ZCU104, SMALL) == pytest.approx(11.610, abs=3e-3)


@pytest.mark.parametrize(("tokens", "dense", "cached", "reordered"), [PASCAL, NYUD])
def test_latency_and_energy_of_the_table(
    tokens: int, dense: float, cached: float, reordered: float
) -> None:
    places = tokens * SMALL.k
    queues = [places // 16 + (e < places % 16) for e in range(16)]
    # A dense MLP is K experts wide, and does for every token what its K experts do.
    mlp = ZCU104.compute(SMALL.expert_macs(places))
    layer = layer_seconds(ZCU104, SMALL, queues, hidden_load=mlp)
    assert dense + 1e3 * LAYERS * (layer - mlp) == pytest.approx(reordered, rel=2e-4)
    waited = LAYERS * token_by_token_seconds(ZCU104, SMALL, tokens, cached=4)
    assert dense + 1e3 * waited == pytest.approx(cached, rel=5e-4)
    assert ZCU104.joules(reordered / 1e3) == pytest.approx(
        {69.033: 0.690, 84.538: 0.845}[reordered], abs=1e-3
    )


def test_a_queue_hides_the_next_load_from_48_tokens_on() -> None:
    load = ZCU104.load(SMALL.expert_parameters)
    assert ZCU104.compute(SMALL.expert_macs(48)) < load < ZCU104.compute(SMALL.expert_macs(49))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_the_time_of_a_layer_is_that_of_a_schedule_with_two_slots(queues: list[int]) -> None:
    live = [queue for queue in queues if queue]
    load = ZCU104.load(SMALL.expert_parameters)
    router = ZCU104.route(SMALL.router_macs(sum(live) / SMALL.k))
    # The slow obvious way: a clock for the memory and one for the arithmetic.
    loaded, free, ends = load, router, [0.0]
    for queue in live:
        start = max(loaded, free)
        free = start + ZCU104.compute(SMALL.expert_macs(queue))
        loaded = start + load  # the next slot is free once this expert begins
        ends.append(free)
    wanted = ends[-1] if live else 0.0
    assert layer_seconds(ZCU104, SMALL, queues) == pytest.approx(wanted)
