"""One training step: every task's loss, the balance losses, one donated update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moezoo.nn import module, sampling
from moezoo.nn.moe import Record
from moezoo.ops import balance
from moezoo.ops.routing import Routing, only
from moezoo.tasks.base import Task

Tree = dict[str, Any]
Batch = dict[str, jax.Array]


BALANCE: Mapping[str, Callable[[Routing], jax.Array]] = {
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "switch": balance.switch_loss,
}


class Seen(NamedTuple):
    """What a pass gives beside its loss: metrics, new statistics, and the choices of balanced
    routers, whose biases move once per step (`sampling.choices`)."""

    metrics: dict[str, jax.Array]
    stats: Tree
    choices: dict[str, jax.Array]


def balance_loss(
    records: Mapping[str, Record],
    tasks: int,
    loss: Callable[[Any], jax.Array],
) -> jax.Array:
    """Sum of `loss(routing)` over MoE layers and tasks, float32 scalar.

    Each task's tokens are judged on their own, because each task has its own router
    (M3ViT, section 3.1: one importance term per router and layer, summed).
    """
    total = jnp.zeros((), jnp.float32)
    for record in records.values():
        routing, task_N = record.routing, record.task_N

        def of_task(task: jax.Array, routing=routing, task_N=task_N) -> jax.Array:
            return loss(only(routing, task_N == task))

        total += jax.vmap(of_task)(jnp.arange(tasks)).sum()
    return total


def task_losses(
    predictions: Mapping[str, jax.Array],
    auxiliary: Mapping[str, Sequence[jax.Array]],
    batch: Batch,
    tasks: Sequence[Task],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Each task's own loss, and the weighted total with auxiliary predictions added."""
    losses = {}
    total = jnp.zeros((), jnp.float32)
    for task in tasks:
        label = batch[task.name]
        losses[task.name] = task.loss(predictions[task.name], label)
        extra = sum((task.loss(p, label) for p in auxiliary.get(task.name, ())), 0.0)
        total += task.weight * (losses[task.name] + extra)
    return losses, total


def make_loss(definition: Any, tasks: Sequence[Task], weights: Mapping[str, float]) -> Callable:
    """The scalar loss of (params, stats, batch, key), and beside it what was `Seen`.

    `weights` names the balance losses in use ("importance", "load", "switch") with their factors. A
    model with `balance_losses` has its own forms of those that make sense for it.
    """
    used = {name: weight for name, weight in weights.items() if weight}

    def loss(params: Tree, stats: Tree, batch: Batch, key: jax.Array):
        model = module.merge(definition, params, stats)
        output = model(batch["image"], key=key, train=True)
        losses, total = task_losses(output.predictions, output.auxiliary, batch, tasks)
        metrics = {f"loss/{name}": value for name, value in losses.items()}
        if output.records:
            kinds = getattr(model, "balance_losses", BALANCE)
            for name, weight in used.items():
                if name not in kinds:
                    continue
                value = balance_loss(output.records, len(tasks), kinds[name])
                metrics[f"balance/{name}"] = value
                total += weight * value
            metrics["dropped"] = sum(
                (r.dropped for r in output.records.values()), jnp.zeros((), jnp.int32)
            )
        metrics["loss/total"] = total
        choices = sampling.choices(model, output.records)
        return total, Seen(metrics, module.updated_stats(model), choices)

    return loss


def _accumulated(gradient: Callable, parts: int) -> Callable:
    """`gradient` averaged over `parts` slices of the batch, statistics threaded through."""

    def run(params: Tree, stats: Tree, batch: Batch, key: jax.Array):
        def slices(x: jax.Array) -> jax.Array:
            # Interleaved rows: every slice keeps the batch's sharding.
            return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

        def body(carry, piece):
            stats, index = carry
            (_, seen), grads = gradient(params, stats, piece, jax.random.fold_in(key, index))
            return (seen.stats, index + 1), (seen.metrics, seen.choices, grads)

        (stats, _), (metrics, choices, grads) = jax.lax.scan(
            body, (stats, jnp.zeros((), jnp.int32)), jax.tree.map(slices, batch)
        )
        mean = jax.tree.map(lambda x: x.mean(0).astype(x.dtype), (metrics, grads))
        total = jax.tree.map(lambda x: x.sum(0), choices)
        return (mean[0]["loss/total"], Seen(mean[0], stats, total)), mean[1]

    return run


def rebalanced(definition: Any, params: Tree, seen: Seen) -> Tree:
    """The statistics after a step, with the biases of balanced routers moved by its choices."""
    if not seen.choices:
        return seen.stats
    model = module.merge(definition, params, seen.stats)
    sampling.observe(model, seen.choices)
    return module.updated_stats(model)


def make_step(
    definition: Any,
    loss: Callable,
    optimiser: optax.GradientTransformation,
    shardings: Tree,
    seed: int,
    accumulation: int = 1,
) -> Callable[[Tree, Batch], tuple[Tree, dict[str, jax.Array]]]:
    """A jitted `(state, batch) -> (state, metrics)` that donates the state's buffers.

    The noise key is a function of `seed` and the step, so a resumed run repeats it exactly.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulation > 1:
        gradient = _accumulated(gradient, accumulation)

    def step(state: Tree, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        (_, seen), grads = gradient(state["params"], state["stats"], batch, key)
        updates, moments = optimiser.update(grads, state["optimiser"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = seen.metrics | {"gradient_norm": optax.global_norm(grads)}
        new = {
            "params": params,
            "stats": rebalanced(definition, state["params"], seen),
            "optimiser": moments,
            "step": state["step"] + 1,
        }
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
