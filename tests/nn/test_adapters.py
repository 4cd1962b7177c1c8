"""Adapters, mixtures of them, and where they are put."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.adapter_mixtures import BiasedRouter, DenseAdapters, SoftAdapters, slot_normal
from moezoo.nn.adapters import (
    STARTS,
    Bottleneck,
    Conformer,
    Convpass,
    TokenConv,
    bottleneck_experts,
)
from moezoo.nn.condition_routers import TaskTableRouter
from moezoo.nn.context import Context
from moezoo.nn.injection import ARRANGEMENTS, Inserted, PerTask
from moezoo.nn.layers import LayerNorm, Linear
from moezoo.nn.moe import MoE
from moezoo.nn.soft import SoftRouter
from moezoo.ops.grouped import reference
from moezoo.ops.selection import softmax_of_all
from tests.models.tiny import filled, quick_jit

B, T, D, E, H = 2, 7, 6, 3, 2
X = jax.random.normal(jax.random.key(0), (B, T, D))
MASK = jnp.arange(T) < jnp.asarray([[T], [4]])


def random(build: Any) -> Any:
    return module.merge(*filled(build))


def called(own: Any, x: Any, context: Context) -> Any:
    return quick_jit(lambda x: own(x, context))(x)


def gradients(adapter: nnx.Module, context: Context) -> tuple[Any, dict[str, Any]]:
    parts = module.split(adapter)

    def loss(params: Any) -> Any:
        own = module.merge(parts.definition, params, parts.stats)
        wants = getattr(own, "wants_context", False)
        y = own(X, context).y if wants else own(X)
        return jnp.sum(y * jnp.arange(D) + y**2), y

    grads, y = quick_jit(jax.grad(loss, has_aux=True))(parts.params)
    return y, module.flatten(grads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Bottleneck, Convpass, Conformer])
def test_a_fresh_adapter_gives_nothing_and_trains(kind: type) -> None:
    y, grads = gradients(kind(D, H, rngs=nnx.Rngs(0)), Context())
    assert not y.any()
    last = "fc2" if kind is Bottleneck else "up"
    assert all(g.any() for path, g in grads.items() if path.startswith(last))
    y, grads = gradients(random(lambda: kind(D, H, rngs=nnx.Rngs(0))), Context())
    # Every parameter takes part, the convolution and the norm as well.
    assert y.any() and all(g.any() for g in grads.values())


def test_written_zeros_train_a_constant_only() -> None:
    start = STARTS["zero_init"]
    _, grads = gradients(Bottleneck(D, H, start=start, rngs=nnx.Rngs(0)), Context())
    assert {path for path, g in grads.items() if g.any()} == {"fc2/bias"}
    start = STARTS["fast_init"]
    y, grads = gradients(Bottleneck(D, H, start=start, rngs=nnx.Rngs(0)), Context())
    assert y.any() and all(g.any() for g in grads.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Convpass, Conformer])
def test_convolutions_do_not_see_padding(kind: type) -> None:
    own = random(lambda: kind(D, 4, rngs=nnx.Rngs(0)))
    other = jnp.where(MASK[..., None], X, -X)  # a norm would take a constant away
    for context, same in ((Context(mask_BT=MASK), True), (Context(), False)):
        found, wanted = called(own, other, context).y, called(own, X, context).y
        assert bool(jnp.allclose(found[MASK], wanted[MASK], atol=1e-6)) == same


@pytest.mark.slow
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_convolution_along_tokens_is_numpys(taps: int) -> None:
    kernel = jax.random.normal(jax.random.key(1), (taps, 1, D))
    found = TokenConv(kernel, groups=D)(X)
    left = (taps - 1) // 2
    for c in range(D):
        for b in range(B):
            whole = np.correlate(np.pad(X[b, :, c], (left, taps - 1 - left)), kernel[:, 0, c])
            np.testing.assert_allclose(found[b, :, c], whole, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    own = random(lambda: Convpass(D, 8, dropout=0.5, rngs=nnx.Rngs(0)))
    key = jax.random.key(0)
    plain = called(own, X, Context()).y
    np.testing.assert_array_equal(called(own, X, Context(key=key)).y, plain)
    assert (called(own, X, Context(train=True, key=key)).y != plain).any()


def dense_mixture(router: Any) -> DenseAdapters:
    return DenseAdapters(router, bottleneck_experts(E, D, H, rngs=nnx.Rngs(0)))


@pytest.mark.slow
def test_dense_mixture_is_the_sum_over_experts() -> None:
    own = random(lambda: dense_mixture(BiasedRouter(D, E, rngs=nnx.Rngs(0))))
    y, record = called(own, X, Context(mask_BT=MASK))
    assert not y[~MASK].any() and not record.routing.weights_NK.reshape(B, T, E)[~MASK].any()
    one_by_one = MoE(own.router, own.experts, reference)
    run = quick_jit(lambda x: one_by_one(x, mask_N=MASK.reshape(-1)).y_ND)
    wanted = run(X.reshape(-1, D))
    np.testing.assert_allclose(y.reshape(-1, D), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(record.routing.weights_NK.sum(1), MASK.reshape(-1), atol=1e-6)
    # Spoiled padding reaches nothing that is real.
    spoiled = jnp.where(MASK[..., None], X, 7.0)
    np.testing.assert_array_equal(called(own, spoiled, Context(mask_BT=MASK)).y[MASK], y[MASK])


@pytest.mark.slow
def test_a_dense_mixture_with_constant_gates_is_one_adapter() -> None:
    router = TaskTableRouter(2, E, E, select=softmax_of_all, rngs=nnx.Rngs(0))
    own = random(lambda: dense_mixture(router))
    for task in range(2):
        folded = own.of_task(task)
        assert isinstance(folded, Bottleneck) and folded.fc1.kernel.shape == (D, E * H)
        for mask in (None, MASK):
            context = Context(task, mask_BT=mask)
            found, wanted = (called(one, X, context).y for one in (folded, own))
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    rows = called(own, X, Context(jnp.asarray([1, 0]))).y
    alone = called(own.of_task(1), X, Context()).y
    np.testing.assert_allclose(rows[0], alone[0], rtol=1e-5, atol=1e-6)
    by_token = random(lambda: dense_mixture(BiasedRouter(D, E, rngs=nnx.Rngs(0))))
    assert by_token.of_task(0) is by_token
    with pytest.raises(UserError, match="gates for 3 experts"):
        by_token.folded(jnp.ones(2))


def test_soft_mixture_reports_shares() -> None:
    router = SoftRouter(D, E, 2, scale=None, init=slot_normal, rngs=nnx.Rngs(0))
    assert router.scale is None
    own = random(lambda: SoftAdapters(router, bottleneck_experts(E, D, H, rngs=nnx.Rngs(0))))
    y, record = called(own, X, Context(mask_BT=MASK))
    shares_BTE = record.mixing.combine_BTES.sum(-1)
    np.testing.assert_allclose(record.routing.weights_NK, shares_BTE.reshape(-1, E), rtol=1e-6)
    np.testing.assert_array_equal(record.routing.mask_N, MASK.reshape(-1))
    assert not y[~MASK].any()
    spread = slot_normal(jax.random.key(0), (300, 7, 3)).std()
    np.testing.assert_allclose(spread, (2 / (3 * 307)) ** 0.5, rtol=0.05)


def test_arrangements() -> None:
    a, b = (random(lambda: Linear(D, D, rngs=nnx.Rngs(0))) for _ in range(2))
    b.bias.set_value(b.bias.get_value() + 1.0)
    wanted = {
        "parallel": a(X) + b(X),
        "parallel_residual": a(X) + b(X) + X,
        "sequential": b(a(X)),
        "sequential_residual": b(a(X)) + a(X),
        "before": a(b(X)) + b(X),
    }
    assert wanted.keys() == ARRANGEMENTS.keys()
    for name, y in wanted.items():
        own = Inserted(a, b, ARRANGEMENTS[name])
        np.testing.assert_allclose(own(X, Context()).y, y, rtol=1e-5, atol=1e-5)


def test_every_task_has_its_own() -> None:
    own = random(lambda: PerTask({"z": LayerNorm(D), "a": LayerNorm(D)}))
    rows = jnp.stack([X[0], X[1], X[1], X[0]])  # b*J + j
    both = called(own, rows, Context(tasks=(0, 1))).y
    swapped = called(own, rows, Context(tasks=(1, 0))).y
    first, second = own.of_task(0), own.of_task(1)
    np.testing.assert_array_equal(own.of["z"].scale.get_value(), first.scale.get_value())
    norms = (first(rows), second(rows))
    for row in range(4):
        np.testing.assert_allclose(both[row], norms[row % 2][row], rtol=1e-5)
        np.testing.assert_allclose(swapped[row], norms[1 - row % 2][row], rtol=1e-5)
    np.testing.assert_allclose(called(own, X, Context(tasks=(1,))).y, second(X), rtol=1e-6)
    with pytest.raises(ValueError, match="context.tasks"):
        own(X, Context())


def test_impossible_sizes() -> None:
    with pytest.raises(UserError, match="bottleneck is 0"):
        bottleneck_experts(E, D, 0, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="kernel is 0"):
        Conformer(D, H, kernel=0, rngs=nnx.Rngs(0))
