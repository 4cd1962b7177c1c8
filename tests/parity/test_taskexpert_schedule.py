"""Schedule, optimiser and resizing of the dense benchmarks' code base, number by number."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moezoo.ops.interpolate import bicubic, resize, resize_position_embedding
from moezoo.train import optim
from moezoo.train.optim import OptimConfig
from tests.fixtures import load
from tests.train.test_optim import run

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_poly_per_step_equals_the_reference():
    data = load("taskexpert", "schedule_optim_interp")
    # base and length of the schedule stand in the data: lr(0) = base, power 0.9.
    iterations, rates = data["lr/iters"], data["lr/values"]
    base = rates[list(iterations).index(0)]
    i = int(np.argmax((iterations > 0) & (rates > 0)))
    total = round(iterations[i] / (1 - (rates[i] / base) ** (1 / 0.9)))
    schedule = optim.poly_schedule(float(base), total)
    np.testing.assert_allclose([schedule(i) for i in iterations], rates, rtol=1e-4, atol=1e-12)


def test_adam_with_decay_in_the_gradient_and_clip_equals_torch():
    data = load("taskexpert", "schedule_optim_interp")
    lr, b1, b2, eps, decay, clip, total, power = data["adam/hparams"]
    config = OptimConfig(
        "adam", lr, "poly", power=power, b1=b1, b2=b2, eps=eps, weight_decay=decay, decay="all",
        clip=clip,
    )  # fmt: skip
    gradients = [
        {"kernel": w, "bias": b}
        for w, b in zip(data["adam/grad_w"], data["adam/grad_b"], strict=True)
    ]
    start = {"kernel": jnp.asarray(data["adam/w0"]), "bias": jnp.asarray(data["adam/b0"])}
    history = run(optim.build(config, int(total)), start, gradients)
    for step, params in enumerate(history):
        np.testing.assert_allclose(params["kernel"], data["adam/w"][step], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(params["bias"], data["adam/b"][step], rtol=1e-4, atol=1e-5)
    rates = [optim.schedule(config, int(total))(i) for i in range(len(history))]
    np.testing.assert_allclose(rates, data["adam/lr"], rtol=1e-4)
    norms = [optax.global_norm(gradient) for gradient in gradients]
    np.testing.assert_allclose(norms, data["adam/grad_norm_before_clip"], rtol=1e-4)


def test_positions_are_resized_bicubically_with_a_of_minus_three_quarters():
    data = load("taskexpert", "schedule_optim_interp")
    height, width = data["pos_embed/grid_new"].tolist()
    found = resize_position_embedding(jnp.asarray(data["pos_embed/in"]), (height, width), bicubic)
    np.testing.assert_allclose(found, data["pos_embed/out"], **CLOSE)


@pytest.mark.parametrize(
    ("source", "target"),
    [("in", "up_x4"), ("in", "to_17x13"), ("down_in", "down_to_half")],
)
def test_maps_are_resized_bilinearly_without_a_filter(source: str, target: str):
    data = load("taskexpert", "schedule_optim_interp")
    image, wanted = (np.moveaxis(data[f"bilinear/{n}"], 1, -1) for n in (source, target))
    found = resize(jnp.asarray(image), wanted.shape[1:3])
    np.testing.assert_allclose(found, wanted, **CLOSE)
