"""Cutting one task's path out of a model, whole or with a plan of the experts to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.novices import MEAN, NoviceKind, Novices
from moezoo.deploy.path import PathLayer, TaskPath, shapes, unread
from moezoo.deploy.plan import Plan
from moezoo.deploy.pruned import path_layer, pruned_layer, rerouted_layer
from moezoo.deploy.specialise import layers_of, specialise
from moezoo.errors import UserError, unknown
from moezoo.nn import module, surgery
from moezoo.nn.moe import MoE
from moezoo.ops import grouped
from moezoo.ops.expert import Backend, count_experts

# Dropless, any batch size, one program for CPU, CUDA and TPU; what `auto` is on CPU and GPU. A
# layer with capacity drops choices when others crowd in; its path never does.
BACKEND: Backend = grouped.blocks

Remove = Callable[[TaskPath, Plan, Calibration, NoviceKind], TaskPath]


def task_path(model: Any, task: str, reads: InputSpec, *, number: int | None = None) -> TaskPath:
    """The whole path of one task: what only other tasks need leaves, exactly.

    The model has `tasks`, their names in the order of its routers, where no number of the task is
    given. Raises UserError for an
    unknown task and for routers of which nothing can be promised.
    """
    if task not in model.tasks:
        raise unknown("task of this model", task, list(model.tasks))
    own, mixtures = specialise(model, model.tasks.index(task) if number is None else number)
    experts, kept = dict[str, int](), dict[str, tuple[int, ...]]()
    for name, layer in layers_of(own).items():
        layer.apply = BACKEND
        experts[name] = count_experts(layer.experts.stacked())
        # What no token of the task can ask for leaves, which changes nothing.
        reach = getattr(layer.router, "reach", None)
        kept[name] = tuple(range(experts[name])) if reach is None else reach
        surgery.replace(own, name, path_layer(layer, kept[name], experts[name]))
    plan = Plan(task, kept, experts)
    return assemble(own, task, reads, plan, mixtures=mixtures)


def pruned(
    path: TaskPath, plan: Plan, novices: Mapping[str, Callable[[Sequence[int]], Novices]]
) -> TaskPath:
    """A whole path reduced to the experts of `plan`.

    novices: MoE layer path -> what stands in for experts of these ids, all that are not kept.
    Layers of which nothing is removed stay as they are. Raises UserError when the plan is of
    another task or another model.
    """

    def cut(name: str, layer: MoE) -> MoE:
        return pruned_layer(layer, plan.kept[name], novices[name](plan.removed(name)))

    return _reduced(path, plan, cut)


def with_stand_ins(
    path: TaskPath, plan: Plan, found: Calibration, kind: NoviceKind = MEAN
) -> TaskPath:
    """`pruned` with novices of a kind in the place of removed experts, those of least error."""
    return pruned(path, plan, {n: partial(kind.make, found.of(n)) for n in found.layers})


def rerouted(path: TaskPath, plan: Plan, found: Calibration, kind: NoviceKind = MEAN) -> TaskPath:
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
        if set(plan.kept[name]) != set(path.layers[name].kept):
            surgery.replace(model, name, cut(name, layer))
    return assemble(model, path.task, path.input, plan, mixtures=path.mixtures)


# What becomes of the routers of a path that loses experts: they stay whole and novices answer, or
# they lose the experts' columns.
REMOVALS: dict[str, Remove] = {"whole": with_stand_ins, "cut": rerouted}


def assemble(
    model: Any,
    task: str,
    reads: InputSpec,
    plan: Plan,
    layers: Mapping[str, PathLayer] | None = None,
    mixtures: Mapping[str, PathLayer] | None = None,
) -> TaskPath:
    """A path that holds only what is read, found by tracing the whole.

    model: `(batch, tasks=)` to a `MultiTaskOutput`. layers: by the names of its records, where
    those are not its MoE layers. mixtures: as `specialise.Specialised` says.
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
        mixtures=dict(mixtures or {}),
    )
    names = unread(whole.call, whole.weights, reads.batch(1))
    absent = shapes({name: whole.weights[name] for name in names})
    used = {name: a for name, a in whole.weights.items() if name not in absent}
    # Of mixtures that other tasks have for themselves nothing is read.
    there = {
        at: layer
        for at, layer in whole.mixtures.items()
        if not layer.kept or any(name.startswith(f"{at}/") for name in used)
    }
    return replace(whole, weights=used, absent=absent, mixtures=there)


def _layer(layer: Any, name: str, plan: Plan) -> PathLayer:
    router, reach = layer.router, getattr(layer.router, "reach", None)
    kept, hidden = tuple(plan.kept[name]), layer.experts.hidden
    return PathLayer(router.decision, plan.experts[name], kept, router.k, reach, hidden)


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
    for name, layer in path.layers.items():
        outside = sorted(set(plan.kept[name]) - set(layer.within))
        if outside:
            raise UserError(
                f"The pruning plan keeps experts {outside} of {name}, which no token of "
                f"{path.task} can ask for: it has {list(layer.within)}."
            )
