"""Arrow's prototypes, weights and layers, PHATGOOSE's, and Arrow as in PEFT."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.ops import lowrank, prototypes
from moezoo.ops.prototypes import ARROW, PHATGOOSE, PrototypeScore
from moezoo.ops.selection import pick, top_k_then_softmax
from tests.fixtures import load, names

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FILES = names("arrow", "arrow", ["arrow"])
TIED = names("arrow", "tied", ["tied"])
PEFT = names("peft_lora", "arrow_hf", ["arrow_hf"])
TAGS = {
    "all_t1": ARROW,
    "top2_t1": ARROW,
    "top2_tsqrtd": PrototypeScore(temperature=None),
    "all_unit_t05": PrototypeScore(
        of_input=prototypes.of_unit_length, of_prototype=prototypes.of_unit_length, temperature=0.5
    ),
    "all_normd_normp": PrototypeScore(
        of_input=prototypes.over_width, of_prototype=prototypes.over_experts
    ),
    "phatgoose_top2": PHATGOOSE,
}


def same_line(got: Any, wanted: Any) -> None:
    """Equal up to a sign."""
    got = np.asarray(got) * np.sign(np.vdot(got, wanted))
    np.testing.assert_allclose(got, wanted, **CLOSE)


@pytest.mark.parametrize("name", FILES)
def test_prototypes_are_the_published_ones_up_to_their_sign(name: str) -> None:
    f = load("arrow", name)
    for e, (a, b) in enumerate(zip(f["lora_a"], f["lora_b"], strict=True)):
        vector, length = prototypes.svd_prototype(jnp.asarray(a), jnp.asarray(b))
        same_line(vector, f["prototypes"][e])
        np.testing.assert_allclose(length**2, f["top_eigval"][e], rtol=1e-4)
        # Their iterates differ between both calls, as the fixtures' notes say.
        scaled = np.asarray(vector * length**2) * np.sign(np.vdot(vector, f["prototypes"][e]))
        turned = scaled * np.sign(np.vdot(scaled, f["prototypes_scaled"][e]))
        np.testing.assert_allclose(
            turned, f["prototypes_scaled"][e], rtol=5e-3, atol=5e-3 * abs(turned).max()
        )


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("name", FILES)
def test_weights_and_both_combinations_are_the_published_ones(name: str, tag: str) -> None:
    f = load("arrow", name)
    x_ND = jnp.asarray(f["x"]).reshape(-1, f["x"].shape[-1])
    logits_NE = TAGS[tag](x_ND, jnp.asarray(f["prototypes"]))
    experts = logits_NE.shape[-1]
    wanted = f[f"{tag}_w"].reshape(len(x_ND), -1)
    chosen = top_k_then_softmax(logits_NE, wanted.shape[-1])
    if f"{tag}_idx" in f:
        np.testing.assert_array_equal(chosen.experts_NK, f[f"{tag}_idx"].reshape(wanted.shape))
        np.testing.assert_allclose(chosen.weights_NK, wanted, **CLOSE)
    else:
        everyone = np.broadcast_to(np.arange(experts), wanted.shape)
        placed = np.take_along_axis(wanted, np.asarray(chosen.experts_NK), 1)
        np.testing.assert_allclose(chosen.weights_NK, placed, **CLOSE)
        np.testing.assert_array_equal(np.sort(chosen.experts_NK, 1), everyone)
    hot = chosen.experts_NK[..., None] == jnp.arange(experts)
    gates_NE = jnp.sum(jnp.where(hot, chosen.weights_NK[..., None], 0.0), axis=1)
    a_DR, b_RO = lowrank.stacked(jnp.asarray(f["lora_a"]), jnp.asarray(f["lora_b"]))
    plain = np.asarray(x_ND) @ f["W"].T + f["bias"]
    scale = float(f["alpha"]) / int(f["rank"])
    for order, combine in (("before", lowrank.by_factor), ("after", lowrank.by_block)):
        y_NO = plain + scale * combine(x_ND, a_DR, b_RO, gates_NE)
        wanted_NO = f[f"{tag}_y_{order}"].reshape(y_NO.shape)
        np.testing.assert_allclose(y_NO, wanted_NO, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TIED)
def test_layers_that_share_their_input_factor_have_one_prototype(name: str) -> None:
    f = load("arrow", name)
    experts = {key.split("|")[1] for key in f if key.startswith("concat|")}
    for e in sorted(experts):
        w = {key.split(".")[1:][0] + key[-1]: key for key in f if key.startswith(f"w|{e}|")}
        assert len(w) == 8
        at = f"w|{e}|att."
        ups = [jnp.asarray(f[f"{at}{part}_proj.lora_b"]) for part in "qkv"]
        for part in "kv":
            np.testing.assert_array_equal(f[f"{at}{part}_proj.lora_a"], f[f"{at}q_proj.lora_a"])
        vector, _ = prototypes.tied_prototype(jnp.asarray(f[f"{at}q_proj.lora_a"]), ups)
        for part in "qkv":
            same_line(vector, f[f"concat|{e}|att.{part}_proj"])
        own = [jnp.asarray(f[f"{at}o_proj.lora_{side}"]) for side in "ab"]
        same_line(prototypes.svd_prototype(own[0], own[1])[0], f[f"concat|{e}|att.o_proj"])


@pytest.mark.parametrize("name", PEFT)
def test_arrow_of_peft_adds_outputs(name: str) -> None:
    f = load("peft_lora", name)
    a_EDr, b_ErO = np.swapaxes(f["A"], 1, 2), np.swapaxes(f["B"], 1, 2)
    for e, near in enumerate(f["prototypes_power15"]):
        vector, longest = prototypes.svd_prototype(jnp.asarray(a_EDr[e]), jnp.asarray(b_ErO[e]))
        # It iterates 15 times only: a second direction that is nearly as long is not yet gone, even
        # if it had a hundred times the share of the first at the start.
        values = np.linalg.svd(a_EDr[e].astype(np.float64) @ b_ErO[e], compute_uv=False)
        tangent = 100 * np.append(values, 0.0)[1] ** 30 / float(longest) ** 30
        assert abs(np.vdot(vector, near)) > min(0.9998, 1 / np.hypot(1, tangent))
    x_ND = jnp.asarray(f["x"]).reshape(-1, f["x"].shape[-1])
    score = PrototypeScore(temperature=float(f["temperature"]))
    logits_NE = score(x_ND, jnp.asarray(f["prototypes_power15"]))
    chosen = top_k_then_softmax(logits_NE, int(f["top_k"]))
    coeff_NE = f["coeff"].reshape(len(x_ND), -1)
    at = pick(jnp.asarray(coeff_NE), chosen.experts_NK)
    np.testing.assert_allclose(chosen.weights_NK, at, **CLOSE)
    a_DR, b_RO = lowrank.stacked(jnp.asarray(a_EDr), jnp.asarray(b_ErO))
    delta = float(f["scaling"]) * lowrank.by_block(x_ND, a_DR, b_RO, jnp.asarray(coeff_NE))
    np.testing.assert_allclose(delta, f["delta"].reshape(delta.shape), rtol=1e-4, atol=1e-4)
