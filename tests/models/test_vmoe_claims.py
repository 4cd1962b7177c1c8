"""V-MoE's claim about batch priority at a size that a test can afford (arXiv:2106.05974, figure 7).

Images of 16 patches of which two carry the class, as the product of two signs that no linear map
sees; one block with four experts and one choice per token. Trained with room for every choice, then
evaluated with less.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module

CONFIG = VMoEConfig(
    width=32,
    depth=1,
    heads=2,
    patch=4,
    mlp_ratio=2.0,
    experts=4,
    top_k=1,
    moe_every=1,
    capacity_factor=4.0,
    group_images=1024,
    pool="mean",
)
SIZE, TASKS = (16, 16), {"scene": 2}
QUICK = {"xla_backend_optimization_level": 1}


def examples(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [B, 16, 16, 3] and their classes."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).normal(size=(2, 48))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    signs = rng.choice([-1.0, 1.0], (count, 2))
    patches = 0.3 * rng.normal(size=(count, 16, 48))
    for row, pair in enumerate(signs):
        where = rng.choice(16, 2, replace=False)
        patches[row, where] += 6.0 * pair @ directions
    image = patches.reshape(count, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    return image.reshape(count, *SIZE, 3).astype(np.float32), (signs.prod(1) > 0).astype(np.int32)


def trained(steps: int) -> module.ModuleParts:
    parts = module.create(lambda: CONFIG.build(TASKS, SIZE, nnx.Rngs(0)))
    optimiser = optax.adam(3e-3)
    image, label = examples(64 * steps, 1)

    def loss(params, image, label, key):
        model = module.merge(parts.definition, params, parts.stats)
        output = model(image, train=True, key=key)
        (record,) = output.records.values()
        balance = sum(f(record.routing) for f in model.balance_losses.values())
        logits = output.predictions["scene"]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return entropy + 0.005 * balance

    def update(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, *batch)
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = (
        image.reshape(steps, 64, *image.shape[1:]),
        label.reshape(steps, 64),
        jax.random.split(jax.random.key(0), steps),
    )
    run = jax.jit(lambda start: jax.lax.scan(update, start, batches)[0], compiler_options=QUICK)
    params, _ = run((parts.params, optimiser.init(parts.params)))
    return parts._replace(params=params)


def accuracy(parts: module.ModuleParts, factor: float, priority: str) -> float:
    config = replace(CONFIG, capacity_factor=factor, priority=priority)
    shapes = module.abstract(lambda: config.build(TASKS, SIZE, nnx.Rngs(0)))
    image, label = examples(1024, 2)

    def run(params):
        model = module.merge(shapes.definition, params, shapes.stats)
        return model(jnp.asarray(image)).predictions["scene"]

    logits = jax.jit(run, compiler_options=QUICK)(parts.params)
    return float(np.mean(np.argmax(logits, -1) == label))


@pytest.mark.claims
def test_batch_priority_keeps_what_the_order_of_positions_loses():
    parts = trained(600)
    table = {
        (factor, priority): accuracy(parts, factor, priority)
        for factor in (4.0, 0.5, 0.25)
        for priority in ("position", "probability")
    }
    print(table)
    assert table[4.0, "position"] == table[4.0, "probability"] > 0.9
    for factor in (0.5, 0.25):
        assert table[factor, "probability"] > table[factor, "position"] + 0.03
