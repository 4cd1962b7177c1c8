"""Every router learns from what its experts give, or is refused when it is made."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.batch_routers import EnsembleRouter, ExpertsChooseRouter
from moezoo.nn.condition_routers import AttributeRouter, TaskTableRouter
from moezoo.nn.context import Context
from moezoo.nn.exploration import BalancedRouter, ExploringRouter, SampledRouter
from moezoo.nn.layers import trunc_normal
from moezoo.nn.lowrank import RankRouter
from moezoo.nn.maps import ConstantRouter, GridRouter, MLPRouter
from moezoo.nn.routers import (
    LinearRouter,
    MultiGateRouter,
    NoisyMultiGateRouter,
    NoisyRouter,
    TaskEmbeddingRouter,
)
from moezoo.ops.routing import SELECTIONS, Routing, dense_weights
from moezoo.ops.selection import ADD_UP, Selection

J, N, D, E, A, F = 2, 6, 8, 4, 3, 5
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (N, D))
GIVEN = Context(
    jnp.asarray([0, 1]),
    features_JF=jax.random.normal(jax.random.key(1), (J, F)),
    attributes_RA=jax.random.normal(jax.random.key(2), (2, A)),
)
STRONG: Any = {"init": partial(trunc_normal, std=1.0), "rngs": nnx.Rngs(0)}
PLAIN: Any = {"rngs": nnx.Rngs(0)}

# What makes each router for k of E experts, with further options.
MAKERS = {
    "linear": lambda k, **o: LinearRouter(D, E, k, **STRONG, **o),
    "multi_gate": lambda k, **o: MultiGateRouter(J, D, E, k, **STRONG, **o),
    "task_embedding": lambda k, **o: TaskEmbeddingRouter(D, F, E, k, **STRONG, **o),
    "noisy": lambda k, **o: NoisyRouter(D, E, k, **STRONG, **o),
    "noisy_multi_gate": lambda k, **o: NoisyMultiGateRouter(J, D, E, k, **STRONG, **o),
    "table": lambda k, **o: TaskTableRouter(J, E, k, **STRONG, **o),
    "attributes": lambda k, **o: AttributeRouter(A, F, E, k, **STRONG, **o),
    "exploring": lambda k, **o: ExploringRouter(D, E, k, **STRONG, **o),
    "mlp": lambda k, **o: MLPRouter(D, F, E, k, **PLAIN, **o),
    "constant": lambda k, **o: ConstantRouter(E, k, **o),
    "grid": lambda k, **o: GridRouter(D, N // 2, E, k, **PLAIN, **o),
    "sampled": lambda k, **o: SampledRouter(D, E, k, best=k - 1, **STRONG, **o),
    "balanced": lambda k, **o: BalancedRouter(D, E, k, **STRONG, **o),
    "ensemble": lambda k, **o: EnsembleRouter(D, 2 * E, k, members=2, **STRONG, **o),
    "rank": lambda k, **o: RankRouter(D, E, k, **STRONG, **o),
}
# Parameters that change nothing, as published: what they add is taken away by the norm behind them.
IDLE = {"grid": ("weigh/bias",)}
OWN = ("sampled", "balanced", "rank")  # the selection is made of parts, or has a name


def routing(router: Any) -> tuple[Routing, Any]:
    """What a router decides in training, and its parameters' gradients."""
    parts = module.split(router)

    def total(params: Any) -> Any:
        made = module.merge(parts.definition, params, parts.stats)
        extra = 0.0
        if isinstance(made, GridRouter):
            grid = made(X.reshape(2, N // 2, 1, D), GIVEN, KEY)
            decided, extra = grid.routing, jnp.sum(grid.mix_B)
        else:
            decided = made(X, GIVEN, KEY)
        experts = decided.logits_NE.shape[1]
        given_NE = jnp.cos(3.0 * jnp.arange(decided.logits_NE.size)).reshape(-1, experts)
        return jnp.sum(dense_weights(decided, experts) * given_NE) + extra, decided

    (_, decided), grads = jax.value_and_grad(total, has_aux=True)(parts.params)
    return decided, grads


@pytest.mark.parametrize("k", [1, E])
@pytest.mark.parametrize("name", MAKERS)
def test_every_router_learns_by_default(name: str, k: int) -> None:
    _, grads = routing(MAKERS[name](k))
    for path, leaf in module.flatten(grads).items():
        assert (jnp.abs(leaf).max() > 1e-4) == (path not in IDLE.get(name, ())), path


@pytest.mark.parametrize("selection", [s for s in SELECTIONS if SELECTIONS[s].weigh in ADD_UP])  # type: ignore[attr-defined]
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in OWN])
def test_one_expert_is_not_weighed_by_what_adds_up(name: str, selection: str) -> None:
    with pytest.raises(UserError, match="would never learn"):
        MAKERS[name](1, select=SELECTIONS[selection])
    MAKERS[name](2, select=SELECTIONS[selection])


@pytest.mark.parametrize("weigh", ADD_UP)
@pytest.mark.parametrize("name", ["sampled", "balanced"])
def test_nor_where_the_choice_is_disturbed(name: str, weigh: Any) -> None:
    with pytest.raises(UserError, match="would never learn"):
        MAKERS[name](1, weigh=weigh)
    drawn = Selection(weigh, choose=lambda logits_NE, k: jnp.zeros((len(logits_NE), k), jnp.int32))
    with pytest.raises(UserError, match="would never learn"):
        LinearRouter(D, E, 1, select=drawn, **STRONG)


@pytest.mark.parametrize("gate", ["published", "unbiased", "softmax"])
def test_nor_by_a_gate_that_adds_up(gate: str) -> None:
    with pytest.raises(UserError, match="would never learn; take gate score"):
        RankRouter(D, E, 1, gate=gate, **STRONG)


def test_choices_without_alternative_are_refused() -> None:
    with pytest.raises(UserError, match="4 members has 1 expert.*nothing to choose"):
        EnsembleRouter(D, 4, 1, members=4, **STRONG)
    for best in (-1, 2):
        with pytest.raises(UserError, match=f"best is {best}"):
            SampledRouter(D, E, 2, best=best, **STRONG)


def test_experts_that_choose_learn() -> None:
    _, grads = routing(ExpertsChooseRouter(D, E, 2, **STRONG))
    assert jnp.abs(grads["kernel"]).max() > 1e-4
