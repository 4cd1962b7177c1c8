"""Routers that choose inside groups of experts, against loops over tokens, groups and experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.context import NO_TASK
from moezoo.nn.group_router import ExpertGroups, GroupRouter, GroupRouting
from moezoo.ops.selection import (
    SELECTIONS,
    Selection,
    best_groups,
    sigmoid_then_top_k_renormalised,
    softmax,
)

N, D, E, K = 7, 5, 6, 2
X = jax.random.normal(jax.random.key(0), (N, D))
V3 = GroupRouting(sigmoid_then_top_k_renormalised, jax.nn.sigmoid, ExpertGroups(3, 2, 2), 2.5)
FORMS: dict[str, GroupRouting] = {
    "v3": V3,
    "v3_one_group": GroupRouting(
        sigmoid_then_top_k_renormalised, jax.nn.sigmoid, ExpertGroups(), 2.5
    ),
    "v3_not_normalised": GroupRouting(
        SELECTIONS["sigmoid_then_top_k"], jax.nn.sigmoid, ExpertGroups(2, 1, 2)
    ),
    "v2": GroupRouting(SELECTIONS["softmax_then_top_k"], softmax, ExpertGroups(3, 1, 1), 0.5),
}  # fmt: skip


def router(routing: GroupRouting, biased: bool) -> GroupRouter:
    made = GroupRouter(D, E, K, routing, biased=biased, rngs=nnx.Rngs(0))
    made.kernel.set_value(jax.random.normal(jax.random.key(1), (D, E)))
    if made.bias is not None:
        made.bias.set_value(0.4 * jax.random.normal(jax.random.key(2), (E,)))
    return made


def by_hand(made: GroupRouter, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights of every token."""
    routing = made.routing
    bias = np.zeros(E) if made.bias is None else np.asarray(made.bias.get_value())
    groups, size = routing.groups, E // routing.groups.count
    experts, weights = [], []
    for x in np.asarray(X, np.float64):
        logits = x @ np.asarray(made.kernel.get_value(), np.float64)
        score = np.exp(logits) / np.exp(logits).sum() if form == "v2" else 1 / (1 + np.exp(-logits))
        worth = []
        for g in range(groups.count):
            inside = sorted((score + bias)[g * size : (g + 1) * size], reverse=True)
            worth.append(sum(inside[: groups.best]))
        best = sorted(range(groups.count), key=lambda g: -worth[g])[: groups.kept]
        allowed = [e for e in range(E) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -(score + bias)[e])[:K]
        whole = sum(score[e] for e in chosen) if "normalised" not in form and form != "v2" else 1.0
        experts.append(chosen)
        weights.append([routing.factor * score[e] / whole for e in chosen])
    return np.array(experts), np.array(weights)


@pytest.mark.parametrize("form", FORMS)
def test_choice_and_weights(form: str) -> None:
    made = router(FORMS[form], biased=form != "v2")
    found = made(X, NO_TASK)
    experts, weights = by_hand(made, form)
    np.testing.assert_array_equal(found.experts_NK, experts)
    np.testing.assert_allclose(found.weights_NK, weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.probs_NE.sum(-1), 1, rtol=1e-5)


def test_a_bias_moves_the_choice_and_no_gradient_reaches_it() -> None:
    made = router(V3, biased=True)
    plain = router(V3, biased=False)
    assert (made(X, NO_TASK).experts_NK != plain(X, NO_TASK).experts_NK).any()

    parts = module.split(made)

    def loss(params):
        routing = module.merge(parts.definition, params, parts.stats)(X, NO_TASK)
        return jnp.sum(jnp.sin(routing.weights_NK))

    slopes = jax.grad(loss)(parts.params)
    assert not slopes["bias"].any() and np.abs(slopes["kernel"]).max() > 0.01


def test_among_is_the_router_with_fewer_columns() -> None:
    form = GroupRouting(V3.base, V3.score, ExpertGroups(), V3.factor)
    whole, kept = router(form, biased=True), (0, 2, 3, 5)
    fewer = GroupRouter(D, len(kept), K, form, biased=True, rngs=nnx.Rngs(0))
    fewer.kernel.set_value(whole.kernel.get_value()[:, jnp.array(kept)])
    assert whole.bias is not None and fewer.bias is not None
    fewer.bias.set_value(whole.bias.get_value()[jnp.array(kept)])
    found, wanted = whole.among(whole(X, NO_TASK), kept), fewer(X, NO_TASK)
    np.testing.assert_array_equal(found.experts_NK, wanted.experts_NK)
    np.testing.assert_allclose(found.weights_NK, wanted.weights_NK, rtol=1e-5)
    with pytest.raises(UserError, match="experts stand in 3 groups of equal size"):
        made = router(V3, biased=True)
        made.among(made(X, NO_TASK), kept)


def test_best_groups() -> None:
    scores = jnp.asarray([[0.9, 0.0, 0.5, 0.5, 0.3, 0.3]])
    one, two = (best_groups(scores, 3, 1, best)[0].tolist() for best in (1, 2))
    assert one == [True, True, False, False, False, False]
    assert two == [False, False, True, True, False, False]
    assert isinstance(V3.selection(None), Selection)
