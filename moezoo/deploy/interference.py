"""How far tasks disagree about shared parameters: cosines of their gradients, layer by layer.

Two tasks whose gradients point apart (a negative cosine) undo each other's steps. Uni-Perceiver-MoE
(arXiv:2206.04674) explains with such measurements why routing by condition helps; Yu et al.
(arXiv:2001.06782) call it conflicting gradients. Parameters that only one of two tasks uses add
nothing to their product: of experts of their own the cosine is 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.tasks.base import Task
from moezoo.train.pictures import figure_of, save
from moezoo.train.setup import Loaded, load_run

LAYER = re.compile(r"^(.*?(?:blocks|layers)/\d+)/")
Read = Callable[..., Any]


class Interference(NamedTuple):
    """tasks, and by layer the cosines of their gradients [J, J]; NaN where a task has none."""

    tasks: tuple[str, ...]
    layers: dict[str, np.ndarray]


def layer_of(path: str) -> str:
    """The layer of a parameter: its block, else the first part of its path."""
    found = LAYER.match(path)
    return found[1] if found else path.partition("/")[0]


def gradients(
    parts: module.ModuleParts, task: Task, read: Read, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """The gradient of a task's mean loss over the batches, by the parameters' paths; no noise."""

    def loss(params: Any, batch: Mapping[str, Any]) -> jax.Array:
        model = module.merge(parts.definition, params, parts.stats)
        predicted = read(model, batch, train=False).predictions[task.name]
        return task.loss(predicted, batch[task.name], batch["valid"])

    gradient = jax.jit(jax.grad(loss))
    total, count = None, 0
    for batch in batches:
        rows = int(np.sum(batch["valid"]))  # the last batch may have fewer
        new = jax.tree.map(lambda g, rows=rows: rows * g, gradient(parts.params, batch))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count += rows
    if total is None:
        raise UserError("There is no batch to take gradients of.")
    return module.flatten(jax.tree.map(lambda g: g / count, total))


def cosines(gradients_J: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """By layer, the cosines [J, J] between the gradients of J tasks, float64.

    Scalars are left out: their cosines are signs.
    """
    products: dict[str, np.ndarray] = {}
    vectors = [path for path, first in gradients_J[0].items() if np.size(first) > 1]
    for path in vectors:
        # float64: cosines near 0 are differences of large sums.
        flat_JN = np.stack([np.asarray(g[path], np.float64).ravel() for g in gradients_J])
        layer = layer_of(path)
        products[layer] = products.get(layer, 0.0) + flat_JN @ flat_JN.T
    made = {}
    for layer, product_JJ in products.items():
        length_J = np.sqrt(np.diag(product_JJ))
        with np.errstate(invalid="ignore", divide="ignore"):
            made[layer] = product_JJ / np.outer(length_J, length_J)
    return module.in_order(made)


def of_run(path: Path, batches: int, size: int) -> Interference:
    """The interference of the trained tasks of a run, on its first training examples.

    Raises UserError where the folder holds no run, or one with a single task.
    """
    run = load_run(path)
    domain = run.config.data.domain
    tasks = _trained(run)
    if len(tasks) < 2:
        raise UserError(f"{path} was trained on one task: interference is between at least two.")
    source, parts = domain.open(run.config, "train"), module.split(run.model)
    found = []
    size = min(size, len(source))
    for task in tasks:
        given = domain.evaluation(source, batches * size, size, (task.name,), range(size))
        found.append(gradients(parts, task, domain.read, given))
    return Interference(tuple(task.name for task in tasks), cosines(found))


def _trained(run: Loaded) -> list[Task]:
    """The tasks that some step of the training was about."""
    shares = run.config.data.domain.shares(run.config)
    return [task for task in run.tasks if shares is None or task.name in shares]


def mean_between(cosines_JJ: np.ndarray) -> float:
    """The mean over all pairs of different tasks that both have a gradient; NaN where none do."""
    above = cosines_JJ[np.triu_indices(len(cosines_JJ), 1)]
    return float(np.nanmean(above)) if not np.isnan(above).all() else float("nan")


def draw(path: Path, found: Mapping[str, Interference]) -> None:
    """One row per run, one column per layer; red: tasks agree, blue: they pull apart."""
    layers = list(dict.fromkeys(layer for one in found.values() for layer in one.layers))
    tasks = max(len(one.tasks) for one in found.values())
    side = 0.9 + 0.42 * tasks
    figure, axes = figure_of(len(found), len(layers), (side * len(layers) + 1, side * len(found)))
    drawn = None
    for row, (name, one) in zip(axes, found.items(), strict=True):
        for column, (axis, layer) in enumerate(zip(row, layers, strict=True)):
            if layer not in one.layers:
                axis.set_axis_off()
                continue
            table_JJ = one.layers[layer]
            drawn = axis.imshow(table_JJ, cmap="RdBu_r", vmin=-1, vmax=1)
            for (i, j), value in np.ndenumerate(table_JJ):
                if i != j and not np.isnan(value):
                    ink = "white" if abs(value) > 0.6 else "black"
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
            shown = one.tasks if column == 0 else [""] * len(one.tasks)
            axis.set_yticks(range(len(one.tasks)), shown, fontsize=7)
            axis.set_xticks(range(len(one.tasks)), one.tasks, fontsize=7, rotation=90)
            axis.set_title(f"{layer}\nmean {mean_between(table_JJ):.2f}", fontsize=8)
        row[0].set_ylabel(name, fontsize=9)
    figure.colorbar(drawn, ax=axes, fraction=0.02, label="cosine of gradients")
    save(figure, path)
