"""Groups of tokens and members of an ensemble are worlds of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.ops import balance, groups
from moezoo.ops.blocks import blocks
from moezoo.ops.capacity import capacity
from moezoo.ops.routing import constant_noise, experts_choose, route
from tests.ops.cases import Shape, arrays, assert_trees_close, mlp, problem

LAYER, SIZE = Shape(n=12, e=4, k=2, d=3, f=2), 4


def noisy_routing(p):
    return route(arrays(p.logits_NE), k=2, noise=constant_noise(1.0), key=jax.random.key(0))


def parts_of(array):
    return [array[i : i + SIZE] for i in range(0, LAYER.n, SIZE)]


@pytest.mark.slow
def test_capacity_and_losses_of_a_group_are_its_own() -> None:
    p = problem(LAYER, seed=0)
    params, x_ND = arrays((p.params, p.x_ND))
    routing, tight = noisy_routing(p), capacity(slots=1)
    applied = jax.jit(groups.per_group(tight, SIZE), static_argnums=0)(mlp, params, x_ND, routing)
    alone = [
        route(part, k=2, noise=constant_noise(1.0), eps_NE=eps)
        for part, eps in zip(
            parts_of(arrays(p.logits_NE)),
            parts_of((routing.noisy_NE - routing.logits_NE) / routing.noise_scale_NE),
            strict=True,
        )
    ]
    tight = jax.jit(tight, static_argnums=0)
    each = [tight(mlp, params, x, r) for x, r in zip(parts_of(x_ND), alone, strict=True)]
    assert_trees_close(applied.y_ND, np.concatenate([a.y_ND for a in each]))
    assert int(applied.dropped) == sum(int(a.dropped) for a in each) > 0
    for loss in (balance.importance_loss, balance.load_loss):
        mean = jax.jit(groups.mean_over_groups(loss, SIZE))(routing)
        losses = [jax.jit(loss)(r) for r in alone]
        assert float(mean) == pytest.approx(np.mean(losses), rel=1e-4)
    again = groups.out_of_groups(groups.into_groups(routing, SIZE))
    np.testing.assert_array_equal(again.experts_NK, routing.experts_NK)


@pytest.mark.slow
def test_routing_within_groups() -> None:
    p = problem(LAYER, seed=1)

    def choose(logits_NE):
        return experts_choose(logits_NE, slots=2).routing

    together = groups.in_groups(choose, SIZE)(arrays(p.logits_NE))
    each = [choose(part) for part in parts_of(arrays(p.logits_NE))]
    np.testing.assert_array_equal(together.experts_NK, np.concatenate([r.experts_NK for r in each]))
    assert together.noise_scale_NE.shape == (LAYER.n, LAYER.e)


def test_no_group_and_groups_that_do_not_fit() -> None:
    p = problem(LAYER._replace(n=0), seed=2)
    routing = route(arrays(p.logits_NE), k=2)
    applied = groups.per_group(capacity(), SIZE)(mlp, *arrays((p.params, p.x_ND)), routing)
    assert applied.y_ND.shape == (0, LAYER.d)
    assert groups.mean_over_groups(balance.switch_loss, SIZE)(routing) == 0.0
    with pytest.raises(UserError, match="12 tokens.*groups of 5"):
        groups.count_groups(12, 5)


@pytest.mark.parametrize("n", [LAYER.n, 0])
def test_experts_may_give_rows_of_another_width(n: int) -> None:
    p = problem(LAYER._replace(n=n), seed=4)
    params, x_ND = arrays((p.params, p.x_ND))
    routing = route(arrays(p.logits_NE), k=2)

    def wider(params, x_ND, dot):
        y_ND = mlp(params, x_ND, dot)
        return jnp.concatenate([y_ND, 2 * y_ND], axis=-1)

    applied = groups.per_group(blocks, SIZE)(wider, params, x_ND, routing)
    plain = blocks(mlp, params, x_ND, routing).y_ND
    np.testing.assert_allclose(
        applied.y_ND, np.concatenate([plain, 2 * plain], axis=-1), 1e-5, 1e-6
    )


@pytest.mark.slow
def test_members_of_an_ensemble_choose_as_if_they_were_alone() -> None:
    p, members, block = problem(LAYER, seed=3), 2, 2
    support_NE = groups.member_support(LAYER.n, LAYER.e, members)
    routing = route(arrays(p.logits_NE), k=2, support_NE=support_NE)
    divided = groups.by_member(routing, members)
    for m in range(members):
        own = slice(m * block, (m + 1) * block)
        alone = route(arrays(p.logits_NE[m::members, own]), k=2)
        member = jax.tree.map(lambda a, m=m: a[m], divided)
        np.testing.assert_array_equal(member.experts_NK, alone.experts_NK)
        np.testing.assert_array_equal(routing.experts_NK[m::members], alone.experts_NK + m * block)
        assert_trees_close(member.probs_NE, alone.probs_NE)
        assert_trees_close(balance.switch_loss(member), balance.switch_loss(alone))
    with pytest.raises(UserError, match="12 tokens.*5 members"):
        groups.by_member(routing, 5)
    with pytest.raises(UserError, match="4 experts.*3 members"):
        groups.check_members(4, 3, 1)
    with pytest.raises(UserError, match="choose 3 each"):
        groups.check_members(4, 2, 3)


def test_padding_stays_padding() -> None:
    mask_N = jnp.arange(LAYER.n) % 3 > 0
    support_NE = groups.member_support(LAYER.n, LAYER.e, 2)
    routing = route(jnp.zeros((LAYER.n, LAYER.e)), k=1, mask_N=mask_N, support_NE=support_NE)
    divided = groups.by_member(routing, 2)
    np.testing.assert_array_equal(divided.experts_NK[..., 0] < 0, ~divided.mask_N)
