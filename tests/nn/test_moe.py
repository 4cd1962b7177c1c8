"""Routers, stacked experts and the MoE layer."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.context import NO_TASK, Context, task_of_tokens
from moezoo.nn.experts import MLPExperts, tiny_uniform
from moezoo.nn.exploration import BalancedRouter, SampledRouter
from moezoo.nn.layers import MLP, trunc_normal
from moezoo.nn.moe import MoE
from moezoo.nn.routers import (
    LinearRouter,
    MultiGateRouter,
    NoisyMultiGateRouter,
    NoisyRouter,
    TaskEmbedding,
    TaskEmbeddingRouter,
    wide_uniform,
)
from moezoo.ops import grouped
from moezoo.ops.routing import constant_noise

J, B, T, D, E, K, F = 3, 4, 5, 8, 6, 2, 7
X = jax.random.normal(jax.random.key(0), (B * T, D))
TASK_B = jnp.asarray([2, 0, 1, 0], jnp.int32)
STRONG = partial(trunc_normal, std=1.0)


def routers():
    rngs = nnx.Rngs(0)
    features_JF = jax.random.normal(jax.random.key(7), (J, F))
    return {
        "linear": (LinearRouter(D, E, K, init=STRONG, rngs=rngs), None),
        "multi_gate": (MultiGateRouter(J, D, E, K, init=STRONG, rngs=rngs), None),
        "task_embedding": (TaskEmbeddingRouter(D, F, E, K, init=STRONG, rngs=rngs), features_JF),
        "noisy": (NoisyRouter(D, E, K, init=STRONG, rngs=rngs), None),
        "noisy_multi_gate": (NoisyMultiGateRouter(J, D, E, K, init=STRONG, rngs=rngs), None),
        "sampled": (SampledRouter(D, E, K, best=1, init=STRONG, rngs=rngs), None),
        "balanced": (BalancedRouter(D, E, K, init=STRONG, rngs=rngs), None),
    }


NAMES = list(routers())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_routed_as_their_task_alone_would_be(name):
    router, features_JF = routers()[name]
    together = router(X, Context(TASK_B, features_JF))
    for row, task in enumerate(TASK_B.tolist()):
        tokens = slice(row * T, (row + 1) * T)
        for given in (task, jnp.int32(task)):
            alone = router(X[tokens], Context(given, features_JF))
            np.testing.assert_array_equal(together.experts_NK[tokens], alone.experts_NK)
            np.testing.assert_allclose(together.probs_NE[tokens], alone.probs_NE, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_matter_exactly_where_the_router_says_so(name):
    router, features_JF = routers()[name]
    first, second = (router(X, Context(t, features_JF)).logits_NE for t in (0, 1))
    assert router.depends_on_task == bool(jnp.any(first != second))
    assert router.decision == "token"


@pytest.mark.parametrize("name", NAMES)
def test_routers_compute_in_float32_and_leave_padding_out(name):
    router, features_JF = routers()[name]
    mask_N = jnp.arange(B * T) % 3 > 0
    routing = router(X.astype(jnp.bfloat16), Context(0, features_JF), mask_N=mask_N)
    assert routing.logits_NE.dtype == routing.weights_NK.dtype == jnp.float32
    assert bool((routing.experts_NK[~mask_N] == -1).all())
    assert not routing.weights_NK[~mask_N].any() and not routing.probs_NE[~mask_N].any()


def test_noise_needs_a_key_and_moves_logits_only_with_it():
    router = LinearRouter(D, E, K, noise=constant_noise(6.0), rngs=nnx.Rngs(0))
    quiet, loud = router(X, NO_TASK), router(X, NO_TASK, jax.random.key(1))
    np.testing.assert_array_equal(quiet.noisy_NE, quiet.logits_NE)
    spread = float((loud.noisy_NE - loud.logits_NE).std())
    assert 0.7 < spread < 1.3, "deviation 6 over 6 experts"
    learned = NoisyRouter(D, E, K, rngs=nnx.Rngs(0))(X, NO_TASK, jax.random.key(1))
    np.testing.assert_allclose(learned.noise_scale_NE, np.log(2) + 0.01, rtol=1e-5)


def test_a_task_embedding_router_appends_features_after_the_token():
    router, features_JF = routers()["task_embedding"]
    appended = jnp.concatenate([X, jnp.repeat(features_JF[TASK_B], T, axis=0)], axis=1)
    wanted = appended @ router.kernel.get_value()
    np.testing.assert_allclose(router(X, Context(TASK_B, features_JF)).logits_NE, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="features_JF"):
        router(X, Context(0))


def test_task_embedding_rows_are_normalised_and_differ():
    features_JF = TaskEmbedding(J, 16, rngs=nnx.Rngs(0))()
    assert features_JF.shape == (J, 16)
    np.testing.assert_allclose(features_JF.mean(1), 0, atol=1e-5)
    assert float(jnp.abs(features_JF[0] - features_JF[1]).max()) > 0.1


def test_the_router_of_one_task_is_independent_of_the_others():
    router, _ = routers()["multi_gate"]
    alone = router.of_task(1)
    np.testing.assert_array_equal(alone(X, NO_TASK).experts_NK, router(X, Context(1)).experts_NK)
    assert alone.kernel.get_value().shape == (D, E) and not alone.depends_on_task


def test_gradients_of_a_batch_reach_only_the_routers_of_its_tasks():
    router, _ = routers()["multi_gate"]
    parts = module.split(router)

    def loss(params):
        routing = module.merge(parts.definition, params, parts.stats)(
            X, Context(jnp.asarray([0, 2, 0, 2]))
        )
        return jnp.sum(routing.weights_NK**2)

    gradient = jax.grad(loss)(parts.params)["kernel"]
    assert gradient[0].any() and gradient[2].any() and not gradient[1].any()


def test_initialisations_are_what_their_names_say():
    kernel = LinearRouter(384, 16, 4, init=wide_uniform, rngs=nnx.Rngs(0)).kernel.get_value()
    assert 0.24 < float(jnp.abs(kernel).max()) <= 0.25
    experts = MLPExperts(2, 384, 384, init=tiny_uniform, rngs=nnx.Rngs(0))
    assert 0.0025 < float(jnp.abs(experts.fc1.kernel.get_value()).max()) <= 1 / 384
    fresh = MLPExperts(2, 64, 32, rngs=nnx.Rngs(0)).fc1.kernel.get_value()
    assert 0.016 < float(fresh[0].std()) < 0.019
    assert float(jnp.abs(fresh[0] - fresh[1]).max()) > 0.01, "experts start different"


def layer(e: int = E, k: int = K, backend=grouped.auto) -> MoE:
    rngs = nnx.Rngs(1)
    router = MultiGateRouter(J, D, e, k, init=STRONG, rngs=rngs)
    return MoE(router, MLPExperts(e, D, F, init=STRONG, rngs=rngs), backend)


@pytest.mark.parametrize(("e", "k"), [(E, K), (1, 1), (4, 4)])
def test_moe_is_the_weighted_sum_of_its_experts(e, k):
    moe = layer(e, k)
    y, record = jax.jit(lambda m: m(X, Context(TASK_B)))(moe)
    stacked = moe.experts.stacked()
    hidden = jax.nn.gelu(jnp.einsum("nd,edf->enf", X, stacked["fc1"]["kernel"]), approximate=False)
    outputs = jnp.einsum("enf,efd->end", hidden, stacked["fc2"]["kernel"])
    routing = record.routing
    chosen = np.zeros((B * T, e), np.float32)
    np.put_along_axis(chosen, np.asarray(routing.experts_NK), np.asarray(routing.weights_NK), 1)
    np.testing.assert_allclose(y, np.einsum("ne,end->nd", chosen, outputs), atol=1e-4)
    np.testing.assert_array_equal(record.task_N, jnp.repeat(TASK_B, T))
    assert int(record.dropped) == 0


def test_one_expert_computes_what_a_dense_mlp_with_its_parameters_does():
    experts = layer().experts
    mlp = MLP(D, F, rngs=nnx.Rngs(0))
    for name in ("fc1", "fc2"):
        getattr(mlp, name).kernel.set_value(getattr(experts, name).kernel.get_value()[3])
    own = jax.tree.map(lambda a: a[3], experts.stacked())
    np.testing.assert_allclose(experts.fn(own, X, grouped.dense), mlp(X), atol=1e-5)


def test_padding_gets_zero_and_does_not_touch_the_rest():
    moe, mask_N = layer(), jnp.arange(B * T) < 7
    run = jax.jit(lambda m, x, mask_N: m(x, Context(0), mask_N=mask_N).y_ND)
    y = run(moe, X, mask_N)
    assert not y[7:].any()
    np.testing.assert_allclose(y[:7], run(moe, X[:7], None), atol=1e-5)


def test_taking_experts_takes_their_parameters_in_order():
    experts = layer().experts
    fewer = experts.take([4, 1])
    assert fewer.count == 2 and experts.count == E and fewer.hidden == F
    for path, leaf in module.flatten(module.split(fewer).params).items():
        whole = module.flatten(module.split(experts).params)[path]
        np.testing.assert_array_equal(leaf, whole[jnp.asarray([4, 1])])


def test_experts_without_hidden_units_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        MLPExperts(4, 8, 0, rngs=nnx.Rngs(0))


def test_tasks_of_tokens():
    np.testing.assert_array_equal(task_of_tokens(Context(jnp.asarray([3, 1])), 4), [3, 3, 1, 1])
    np.testing.assert_array_equal(task_of_tokens(Context(2), 3), [2, 2, 2])
