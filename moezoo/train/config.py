"""The configuration of a run: its parts, its checks, reading it from files and command lines."""

from __future__ import annotations

import math

from moezoo import fields
from moezoo.errors import UserError
from moezoo.models.shared.config import traits
from moezoo.train import mesh as meshes
from moezoo.train import optim, profile, upcycling
from moezoo.train.config_file import load
from moezoo.train.config_json import from_json, to_json
from moezoo.train.domain import check_kinds
from moezoo.train.optim import OptimConfig
from moezoo.train.overrides import parse
from moezoo.train.schema import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    HostsConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    TaskWeights,
    TrainConfig,
    UpcycleConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "EvaluateConfig",
    "HostsConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "TaskWeights",
    "TrainConfig",
    "UpcycleConfig",
    "from_json",
    "load",
    "parse",
    "to_json",
    "validate",
]


DEFAULT = TrainConfig()


def validate(config: Config, device_count: int) -> None:
    """UserError with the first disagreement between the parts of a configuration.

    Checks what needs no model: numbers in range, tasks that exist, the mesh against the devices,
    the batch against mesh and accumulation, experts against the mesh, image against patch size.
    """
    fields.check(config, root=config)
    _check_run(config)
    _check_tasks(config)
    check_kinds(config)
    domain = config.data.domain
    domain.check(config)
    optim.check(config.optimiser, config.train.steps)
    profile.check(config.log.profile, config.train.steps, config.directory)
    shape = meshes.resolve(config.mesh, device_count)
    _check_batch(config, math.prod(shape[:3]))
    _check_gradients(config)
    model = traits(config.model)
    model.check_steps(config.train.steps)
    model.check_mesh(shape[2])
    model.check_size(domain.size(config))
    check_losses(config, domain.groups(config))


def _check_run(config: Config) -> None:
    if any(part in ("", ".", "..") or "\\" in part for part in config.name.split("/")):
        raise UserError(f"name is '{fields.short(config.name)}'; it must be a folder's name.")
    alone = [name for name in ("start_heads", "start_without") if getattr(config, name)]
    if config.start_from is None and alone:
        raise UserError(f"{alone[0]} is about start_from, which is not given: leave it out.")
    changed = upcycling.changed(config.upcycle)
    if config.start_from is None and changed:
        raise UserError(f"{changed[0]} is about start_from, which is not given: leave it out.")
    if config.upcycle.noise == 0 and "upcycle.noise_share" in changed:
        raise UserError(
            f"upcycle.noise_share is {config.upcycle.noise_share}, but upcycle.noise is 0, which "
            "no expert gets: set it, or leave the share out."
        )
    if not config.name.isprintable():
        raise UserError(f"name is {config.name!r}; it must have printable characters only.")


def check_losses(config: Config, groups: int | None) -> None:
    """UserError for a balance loss that could teach the model's routers nothing.

    groups: how many tasks tokens are numbered by; None: not known before there is data. A factor
    that is the default was not asked for.
    """
    for name, reason in traits(config.model).idle_losses(groups).items():
        weight = getattr(config.train, f"{name}_weight")
        if weight > 0 and weight != getattr(DEFAULT, f"{name}_weight"):
            raise UserError(f"train.{name}_weight is {weight}, but {reason}.")


def _check_tasks(config: Config) -> None:
    tasks, domain = config.tasks, config.data.domain
    if not tasks:
        some = " ".join(list(domain.tasks)[:2])
        raise UserError(f"tasks is empty; name at least one, for example: --tasks {some}.")
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise UserError(f"tasks names {', '.join(twice)} twice; name every task once.")


def _check_gradients(config: Config) -> None:
    if config.train.task_gradients == "as_is":
        return
    if config.data.domain.shares(config) is None:
        raise UserError(
            f"train.task_gradients is normalised, but in runs on {config.data.domain.name} a step "
            "is not one task's: leave it as_is."
        )
    if config.optimiser.kind != "adamw":
        raise UserError(
            f"train.task_gradients is normalised, which changes the moments of adamw; "
            f"optimiser.kind is {config.optimiser.kind}."
        )


def _check_batch(config: Config, shards: int) -> None:
    slices = config.train.gradient_accumulation
    batches = {"train.batch": (config.train.batch, shards * slices)}
    if config.evaluate.batch is not None:
        batches["evaluate.batch"] = (config.evaluate.batch, shards)
    for name, (batch, parts) in batches.items():
        if batch % parts:
            lower, upper = batch // parts * parts, -(-batch // parts) * parts
            near = f"{lower} or {upper}" if lower else str(upper)
            into = f" in {parts // shards} slices" if parts > shards else ""
            raise UserError(
                f"{name} is {batch}, which does not split evenly over {shards} devices "
                f"(mesh data x fsdp x expert){into}; take {near}."
            )
