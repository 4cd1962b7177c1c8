"""A layer with experts out of an MLP: when it is the MLP, and what routers begin with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn import module, upcycled
from moezoo.nn.batch_routers import ExpertsChooseRouter
from moezoo.nn.context import Context
from moezoo.nn.experts import GatedMLPExperts, MLPExperts
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE
from moezoo.nn.routers import (
    LinearRouter,
    MultiGateRouter,
    TaskEmbeddingRouter,
    TopKRouter,
)
from moezoo.nn.upcycle import carry_over, copied, split
from moezoo.ops.expert import dense as plain_linear
from moezoo.ops.grouped import BACKENDS
from moezoo.ops.routing import SELECTIONS

D, F = 6, 12
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
UNEQUAL = ("softmax_then_top_k", "sigmoid_then_top_k", "smoothed_softmax_then_top_k")


class Holder(nnx.Module):
    """A module with one layer called mlp."""

    def __init__(self, mlp: nnx.Module):
        self.mlp = mlp


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.6 * jax.random.normal(key, shape)


def mlp() -> MLP:
    made = MLP(D, F, init=normal, rngs=nnx.Rngs(0))
    for layer in (made.fc1, made.fc2):
        layer.bias.set_value(normal(jax.random.key(7), layer.bias.get_value().shape))
    return made


def tokens(n: int = 32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (n, D))


def router(experts: int, k: int, selection: str = "softmax_then_top_k_renormalised") -> TopKRouter:
    options: dict[str, Any] = {"select": SELECTIONS[selection], "init": normal}
    return LinearRouter(D, experts, k, **options, rngs=nnx.Rngs(2))


def layer_of(groups: int, experts: int, router: Any, whole: bool = True) -> MoE:
    """Experts with F / groups hidden units that begin as the MLP."""
    made = MoE(
        router,
        MLPExperts(experts, D, F // groups, init=normal, rngs=nnx.Rngs(3)),
        BACKENDS["reference"],
    )
    parts = module.split(Holder(made))
    learned = module.flatten(module.split(Holder(mlp())).params)
    carried = carry_over(learned, parts.params, split if groups > 1 else copied)
    assert carried.layers == {"mlp": groups}
    assert carried.fresh == ("mlp/router/kernel",) and not carried.unused
    layer = module.merge(parts.definition, jax.tree.map(jnp.asarray, carried.params), {}).mlp
    if whole and groups > 1:
        kernel = layer.router.kernel
        kernel.set_value(upcycled.whole_copies(kernel.get_value(), groups))
    return layer


@pytest.mark.parametrize(("groups", "experts", "k"), [(1, 4, 2), (2, 8, 4), (4, 4, 4)])
def test_weights_that_add_up_to_1_give_the_mlp(groups: int, experts: int, k: int) -> None:
    layer = layer_of(groups, experts, router(experts, k))
    x_ND = tokens()
    y_ND, record = layer(x_ND)
    np.testing.assert_allclose(y_ND, mlp()(x_ND), **CLOSE)
    # Whole copies are chosen: experts c * G to c * G + G - 1, or none of them.
    chosen_NE = (np.asarray(record.routing.experts_NK)[..., None] == np.arange(experts)).any(1)
    by_copy = chosen_NE.reshape(len(x_ND), experts // groups, groups)
    assert (by_copy.all(-1) == by_copy.any(-1)).all()
    if experts > k:
        assert len(np.unique(chosen_NE, axis=0)) > 1
    assert upcycled.adds_up(layer) and upcycled.takes_whole_copies(layer, groups)


@pytest.mark.parametrize("selection", UNEQUAL)
@pytest.mark.parametrize(("groups", "experts", "k"), [(1, 4, 1), (2, 8, 4)])
def test_rescaled_weights_give_the_mlp(groups: int, experts: int, k: int, selection: str) -> None:
    layer = layer_of(groups, experts, router(experts, k, selection))
    x_ND = tokens()
    before, record = layer(x_ND)
    assert not upcycled.adds_up(layer)
    assert float(jnp.abs(before - mlp()(x_ND)).max()) > 0.05
    total = upcycled.weight_sum(layer)
    assert total is not None
    upcycled.rescale(layer, total)
    y_ND, after = layer(x_ND)
    np.testing.assert_allclose(y_ND, mlp()(x_ND), **CLOSE)
    if groups == 1:  # the same experts: the largest logits stay the largest
        np.testing.assert_array_equal(after.routing.experts_NK, record.routing.experts_NK)


def test_all_experts_of_a_softmax_add_up_to_1_and_rescaling_is_of_no_use() -> None:
    layer = layer_of(1, 4, router(4, 4, "softmax_then_top_k"))
    assert upcycled.adds_up(layer)
    np.testing.assert_allclose(layer(tokens()).y_ND, mlp()(tokens()), **CLOSE)


def test_other_routers_give_the_mlp_in_the_mean_only() -> None:
    """K = 3 of 2 parts: a token misses some; the mean over all experts is the MLP."""
    layer = layer_of(2, 8, router(8, 3), whole=False)
    assert not upcycled.takes_whole_copies(layer, 2)
    x_ND = tokens()
    assert float(jnp.abs(layer(x_ND).y_ND - mlp()(x_ND)).max()) > 0.05
    everyone = layer_of(2, 8, router(8, 8), whole=False)
    kernel = everyone.router.kernel  # type: ignore[attr-defined]
    kernel.set_value(jnp.zeros_like(kernel.get_value()))
    np.testing.assert_allclose(everyone(x_ND).y_ND, mlp()(x_ND), **CLOSE)


def test_which_sizes_can_be_split() -> None:
    dense = {"a/mlp/fc1/kernel": (6, 12), "a/mlp/fc1/bias": (12,), "a/mlp/fc2/kernel": (12, 6)}

    def found(experts: int, hidden: int, width: int = 6) -> dict[str, int]:
        fresh = {
            "a/mlp/experts/fc1/kernel": (experts, width, hidden),
            "a/mlp/experts/fc1/bias": (experts, hidden),
            "a/mlp/experts/fc2/kernel": (experts, hidden, width),
            "a/mlp/router/kernel": (width, experts),
        }
        assert copied(dense, fresh) == ({"a/mlp": 1} if (hidden, width) == (12, 6) else {})
        return split(dense, fresh)

    assert found(8, 3) == {"a/mlp": 4} and found(3, 4) == {"a/mlp": 3}
    for experts, hidden, width in ((8, 12, 6), (8, 5, 6), (8, 24, 6), (6, 3, 6), (8, 3, 3)):
        assert not found(experts, hidden, width)
    assert not split({k: v for k, v in dense.items() if "fc2" not in k}, {"a/mlp/experts/x": (4,)})


def test_gated_experts_are_split_too() -> None:
    whole = GatedMLPExperts(1, D, F, init=normal, rngs=nnx.Rngs(0))
    learned = {f"mlp/{k}": v[0] for k, v in module.flatten(module.split(whole).params).items()}
    parts = module.split(MoE(router(6, 3), GatedMLPExperts(6, D, F // 3, rngs=nnx.Rngs(1)), max))
    carried = carry_over(learned, {"mlp": parts.params}, split)
    assert carried.layers == {"mlp": 3}
    experts = jax.tree.map(jnp.asarray, carried.params["mlp"]["experts"])
    x_ND = tokens()

    def one(params: Any) -> jax.Array:
        return whole.fn(params, x_ND, plain_linear)

    wanted = one(jax.tree.map(lambda a: a[0], whole.stacked()))
    np.testing.assert_allclose(jax.vmap(one)(experts)[3:].mean(0), wanted, **CLOSE)


def test_noise_is_relative_and_of_the_last_experts_only() -> None:
    def noisy(seed: int, count: int = 3, deviation: float = 0.1) -> dict[str, np.ndarray]:
        experts = MLPExperts(4, 40, 60, init=normal, rngs=nnx.Rngs(0))
        upcycled.disturb(experts, deviation, count, jax.random.key(seed))
        return {k: np.asarray(v) for k, v in module.flatten(module.split(experts).params).items()}

    plain, one, same, other = noisy(0, deviation=0.0), noisy(0), noisy(0), noisy(1)
    for path, array in one.items():
        np.testing.assert_array_equal(array, same[path])
        np.testing.assert_array_equal(array[0], plain[path][0])
        if path.endswith("bias"):
            np.testing.assert_array_equal(array, plain[path])
            continue
        assert np.abs(array - other[path])[1:].max() > 0
        noise = array - plain[path]
        np.testing.assert_allclose(
            noise[1:].std((1, 2)) / plain[path][1:].std((1, 2)), 0.1, rtol=0.1
        )
        assert np.abs(noise[1] - noise[2]).max() > 0
    assert np.abs(one["fc1/kernel"][3, :40, :40] - one["fc2/kernel"][3, :40, :40]).max() > 0


@pytest.mark.parametrize("groups", [1, 2])
def test_a_token_goes_first_to_the_expert_of_its_cluster(groups: int) -> None:
    rng = np.random.default_rng(0)
    own_N = rng.integers(4, size=200)
    mean_D = rng.normal(size=D)  # what all tokens share must not decide
    x_ND = (np.eye(D)[own_N] * 2 + mean_D + 0.1 * rng.normal(size=(200, D))).astype(np.float32)
    kernel_DE = upcycled.kernel_of(x_ND, 4 * groups, groups, np.random.default_rng(5))
    again_DE = upcycled.kernel_of(x_ND, 4 * groups, groups, np.random.default_rng(5))
    np.testing.assert_array_equal(kernel_DE, again_DE)
    logits_NE = x_ND @ kernel_DE
    np.testing.assert_allclose(logits_NE.std(), 1.0, rtol=1e-3)
    assert (kernel_DE[:, ::groups] == kernel_DE[:, groups - 1 :: groups]).all()
    first_N = (logits_NE[:, ::groups]).argmax(1)
    pairs = {(int(a), int(b)) for a, b in zip(own_N, first_N, strict=True)}
    assert len(pairs) == 4 == len({b for _, b in pairs})


def test_rows_of_a_task_stay_and_every_task_gets_its_own() -> None:
    embedded = TaskEmbeddingRouter(D, 3, 4, 2, init=normal, rngs=nnx.Rngs(0))
    before = embedded.kernel.get_value()
    kernel_DE = jnp.ones((D, 4))
    upcycled.set_kernel(embedded, kernel_DE)
    np.testing.assert_array_equal(embedded.kernel.get_value()[:D], kernel_DE)
    np.testing.assert_array_equal(embedded.kernel.get_value()[D:], before[D:])
    gates = MultiGateRouter(2, D, 4, 2, rngs=nnx.Rngs(0))
    upcycled.set_kernel(gates, jnp.stack([kernel_DE, 2 * kernel_DE]))
    np.testing.assert_array_equal(gates.kernel.get_value()[1], 2 * kernel_DE)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_dense_pass_gives_the_mlp_and_shows_what_enters(groups: int) -> None:
    """Whatever the router's weights would make of it."""
    layer = layer_of(groups, 6, router(6, 2, "softmax_then_top_k"), whole=False)
    x_ND, seen_ND = tokens(), tokens() + 1
    shown = upcycled.DensePass(limit=16)
    shown.watch(layer, "there", groups)
    context = Context(jnp.array([0, 1, 2, 3]))
    y_ND, record = layer(x_ND, context, router_input_ND=seen_ND)
    np.testing.assert_allclose(y_ND, mlp()(x_ND), **CLOSE)
    x, task_N = shown.seen["there"]
    np.testing.assert_array_equal(x, seen_ND[::2])
    np.testing.assert_array_equal(task_N, np.repeat(np.arange(4), 4))
    assert int(record.dropped) == 0 and record.routing.experts_NK.shape == (32, 2)


def test_experts_that_choose_have_no_sum_of_weights() -> None:
    layer = layer_of(1, 4, ExpertsChooseRouter(D, 4, 8, rngs=nnx.Rngs(0)))
    assert upcycled.weight_sum(layer) is None and upcycled.sees_tokens(layer)
    assert not upcycled.sees_tokens(mlp())
