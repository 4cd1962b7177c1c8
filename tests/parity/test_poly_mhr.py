"""Polytropon's and multi-head routing's published shares, layers, gradients and merged layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.ops import lowrank, skills
from moezoo.ops.selection import sigmoid_share
from tests.fixtures import load, names

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
LAYERS = names("poly_mhr", "mhr_", ["mhr_s4", "mhr_s8_square"])
LAYERS += names("poly_mhr", "poly_", ["poly_s1", "poly_s1_merge_after"])
SELECTORS = names("poly_mhr", "selector_variants_", [f"selector_variants_s{s}" for s in (1, 4)])
PEFT = names("poly_mhr", "peft_poly_", ["peft_poly_s2"])


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), wanted, **CLOSE)


def near(got: Any, wanted: Any) -> None:
    """Relative to the largest entry, as the fixtures' notes have it for gradients."""
    # Shares of a single skill are constant: theirs then are rounding errors of 1e-8.
    largest = max(float(np.abs(wanted).max()), 1e-2)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-4, atol=1e-5 * largest)


def bank(a_ESdr: Any, b_ErSo: Any) -> tuple[Any, Any]:
    """The published blocks as a bank [D, R], [R, O]."""
    experts, heads, part, rank = a_ESdr.shape
    a_DR = jnp.transpose(a_ESdr, (1, 2, 0, 3)).reshape(heads * part, experts * rank)
    return a_DR, b_ErSo.reshape(experts * rank, -1)


def layer(f: dict[str, Any], logits: Any, a_ESdr: Any, b_ErSo: Any, x_BTD: Any) -> Any:
    """The whole layer by ours; every row's tokens have its task's shares."""
    heads = int(f["n_splits"])
    rows = logits[f["task_ids"]].reshape(len(x_BTD), heads, -1)
    gates_BG = sigmoid_share(rows).reshape(len(x_BTD), -1)
    gates_NG = jnp.repeat(gates_BG, x_BTD.shape[1], axis=0)
    mix = lowrank.by_block if f["merge_after"] else partial(skills.by_head, heads=heads)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    added_NO = float(f["alpha"]) / int(f["rank"]) * mix(x_ND, *bank(a_ESdr, b_ErSo), gates_NG)
    return x_BTD @ f["W"].T + f["bias"] + added_NO.reshape(*x_BTD.shape[:2], -1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_gradients_are_the_published_ones(name: str) -> None:
    f = load("poly_mhr", name)
    operands = tuple(jnp.asarray(f[n]) for n in ("logits", "lora_a", "lora_b", "x"))
    y, back = jax.vjp(lambda *o: layer(f, *o), *operands)
    np.testing.assert_allclose(y, f["y"], rtol=1e-4, atol=5e-5)
    wanted = ("grad_logits", "grad_a", "grad_b", "grad_x")
    for got, gradient in zip(back(jnp.asarray(f["cot"])), wanted, strict=True):
        near(got, f[gradient])


@pytest.mark.parametrize("name", LAYERS)
def test_shares_and_what_is_left_for_one_task_are_the_published_ones(name: str) -> None:
    f = load("poly_mhr", name)
    heads, scale = int(f["n_splits"]), float(f["alpha"]) / int(f["rank"])
    a_DR, b_RO = bank(jnp.asarray(f["lora_a"]), jnp.asarray(f["lora_b"]))
    rows = f["logits"].reshape(len(f["logits"]), heads, -1)
    weights = sigmoid_share(jnp.asarray(rows))
    close(weights[f["task_ids"]], f["weights"])
    close(weights[0], f["task0_weights"])
    a_Dr, b_rO = skills.mixed_factors(a_DR, b_RO, weights[0])
    close(a_Dr, f["task0_A"])
    close(b_rO, f["task0_B"])
    # Of both factors even where outputs are averaged: there it is not what the layer does.
    close(f["W"] + scale * (a_Dr @ b_rO).T, f["task0_W"])
    uniform = jnp.full(weights[0].shape, 1.0 / weights.shape[-1])
    a_Dr, b_rO = skills.mixed_factors(a_DR, b_RO, uniform)
    close(f["x"] @ f["W"].T + f["bias"] + scale * f["x"] @ a_Dr @ b_rO, f["mu_y"])
    if "mu_W_merged" in f:
        close(f["W"] + scale * (a_Dr @ b_rO).T, f["mu_W_merged"])
    close(skills.head_overlap(a_DR, heads, weights.shape[-1]), f["ortho_a"])


MODES = {
    "sigmoid": "sigmoid",
    "l2": "length",
    "straight_through": "rounded",
    "avg_correction": "corrected",
    "shared_skill": "last_shared",
    "relaxed_bernoulli_train": "sigmoid",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SELECTORS)
def test_every_normaliser_and_its_gradient_are_the_published_ones(name: str, mode: str) -> None:
    f = load("poly_mhr", name)
    heads, ids = int(f["n_splits"]), f["task_ids"]
    assert f["logits"].shape[1] == heads * int(f["n_skills"])

    def weights(logits: Any) -> Any:
        rows = logits[ids].reshape(len(ids), heads, -1)
        if mode == "relaxed_bernoulli_train":
            rows = skills.relaxed_bernoulli(rows, jnp.asarray(f["relaxed_bernoulli_u"]))
        select = skills.shares_by_head(heads, skills.SHARES[MODES[mode]])
        flat = rows.reshape(len(ids), -1)
        return select(flat, flat.shape[1]).weights_NK.reshape(rows.shape)

    got, back = jax.vjp(weights, jnp.asarray(f["logits"]))
    wanted, gradient = np.array(f[mode]), f[f"{mode}_grad"]
    if mode == "straight_through":
        # Rows that choose nobody are 0 there, with gradients of 1e12; ours keep their shares.
        nobody = wanted.sum(-1) < 0.5
        assert (np.asarray(got).sum(-1) > 0.99).all()
        close(np.where(nobody[..., None], 0.0, got), wanted)
        chosen = jnp.asarray(np.where(nobody[..., None], 0.0, f["cot"]))
        # What their rows of nobody add to logits is left out on both sides.
        apart = np.zeros((len(gradient), heads), bool)
        apart[ids] = nobody
        apart = np.repeat(apart, gradient.shape[1] // heads, axis=1)
        near(np.where(apart, 0.0, back(chosen)[0]), np.where(apart, 0.0, gradient))
        return
    close(got, wanted)
    near(back(jnp.asarray(f["cot"]))[0], gradient)


@pytest.mark.parametrize("name", SELECTORS)
def test_the_buffet_prior_is_the_published_one(name: str) -> None:
    f = load("poly_mhr", name)
    value, gradient = jax.value_and_grad(skills.buffet_penalty)(jnp.asarray(f["logits"]))
    close(value, f["neg_log_ibp"])
    near(gradient, f["neg_log_ibp_grad"])


@pytest.mark.parametrize("name", PEFT)
def test_a_poly_layer_of_peft_is_ours(name: str) -> None:
    f = load("poly_mhr", name)
    own = {"alpha": float(f["scaling"]), "rank": 1, "merge_after": False}
    a_ESdr, b_ErSo = np.swapaxes(f["A"], 0, 1), np.transpose(f["B"], (1, 2, 0, 3))
    got = layer(f | own, jnp.asarray(f["logits"]), jnp.asarray(a_ESdr), b_ErSo, jnp.asarray(f["x"]))
    np.testing.assert_allclose(got, f["y"], rtol=1e-4, atol=5e-5)
