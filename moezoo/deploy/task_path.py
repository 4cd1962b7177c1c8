"""Cutting one task's path out of a model, whole or with a plan of the experts to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import PathLayer, TaskPath, shapes, unread
from moezoo.deploy.plan import Plan, keep_all
from moezoo.deploy.pruned import path_layer, rerouted_layer
from moezoo.deploy.specialise import layers_of, specialise
from moezoo.deploy.usage import Usage, weighted_mean_outputs
from moezoo.errors import UserError, unknown
from moezoo.nn import module, surgery
from moezoo.nn.moe import MoE
from moezoo.ops import grouped
from moezoo.ops.expert import Backend, count_experts

# Dropless, any batch size, one program for CPU, CUDA and TPU; what `auto` is on CPU and GPU. A
# layer with capacity drops choices when others crowd in; its path never does.
BACKEND: Backend = grouped.blocks


def task_path(model: Any, task: str, reads: InputSpec) -> TaskPath:
    """The whole path of one task: what only other tasks need leaves, exactly.

    The model has `tasks`, their names in the order of its routers. Raises UserError for an
    unknown task and for routers of which nothing can be promised.
    """
    if task not in model.tasks:
        raise unknown("task of this model", task, list(model.tasks))
    own = specialise(model, model.tasks.index(task))
    experts = {name: _experts(layer) for name, layer in layers_of(own).items()}
    for name, layer in layers_of(own).items():
        layer.apply = BACKEND
        surgery.replace(own, name, path_layer(layer, range(experts[name]), jnp.zeros((0, 0))))
    return assemble(own, task, reads, keep_all(task, experts))


def pruned(path: TaskPath, plan: Plan, means: Mapping[str, np.ndarray]) -> TaskPath:
    """A whole path reduced to the experts of `plan`.

    means: MoE layer path -> mean output of every expert [E, D], see `usage.mean_outputs`.
    Layers of which nothing is removed stay as they are. Raises UserError when the plan is of
    another task or another model.
    """

    def cut(name: str, layer: MoE) -> MoE:
        return path_layer(
            layer, plan.kept[name], jnp.asarray(means[name][list(plan.removed(name))])
        )

    return _reduced(path, plan, cut)


def with_stand_ins(path: TaskPath, plan: Plan, layers: Mapping[str, Usage]) -> TaskPath:
    """`pruned` with the constants of least squared error in the place of removed experts."""
    means = {name: weighted_mean_outputs(usage) for name, usage in layers.items()}
    return pruned(path, plan, means)


def rerouted(path: TaskPath, plan: Plan, layers: Mapping[str, Usage]) -> TaskPath:
    """A whole path reduced to the experts of `plan`, among which all tokens choose; no stand-ins.

    What a router does without the columns of removed experts (`pruned.Rerouted`). Raises UserError
    as `pruned`, and where a layer keeps fewer experts than a token chooses.
    """
    _check(path, plan)
    for name, layer in path.layers.items():
        if len(plan.kept[name]) < layer.chosen:
            raise UserError(
                f"The pruning plan keeps {len(plan.kept[name])} experts in {name}, but a token "
                f"chooses {layer.chosen}: keep at least as many."
            )
    return _reduced(path, plan, lambda name, layer: rerouted_layer(layer, plan.kept[name]))


def _reduced(path: TaskPath, plan: Plan, cut: Callable[[str, MoE], MoE]) -> TaskPath:
    """The path with `cut(name, layer)` in the place of every layer that loses experts."""
    _check(path, plan)
    model = path.module(path.weights)
    for name, layer in layers_of(model).items():
        if plan.removed(name):
            surgery.replace(model, name, cut(name, layer))
    return assemble(model, path.task, path.input, plan)


def assemble(
    model: Any,
    task: str,
    reads: InputSpec,
    plan: Plan,
    layers: Mapping[str, PathLayer] | None = None,
) -> TaskPath:
    """A path that holds only what is read, found by tracing the whole.

    model: `(batch, tasks=)` to a `MultiTaskOutput`. layers: by the names of its records, where
    those are not its MoE layers.
    """
    definition, params, stats = module.split(model)
    flat_params, flat_stats = module.flatten(params), module.flatten(stats)
    if layers is None:
        layers = {name: _layer(layer, name, plan) for name, layer in layers_of(model).items()}
    whole = TaskPath(
        task=task,
        input=reads,
        weights=flat_params | flat_stats,
        definition=definition,
        stats=frozenset(flat_stats),
        absent={},
        layers=dict(layers),
        plan=plan,
    )
    names = unread(whole.call, whole.weights, reads.batch(1))
    absent = shapes({name: whole.weights[name] for name in names})
    used = {name: a for name, a in whole.weights.items() if name not in absent}
    path = replace(whole, weights=used, absent=absent)
    # An export holds what this path names: a weight too many would be one that nobody reads.
    left = unread(path.call, used, reads.batch(1))
    if left:
        raise AssertionError(f"still unread after removing {len(absent)} arrays: {left}")
    return path


def _layer(layer: Any, name: str, plan: Plan) -> PathLayer:
    router = layer.router
    return PathLayer(router.decision, plan.experts[name], tuple(plan.kept[name]), router.k)


def _experts(layer: MoE) -> int:
    return count_experts(layer.experts.stacked())


def _check(path: TaskPath, plan: Plan) -> None:
    if plan.task != path.task:
        raise UserError(f"The pruning plan is for task {plan.task}, this path is {path.task}.")
    if not path.exact:
        raise UserError("A path can be pruned once; start from the whole path of the task.")
    have = {name: layer.experts for name, layer in path.layers.items()}
    if dict(plan.experts) != have or set(plan.kept) != set(have):
        raise UserError(
            f"The pruning plan is for another model: its layers are {dict(plan.experts)}, "
            f"this model's are {have}."
        )
