"""Pieces of DyT and MoSA against their published code: gates, losses, adapter, masks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.nn.adapters import ScaledAdapter
from moezoo.nn.token_skip import TokenDispatcher
from moezoo.ops import divergence, sparse_masks
from moezoo.ops.token_skip import always, budget_loss, kept
from tests.fixtures import load, names

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
FOLDER = "dyt_mosa_mixda"
FILES = names(FOLDER, FOLDER, [FOLDER])


def dispatcher(z: dict[str, np.ndarray]) -> TokenDispatcher:
    made = TokenDispatcher(z["dyt_w"].shape[1], temperature=float(z["dyt_tau"]), rngs=nnx.Rngs(0))
    made.kernel.set_value(jnp.asarray(z["dyt_w"].T))
    made.bias.set_value(jnp.asarray(z["dyt_b"]))
    return made


def free(tokens: int) -> jax.Array:
    """All but the class token, the first."""
    return jnp.arange(tokens) > 0


@pytest.mark.parametrize("file", FILES)
def test_dispatcher_at_inference(file: str) -> None:
    z = load(FOLDER, file)
    x = jnp.asarray(z["dyt_x"])
    found = always(dispatcher(z)(x), free(x.shape[1]))
    np.testing.assert_allclose(found.logits_BT[:, 1:], z["dyt_logits"][..., 0], **CLOSE)
    np.testing.assert_array_equal(found.keep_BT, z["dyt_mask_eval"][..., 0])


@pytest.mark.parametrize("file", FILES)
def test_dispatcher_in_training(file: str) -> None:
    z = load(FOLDER, file)
    x, cot = jnp.asarray(z["dyt_x"]), z["dyt_cot"][..., 0]
    # Of patches only; -log of an exponential draw is a Gumbel draw.
    noise = np.log(z["dyt_exp2"][..., 0]) - np.log(z["dyt_exp1"][..., 0])

    def mask(w: jax.Array) -> jax.Array:
        logits = (x @ w.T)[..., 0] + z["dyt_b"]
        full = jnp.pad(jnp.asarray(noise, jnp.float32), ((0, 0), (1, 0)))
        return always(kept(logits, full, float(z["dyt_tau"])), free(x.shape[1])).keep_BT

    w = jnp.asarray(z["dyt_w"])
    np.testing.assert_array_equal(mask(w), z["dyt_mask_train"][..., 0])
    grad = jax.grad(lambda w: (mask(w) * cot).sum())(w)
    np.testing.assert_allclose(grad, z["dyt_grad_w"], **CLOSE)


@pytest.mark.parametrize("file", FILES)
def test_adapter(file: str) -> None:
    z = load(FOLDER, file)
    hidden, width = z["dyt_adapter|down_proj.weight"].shape
    made = ScaledAdapter(width, hidden, rngs=nnx.Rngs(0))
    for layer, name in ((made.fc1, "down_proj"), (made.fc2, "up_proj")):
        layer.kernel.set_value(jnp.asarray(z[f"dyt_adapter|{name}.weight"].T))
        layer.bias.set_value(jnp.asarray(z[f"dyt_adapter|{name}.bias"]))
    np.testing.assert_allclose(made(jnp.asarray(z["dyt_x"])), z["dyt_adapter_out"], **CLOSE)


@pytest.mark.parametrize("file", FILES)
def test_budget(file: str) -> None:
    z = load(FOLDER, file)
    found = budget_loss(jnp.asarray(z["dyt_sel"]), target=0.5, weight=2.0, least=0.1)
    np.testing.assert_allclose(found, z["dyt_token_loss"], **CLOSE)
    logits, label = jnp.asarray(z["dyt_cls_logits"]), jnp.asarray(z["dyt_y"])
    own = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    np.testing.assert_allclose(own + found, z["dyt_loss"], **CLOSE)


@pytest.mark.parametrize("file", FILES)
def test_masks(file: str) -> None:
    z = load(FOLDER, file)
    wanted = z["mosa_masks"]
    owner = sparse_masks.owners(jnp.asarray(z["mosa_score"]), len(wanted))
    np.testing.assert_array_equal(sparse_masks.masks(owner, len(wanted)), wanted.astype(bool))


@pytest.mark.parametrize("file", FILES)
def test_symmetric_divergence(file: str) -> None:
    z = load(FOLDER, file)
    first, second = jnp.asarray(z["mosa_a"]), jnp.asarray(z["mosa_b"])

    def loss(first: jax.Array) -> jax.Array:
        return divergence.symmetric(divergence.categorical, first, second)

    value, grad = jax.value_and_grad(loss)(first)
    np.testing.assert_allclose(value, z["mosa_skl"], **CLOSE)
    np.testing.assert_allclose(grad, z["mosa_skl_grad_a"], **CLOSE)
