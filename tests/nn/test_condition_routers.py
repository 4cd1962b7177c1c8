"""Routers by task table and by attributes: one decision per row, whatever the tokens are."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn.condition_routers import AttributeRouter, ConditionRouter, TaskTableRouter
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.exploration import QUIET, Explore, policy
from moezoo.nn.layers import trunc_normal
from moezoo.nn.moe import MoE
from moezoo.ops import grouped

J, A, R, T, D, E, K, F = 4, 5, 3, 4, 6, 7, 2, 8
X = jax.random.normal(jax.random.key(0), (R * T, D))
STRONG = partial(trunc_normal, std=1.0)
CONDITION = Context(
    jnp.asarray([2, 0, 2], jnp.int32),
    attributes_RA=jnp.asarray([[1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [1, 0, 0, 1, 1]], jnp.float32),
)


def routers(explore: Explore = QUIET) -> dict[str, ConditionRouter]:
    rngs = nnx.Rngs(0)
    return {
        "table": TaskTableRouter(J, E, K, explore=explore, init=STRONG, rngs=rngs),
        "attributes": AttributeRouter(A, F, E, K, explore=explore, init=STRONG, rngs=rngs),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table", "attributes"])
def test_tokens_of_equal_conditions_share_their_decision(name: str) -> None:
    router = routers()[name]
    assert router.decision == "task"
    routing = router(X, CONDITION)
    rows = router.decide(CONDITION)
    for row in range(R):
        for token in range(row * T, (row + 1) * T):
            np.testing.assert_array_equal(routing.experts_NK[token], rows.experts_NK[row])
            np.testing.assert_array_equal(routing.weights_NK[token], rows.weights_NK[row])
    np.testing.assert_array_equal(rows.logits_NE[0], rows.logits_NE[2])
    assert bool((rows.logits_NE[0] != rows.logits_NE[1]).any())
    np.testing.assert_allclose(routing.weights_NK.sum(1), 1.0, rtol=1e-6)
    other = router(jnp.full_like(X, jnp.nan), CONDITION)
    np.testing.assert_array_equal(other.experts_NK, routing.experts_NK)


@pytest.mark.parametrize("name", ["table", "attributes"])
def test_noise_is_the_rows_and_padding_gets_nothing(name: str) -> None:
    router = routers(policy("vmoe", 20.0))[name]
    quiet, loud = router(X, CONDITION), router(X, CONDITION, jax.random.key(3))
    assert bool((quiet.noisy_NE != loud.noisy_NE).any())
    per_row = np.asarray(loud.noisy_NE).reshape(R, T, E)
    np.testing.assert_array_equal(per_row, np.broadcast_to(per_row[:, :1], per_row.shape))
    mask_N = jnp.arange(R * T) % 3 > 0
    padded = router(X, CONDITION, mask_N=mask_N)
    assert bool((padded.experts_NK[~mask_N] == -1).all())
    np.testing.assert_array_equal(padded.experts_NK[mask_N], quiet.experts_NK[mask_N])


def test_a_task_for_the_whole_batch_and_one_per_row_agree() -> None:
    router = routers()["table"]
    static, dynamic = (router(X, Context(task)) for task in (2, jnp.int32(2)))
    by_row = router(X, CONDITION)
    np.testing.assert_array_equal(static.experts_NK, dynamic.experts_NK)
    np.testing.assert_array_equal(static.experts_NK[:T], by_row.experts_NK[:T])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table", "attributes"])
def test_a_layer_of_them_is_one_dense_mixture_per_row_and_trains_its_router(name: str) -> None:
    layer = MoE(routers()[name], MLPExperts(E, D, F, init=STRONG, rngs=nnx.Rngs(1)), grouped.blocks)
    oracle = MoE(layer.router, layer.experts, grouped.reference)
    np.testing.assert_allclose(layer(X, CONDITION).y_ND, oracle(X, CONDITION).y_ND, atol=1e-5)
    grads = nnx.grad(lambda layer: jnp.sum(layer(X, CONDITION).y_ND ** 2))(layer)
    assert bool(jnp.abs(grads["router"]["kernel"].get_value()).sum() > 0)


def test_a_missing_condition_and_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="attributes_RA"):
        routers()["attributes"](X, Context(0))
    for attributes in (jnp.ones((R, A + 1)), jnp.ones(A)):
        with pytest.raises(UserError, match="made for rows of 5"):
            routers()["attributes"](X, Context(0, attributes_RA=attributes))
    with pytest.raises(ValueError, match="3 equal rows"):
        routers()["table"](X[:-1], CONDITION)
