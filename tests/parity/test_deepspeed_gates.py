"""DeepSpeed's gates: sampled choices, random token selection, both drop policies, the loss."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.ops import balance
from moezoo.ops.capacity import (
    Priority,
    Reweigh,
    as_chosen,
    by_lot,
    by_position,
    by_position_across_ranks,
    by_probability_across_ranks,
    capacity,
    capacity_slots,
    expert_capacity,
    renormalised_after_dropping,
)
from moezoo.ops.routing import Routing, route
from moezoo.ops.selection import Choose, Selection, pick, sampled_after, softmax_weights, top_k
from tests.fixtures import load
from tests.parity.vmoe import close, scaled


class Gate(NamedTuple):
    """What one gate of the file is made of here."""

    k: int
    choose: Choose
    priority: Priority
    reweigh: Reweigh


class Gated(NamedTuple):
    """A gate's decision, what it kept, [N, E], and its weights after dropping, [N, E]."""

    routing: Routing
    kept_NE: Array
    weights_NE: Array
    slots: int


def gated(z: dict[str, np.ndarray], factor: float, gate: Gate) -> Gated:
    logits_NE = jnp.asarray(z["logits"])
    n, e = logits_NE.shape
    slots = expert_capacity(n * gate.k, e, factor, minimum=1)

    @jax.jit
    def run(logits_NE: Array) -> Gated:
        routing = route(logits_NE, k=gate.k, select=Selection(softmax_weights, gate.choose))
        routing = routing._replace(lot_NK=pick(jnp.asarray(z["uniform"]), routing.experts_NK))
        plan = capacity_slots(routing, e, slots, gate.priority)
        kept_NK = plan.slot_NK >= 0
        weights_NK = gate.reweigh(routing.weights_NK, kept_NK)
        at_NKE = (routing.experts_NK[..., None] == jnp.arange(e)) & kept_NK[..., None]
        weights_NE = jnp.sum(jnp.where(at_NKE, weights_NK[..., None], 0.0), axis=1)
        return Gated(routing, at_NKE.any(axis=1), weights_NE, slots)

    return run(logits_NE)._replace(slots=slots)


def check(z: dict[str, np.ndarray], name: str, factor: float, gate: Gate) -> Gated:
    """Which choices are kept, exactly, their weights, and what a layer of the same kind gives."""
    done, combine_NEC = gated(z, factor, gate), z[f"{name}_combine"]
    assert done.slots == combine_NEC.shape[2], name
    np.testing.assert_array_equal(done.kept_NE, combine_NEC.sum(axis=2) > 0, err_msg=name)
    close(done.weights_NE, combine_NEC.sum(axis=2))
    n, e = done.kept_NE.shape
    x_ND, params_E = jnp.linspace(-1.0, 1.0, 3 * n).reshape(n, 3), jnp.arange(e, dtype=jnp.float32)
    backend = capacity(factor, minimum=1, priority=gate.priority, reweigh=gate.reweigh)
    applied = backend(scaled, params_E, x_ND, done.routing)
    y_END = (
        np.asarray(x_ND) * (np.arange(e) + 1.0)[:, None, None] + 0.1 * np.arange(e)[:, None, None]
    )
    close(applied.y_ND, np.einsum("nec,end->nd", combine_NEC, y_END))
    assert int(applied.dropped) == n * gate.k - (combine_NEC.sum(axis=2) > 0).sum()
    return done


def names(z: dict[str, np.ndarray], pattern: str) -> list[re.Match[str]]:
    """The gates whose combine weights are in the file."""
    found = [m for key in z if (m := re.fullmatch(f"({pattern})_combine", key))]
    assert found, pattern
    return found


def sampling(z: dict[str, np.ndarray], best: int) -> Choose:
    return sampled_after(best, jnp.asarray(z["gumbel"]))


def test_top_1_with_random_token_selection() -> None:
    z = load("recsys_and_misc", "deepspeed_gates")
    for found in names(z, r"top1_cf([\d.]+)_rts1_(None|RSample)"):
        name, factor, policy = found.groups()
        choose = sampling(z, 0) if policy == "RSample" else top_k
        done = check(z, name, float(factor), Gate(1, choose, by_lot, as_chosen))
        counts_E = balance.choice_counts(done.routing)
        np.testing.assert_array_equal(counts_E, z[f"{name}_exp_counts"])
        close(balance.switch_loss(done.routing), z[f"{name}_l_aux"])


def test_top_1_without_it() -> None:
    """Ties decide in the reference which tokens survive: how many, and with what weight, agrees."""
    z = load("recsys_and_misc", "deepspeed_gates")
    for found in names(z, r"top1_cf([\d.]+)_rts0_(None|RSample)"):
        name, factor, policy = found.groups()
        choose = sampling(z, 0) if policy == "RSample" else top_k
        done = gated(z, float(factor), Gate(1, choose, by_position, as_chosen))
        combine_NE = z[f"{name}_combine"].sum(axis=2)
        np.testing.assert_array_equal(done.kept_NE.sum(axis=0), (combine_NE > 0).sum(axis=0))
        close(combine_NE, np.where(combine_NE > 0, done.routing.probs_NE, 0.0))
        counts_E = balance.choice_counts(done.routing)
        np.testing.assert_array_equal(counts_E, z[f"{name}_exp_counts"])
        close(balance.switch_loss(done.routing), z[f"{name}_l_aux"])


def test_top_2() -> None:
    z = load("recsys_and_misc", "deepspeed_gates")
    for found in names(z, r"top2_cf([\d.]+)(_nosample)?"):
        name, factor, nosample = found.groups()
        choose = top_k if nosample else sampling(z, 1)
        gate = Gate(2, choose, by_position, renormalised_after_dropping)
        done = check(z, name, float(factor), gate)
        close(balance.switch_loss(done.routing), z[f"top2_cf{factor}_l_aux"])


def test_top_k_and_its_drop_policies() -> None:
    z = load("recsys_and_misc", "deepspeed_gates")
    policies = {"probs": by_probability_across_ranks, "position": by_position_across_ranks}
    for found in names(z, r"topk(\d+)_cf([\d.]+)_(probs|position)"):
        name, k, factor, policy = found.groups()
        gate = Gate(int(k), top_k, policies[policy], renormalised_after_dropping)
        done = check(z, name, float(factor), gate)
        close(balance.switch_loss_of_choices(done.routing), z[f"{name}_l_aux"])
