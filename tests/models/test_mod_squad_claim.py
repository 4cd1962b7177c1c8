"""Mod-Squad's claim at a small size: mutual information makes a task's part of the layer small.

Four tasks in two families, each with a part of its own; one MoE layer, 8 experts, 2 per token.
Trained with the importance loss of each task's router, as M3ViT's, with that of all tasks together,
or with the mutual-information loss; then each task keeps the experts with more than 5 % of its
choices and the others are replaced by their means.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.deploy import scores
from moezoo.deploy.calibrate import observed
from moezoo.deploy.novices import MeanNovices
from moezoo.deploy.pruned import path_layer, pruned_layer
from moezoo.deploy.specialise import specialise
from moezoo.deploy.usage import add, observe, weighted_mean_outputs
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import trunc_normal
from moezoo.nn.moe import MoE, Record
from moezoo.nn.routers import MultiGateRouter
from moezoo.ops import grouped
from moezoo.train import step

J, D, F, E, K, N = 4, 8, 16, 8, 2, 64
STEPS = 800
PERCENT = 10.0  # share times k: experts with more than 5 % of the choices stay


class Result(NamedTuple):
    """Mean squared errors before and after pruning, experts kept per task, I(task; expert)."""

    full: float
    pruned: float
    kept: float
    information: float


def targets(x_JND: jax.Array) -> jax.Array:
    """What the tasks want: their family's function and a smaller one of their own."""
    rng = np.random.default_rng(0)
    draw = partial(rng.normal, size=(D, F))

    def net(x: jax.Array, a: np.ndarray, b: np.ndarray) -> jax.Array:
        return jnp.sin(x @ (a / np.sqrt(D)) * 2.0) @ (b.T / np.sqrt(F))

    families = [(draw(), draw()) for _ in range(2)]
    own = [(draw(), draw()) for _ in range(J)]
    return jnp.stack(
        [net(x_JND[j], *families[j // 2]) + 0.5 * net(x_JND[j], *own[j]) for j in range(J)]
    )


def build(seed: int) -> MoE:
    rngs = nnx.Rngs(seed)
    wide = partial(trunc_normal, std=0.3)
    experts = MLPExperts(E, D, F, init=wide, rngs=rngs)
    return MoE(MultiGateRouter(J, D, E, K, init=wide, rngs=rngs), experts, grouped.reference)


def tokens(key: jax.Array, count: int) -> jax.Array:
    return jax.random.normal(key, (J, count, D))


def over_all_tasks(records: dict[str, Record]) -> jax.Array:
    """The importance loss of the experts' use by all tasks together."""
    return step.BALANCE["importance"](
        {n: r._replace(task_N=0 * r.task_N) for n, r in records.items()}, 1
    )


LOSSES = {
    "importance": partial(step.BALANCE["importance"], tasks=J),
    "importance over all tasks": over_all_tasks,
    "mutual_information": partial(step.BALANCE["mutual_information"], tasks=J),
}


def trained(loss: str, weight: float, seed: int) -> module.ModuleParts:
    parts = module.split(build(seed))
    optimiser = optax.adam(5e-3)

    def objective(params, x_JND):
        layer = module.merge(parts.definition, params, parts.stats)
        y_ND, record = layer(x_JND.reshape(-1, D), Context(jnp.arange(J)))
        error = jnp.mean((y_ND.reshape(x_JND.shape) - targets(x_JND)) ** 2)
        return error + weight * LOSSES[loss]({"": record})

    def update(carry, key):
        params, state = carry
        grads = jax.grad(objective)(params, tokens(key, N))
        updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), STEPS)
    carry = (parts.params, optimiser.init(parts.params))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, keys))(carry)
    return module.ModuleParts(parts.definition, params, parts.stats)


def measured(parts: module.ModuleParts) -> Result:
    layer = module.merge(*parts)
    x_JND = tokens(jax.random.key(99), 1024)
    y_JND = targets(x_JND)
    full, cut, kept = [], [], []
    for task in range(J):
        alone = specialise(nnx.Dict(layer=layer), task).model["layer"]
        alone = path_layer(alone, range(E), E)
        record = observed(alone)(x_JND[task]).record
        usage = add(None, observe(record.routing, record.outputs_NKD))
        keep = scores.used({"": scores.Candidates(usage, tuple(range(E)), K)}, PERCENT)[""]
        gone = [e for e in range(E) if e not in keep]
        less = pruned_layer(alone, keep, MeanNovices(weighted_mean_outputs(usage)[gone]))
        for errors, made in ((full, alone), (cut, less)):
            errors.append(float(jnp.mean((made(x_JND[task]).y_ND - y_JND[task]) ** 2)))
        kept.append(len(keep))
    record = layer(x_JND.reshape(-1, D), Context(jnp.arange(J))).record
    information = -float(step.mutual_information_loss({"": record}, J))
    return Result(*(float(np.mean(v)) for v in (full, cut, kept)), information)


@pytest.mark.claims
def test_mutual_information_makes_pruning_cheaper_than_balance() -> None:
    found = {
        name: [measured(trained(name, weight, seed)) for seed in range(3)]
        for name, weight in zip(LOSSES, (0.1, 0.1, 0.3), strict=True)
    }
    for name, results in found.items():
        print(name, [tuple(round(v, 4) for v in r) for r in results])
    each, together, modular = (Result(*np.mean(found[n], axis=0)) for n in LOSSES)
    print(each, together, modular)
    assert modular.pruned <= 1.02 * modular.full
    for balanced in (each, together):
        assert modular.information > 2 * balanced.information
        assert modular.kept < balanced.kept - 1
        assert modular.pruned < balanced.pruned and modular.full < 1.1 * balanced.full
