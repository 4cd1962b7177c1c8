"""One training step: every task's loss, the balance losses, one donated update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moezoo.nn import exploration, module
from moezoo.nn.moe import Record
from moezoo.ops import balance
from moezoo.ops.flops import product_flops
from moezoo.ops.routing import only
from moezoo.tasks.base import Task
from moezoo.tasks.losses import learned_total
from moezoo.train import optim
from moezoo.train import state as states

Tree = dict[str, Any]
DeviceBatch = dict[str, jax.Array]


class PassRecord(NamedTuple):
    """What a pass gives beside its loss: metrics, new statistics, and what routers were shown
    whose state moves once per step (`exploration.choices`)."""

    metrics: dict[str, jax.Array]
    stats: Tree
    choices: dict[str, Any]


def balance_loss(
    records: Mapping[str, Record],
    tasks: int,
    loss: Callable[[Any], jax.Array],
) -> jax.Array:
    """Sum of `loss(routing)` over MoE layers and tasks, float32 scalar.

    Each task's tokens are judged on their own, because each task has its own router
    (M3ViT, section 3.1: one importance term per router and layer, summed); a loss that is
    `Together` judges them all at once.
    """
    total = jnp.zeros((), jnp.float32)
    for record in records.values():
        if isinstance(loss, balance.Together):
            total += loss(record.routing)
            continue
        routing, task_N = record.routing, record.task_N

        def of_task(task: jax.Array, routing=routing, task_N=task_N) -> jax.Array:
            return loss(only(routing, task_N == task))

        # Mapped, not looped over: the program does not grow with the number of tasks.
        total += jax.vmap(of_task)(jnp.arange(tasks)).sum()
    return total


def imbalance(record: Record) -> jax.Array:
    """The load of a layer's busiest expert over the mean, float32; 1 where none has any.

    A load is that of the pass's real tokens, whose choices it counts, or adds up the weights where
    every token has every expert.
    """
    routing = record.routing
    everyone = routing.experts_NK.shape[1] == routing.probs_NE.shape[1]
    load_E = (balance.gate_sums if everyone else balance.choice_counts)(routing)
    load_E = jax.lax.stop_gradient(load_E).astype(jnp.float32)
    mean = load_E.mean()
    return jnp.where(mean > 0, load_E.max() / jnp.where(mean > 0, mean, 1.0), 1.0)


def mutual_information_loss(records: Mapping[str, Record], tasks: int) -> jax.Array:
    """Minus the mutual information of tasks and experts in nats, summed over MoE layers.

    Unlike `balance_loss` it judges the table of all tasks together (Mod-Squad, arXiv:2212.08066).
    The table is that of the global batch, whatever the mesh; a slice of an accumulated batch has
    only its own tokens, whose table looks a little more informative than the whole batch's.
    """
    total = jnp.zeros((), jnp.float32)
    for record in records.values():
        total += balance.mutual_information_loss(record.routing, record.task_N, tasks)
    return total


BALANCE: Mapping[str, Callable[[Mapping[str, Record], int], jax.Array]] = {
    "importance": partial(balance_loss, loss=balance.importance_loss),
    "load": partial(balance_loss, loss=balance.load_loss),
    "switch": partial(balance_loss, loss=balance.switch_loss),
    "mutual_information": mutual_information_loss,
}


def _balance_losses(model: Any) -> Mapping[str, Callable[[Mapping[str, Record], int], jax.Array]]:
    """`BALANCE`, or a model's own forms of what makes sense for it."""
    own = getattr(model, "balance_losses", None)
    if own is None:
        return BALANCE
    return {name: partial(balance_loss, loss=loss) for name, loss in own.items()}


def task_losses(
    predictions: Mapping[str, jax.Array],
    auxiliary: Mapping[str, Sequence[jax.Array]],
    batch: DeviceBatch,
    tasks: Sequence[Task],
    sigma_J: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Each task's own loss, and the weighted total with auxiliary predictions added.

    A task that is not predicted is not in this batch. `sigma_J`, one per task, weighs the tasks on
    top of their fixed weights (`learned_total`).
    """
    losses, weighted = {}, []
    here = [number for number, task in enumerate(tasks) if task.name in predictions]
    for task in (tasks[number] for number in here):
        label = batch[task.name]
        losses[task.name] = task.loss(predictions[task.name], label)
        extra = sum((task.loss(p, label) for p in auxiliary.get(task.name, ())), 0.0)
        weighted.append(task.weight * (losses[task.name] + extra))
    if sigma_J is not None:
        return losses, learned_total(jnp.stack(weighted), sigma_J[jnp.asarray(here)])
    return losses, sum(weighted, jnp.zeros((), jnp.float32))


def own_losses(output: Any, model: Any, tasks: Sequence[Task]) -> dict[str, jax.Array]:
    """What a model asks for besides its tasks' losses, by the names of metrics, weighted.

    Two predictions of a task that are to agree count as much as the task's loss does.
    """
    found = {f"own/{name}": value for name, value in output.losses.items()}
    for task in tasks:
        if task.name in output.compared:
            pair = output.compared[task.name]
            found[f"agreement/{task.name}"] = task.weight * model.agreement(task.divergence, *pair)
    return found


def make_loss(
    definition: Any,
    tasks: Sequence[Task],
    weights: Mapping[str, float],
    read: Callable[..., Any],
    groups: int | None = None,
) -> Callable:
    """The scalar loss of (trained, stats, batch, key), and beside it the `PassRecord`.

    `trained` is that of `state.trained`. `weights` are the factors of the balance losses in use; a
    model with `balance_losses` of its own has only those. `read(model, batch, key=, train=)` gives
    the model's output, whose records number `groups` tasks (None: as many as there are `tasks`).
    """
    # What weighs nothing is not computed either.
    used = {name: weight for name, weight in weights.items() if weight}

    def loss(trained: Tree, stats: Tree, batch: DeviceBatch, key: jax.Array):
        params, sigma_J = states.parted(trained)
        model = module.merge(definition, params, stats)
        output = read(model, batch, key=key, train=True)
        losses, total = task_losses(output.predictions, output.auxiliary, batch, tasks, sigma_J)
        metrics = {f"loss/{name}": value for name, value in losses.items()}
        if sigma_J is not None:
            metrics |= {f"sigma/{task.name}": sigma_J[j] for j, task in enumerate(tasks)}
        own = own_losses(output, model, tasks)
        metrics |= own
        total = sum(own.values(), total)
        if output.records:
            kinds = _balance_losses(model)
            for name, weight in used.items():
                if name not in kinds:
                    continue
                value = kinds[name](output.records, groups or len(tasks))
                metrics[f"balance/{name}"] = value
                total += weight * value
            metrics["dropped"] = sum(
                (r.dropped for r in output.records.values()), jnp.zeros((), jnp.int32)
            )
            metrics |= {f"imbalance/{n}": imbalance(r) for n, r in output.records.items()}
        metrics["loss/total"] = total
        choices = exploration.choices(model, output.records)
        return total, PassRecord(metrics, module.updated_stats(model), choices)

    return loss


def _accumulated(gradient: Callable, parts: int) -> Callable:
    """`gradient` averaged over `parts` slices of the batch, statistics threaded through.

    Counts, such as tokens that were dropped, are those of the whole batch.
    """

    def run(params: Tree, stats: Tree, batch: DeviceBatch, key: jax.Array):
        def slices(x: jax.Array) -> jax.Array:
            # Interleaved rows: every slice keeps the batch's sharding.
            return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

        def body(carry, piece):
            stats, index, sums = carry
            (_, seen), grads = gradient(params, stats, piece, jax.random.fold_in(key, index))
            sums = jax.tree.map(lambda total, g: total + g, sums, grads)
            return (seen.stats, index + 1, sums), (seen.metrics, seen.choices)

        # Summed on the way: the gradients of all slices beside each other would take more memory
        # than slices save.
        sums = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, "f4")), params)
        (stats, _, sums), (metrics, choices) = jax.lax.scan(
            body, (stats, jnp.zeros((), jnp.int32), sums), jax.tree.map(slices, batch)
        )
        grads = jax.tree.map(lambda total, p: (total / parts).astype(p.dtype), sums, params)
        mean = jax.tree.map(lambda x: x.mean(0).astype(x.dtype), metrics)
        total = jax.tree.map(lambda x: x.sum(0), choices)
        counted = {n: x.sum(0) for n, x in metrics.items() if jnp.issubdtype(x.dtype, jnp.integer)}
        return (mean["loss/total"], PassRecord(mean | counted, stats, total)), grads

    return run


def rebalanced(definition: Any, params: Tree, seen: PassRecord) -> Tree:
    """The statistics after a step, with the state of routers moved by its choices."""
    if not seen.choices:
        return seen.stats
    model = module.merge(definition, params, seen.stats)
    exploration.observe(model, seen.choices)
    return module.updated_stats(model)


class ComputedStep(NamedTuple):
    """A step that was computed: its updates, the state that they make, the one before, metrics."""

    updates: Any
    new: Tree
    old: Tree
    metrics: dict[str, jax.Array]


Keep = Callable[[ComputedStep], tuple[Tree, dict[str, jax.Array]]]


def always(done: ComputedStep) -> tuple[Tree, dict[str, jax.Array]]:
    """The new state, whatever it is."""
    return done.new, done.metrics


def where_sound(done: ComputedStep) -> tuple[Tree, dict[str, jax.Array]]:
    """The new state, or the old one where loss, gradient or update are not finite.

    The metric `skipped` says which. The devices decide, and nobody waits for anything. The numbers
    of steps move in any case, that of the optimiser too: the schedule of its rate is one of steps.
    """
    metrics, new = done.metrics, done.new
    amounts = metrics["loss/total"], metrics["gradient_norm"], optax.global_norm(done.updates)
    sound = jnp.isfinite(jnp.stack([a.astype(jnp.float32) for a in amounts])).all()
    kept = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, done.old)

    def counted(a: jax.Array, b: jax.Array) -> jax.Array:
        return b if jnp.issubdtype(b.dtype, jnp.integer) else a

    moments = jax.tree.map(counted, kept["optimiser"], new["optimiser"])
    state = kept | {"optimiser": moments, "step": new["step"]}
    return state, metrics | {"skipped": ~sound}


class Update:
    """A compiled `(state, batch) -> (state, metrics)`.

    The seed is an argument of the program: runs that differ in nothing else compile once where
    there is a compilation cache.
    """

    def __init__(self, step: Any, seed: int):
        self._step = step
        self._seed_key = np.asarray(jax.random.key_data(jax.random.key(seed)))

    def __call__(self, state: Tree, batch: DeviceBatch) -> tuple[Tree, dict[str, jax.Array]]:
        return self._step(state, batch, self._seed_key)

    def compile(self, state: Tree, batch: DeviceBatch) -> tuple[Any, Any]:
        """The program for arguments of these shapes as `(state, batch) -> (state, metrics)`, and
        the compiler's object, which knows its memory."""
        compiled = self.trace(state, batch).lower().compile()
        return lambda state, batch: compiled(state, batch, self._seed_key), compiled

    def trace(self, state: Tree, batch: DeviceBatch) -> Any:
        """The program before it is lowered, for arguments that may be shapes."""
        return self._step.trace(state, batch, self._seed_key)

    def flops(self, state: Tree, batch: DeviceBatch) -> float:
        """Operations of its matrix products on all devices, for arguments that may be shapes."""
        return product_flops(self.trace(state, batch).jaxpr)


def make_step(
    definition: Any,
    loss: Callable,
    optimiser: optax.GradientTransformation,
    shardings: Tree,
    seed: int,
    accumulation: int = 1,
    adapt: optim.Adapt = optim.as_is,
    keep: Keep = where_sound,
) -> Update:
    """A jitted `(state, batch) -> (state, metrics)` that donates the state's buffers.

    The noise key is a function of `seed` and the step, so a resumed run repeats it exactly.
    `adapt` changes gradients before the optimiser sees them, and tells it more. `keep`
    decides which state a step leaves.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulation > 1:
        gradient = _accumulated(gradient, accumulation)

    def step(state: Tree, batch: DeviceBatch, seed_key: jax.Array):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed_key), state["step"])
        trained = states.trained(state)
        (_, seen), grads = gradient(trained, state["stats"], batch, key)
        # As they come: clipping and `adapt` would hide what training is like.
        metrics = seen.metrics | {"gradient_norm": optax.global_norm(grads)}
        adapted, told = adapt(grads, batch)
        updates, moments = optimiser.update(adapted, state["optimiser"], trained, **told)
        moved: Any = optax.apply_updates(trained, updates)
        new = {
            **states.as_state(moved),
            # After the update, of the whole batch's choices: the step's routing saw the old biases.
            "stats": rebalanced(definition, state["params"], seen),
            "optimiser": moments,
            "step": state["step"] + 1,
        }
        return keep(ComputedStep(updates, new, dict(state), metrics))

    # Placed as it came in: the new state lies in the old one's memory and is the next argument.
    return Update(jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)), seed)
