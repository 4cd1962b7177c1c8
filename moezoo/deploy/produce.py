"""From a run's folder to one task's path, whole or pruned, with its certificate."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.data.source import Info, Source
from moezoo.deploy import calibrate, certificate, compare, cost, scores, splits, task_path
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.manifest import Facts
from moezoo.deploy.path import TaskPath
from moezoo.deploy.plan import Plan
from moezoo.deploy.usage import Usage, weighted_mean_outputs
from moezoo.domains.audio import export as hearing
from moezoo.domains.audio.data.config import AudioDataConfig
from moezoo.domains.audio.export import Heard
from moezoo.domains.images import training as domains
from moezoo.domains.images.data import config as data_config
from moezoo.domains.images.data import transforms
from moezoo.domains.images.training import images_of
from moezoo.domains.pairs import export as chooser
from moezoo.domains.pairs.domain import Pairs
from moezoo.domains.pairs.export import Asked
from moezoo.errors import UserError, unknown
from moezoo.tasks import registry
from moezoo.tasks.base import Task
from moezoo.train import config as configs
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.restore import read_config
from moezoo.train.setup import load_run


@dataclass(frozen=True)
class Request:
    """What is asked for.

    keep: experts per MoE layer, or None for all.   total: experts over all layers instead, where
    every layer keeps at least as many as a token chooses.   usage: the share of a layer's choices
    in percent, times k, above which an expert stays instead.   score: of `scores.SELECTIONS`.
    calibration: training images.   batch: images per step. Raises UserError for numbers below 1.
    """

    keep: int | None = None
    total: int | None = None
    usage: float | None = None
    score: str = "reap"
    calibration: int = 256
    batch: int = 32

    def __post_init__(self) -> None:
        for name in ("keep", "total", "calibration", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1.")
        if self.usage is not None and not 0 <= self.usage <= 100:
            raise UserError(f"--usage is {self.usage}; it is a share, between 0 and 100 %.")

    @property
    def whole(self) -> bool:
        """Whether all experts stay."""
        return (self.keep, self.total, self.usage) == (None, None, None)


class Opened(NamedTuple):
    """A run that paths are cut from: what of it takes images alone, or spectrograms."""

    run: Path
    config: Config
    size: tuple[int, int]
    tasks: dict[str, Task]
    model: Any
    step: int
    parts: splits.Parts
    info: Info


class Produced(NamedTuple):
    """A path and everything that is known about it; `calibration` is None for a whole path."""

    path: TaskPath
    whole: TaskPath
    task: Task
    calibration: Calibration | None
    certificate: dict[str, Any]

    @property
    def unit(self) -> str:
        """What its examples are called."""
        return "images" if self.path.channels else "clips"


def open_run(
    run: Path, calibration: int, task: str | None = None, *, fewer: bool = False
) -> Opened:
    """A run's newest valid checkpoint and its data, divided for pruning.

    task, fewer: what will be asked for, where that is known: see `chooser.check`.
    Raises UserError where the folder holds no run or the data cannot be had.
    """
    config = read_config(run)
    chooser.check(config, task, fewer=fewer)
    hearing.check(config, fewer=fewer)
    data, domain = _data_of(config), domains.of(config)
    train, test = (_open(config, split) for split in ("train", "test"))
    classes = domain.classes(test)
    loaded = load_run(run, classes.counts, classes.names, classes.colours)
    tasks, model = {task.name: task for task in loaded.tasks}, loaded.model
    if isinstance(domain, Pairs):
        name, reading = chooser.TASK, domain.reading
        labels = classes.names[name]
        tasks = {name: registry.build(name, classes=len(labels), names=labels)}
        model = Asked(model, name, reading.candidates[name], reading.pad)
    if isinstance(data, AudioDataConfig):
        model = Heard(model)
    parts = splits.divide(data, train, test, calibration)
    size = test.info.resolution
    return Opened(run, config, size, tasks, model, loaded.step, parts, test.info)


def _data_of(config: Config) -> splits.Data:
    return config.data if isinstance(config.data, AudioDataConfig) else images_of(config)


def _open(config: Config, split: str) -> Source:
    data = _data_of(config)
    if isinstance(data, AudioDataConfig):
        return domains.of(config).open(config, split)
    return data_config.open_source(data, split)


def whole_path(opened: Opened, task: str) -> TaskPath:
    """The path of one task with all its experts."""
    if task not in opened.tasks:
        raise unknown("task of this run", task, list(opened.tasks))
    cut = chooser.choosing_path if isinstance(opened.model, Asked) else task_path.task_path
    return cut(opened.model, task, opened.size)


def removable(opened: Opened, whole: TaskPath) -> bool:
    """Whether experts of a path can be removed."""
    return bool(whole.layers) and not isinstance(opened.model, Asked)


def produce(opened: Opened, task: str, request: Request, console: Console) -> Produced:
    """Cut, prune and certify one task's path as requested."""
    whole = whole_path(opened, task)
    if request.whole:
        path, found = whole, None
    else:
        _check(whole, request)
        chooser.check(opened.config, task, fewer=True)
        found = measure(opened, whole, request, console)
        path = prune(whole, found, request)
    stated = certify(opened, whole, path, found, request, console)
    return Produced(path, whole, opened.tasks[task], found, stated)


def measure(opened: Opened, whole: TaskPath, request: Request, console: Console) -> Calibration:
    """Usage statistics on the calibration examples."""
    part = opened.parts.calibration
    with console.progress(f"calibrate {whole.task}", len(part.source), unit=part.unit) as bar:
        batches = part.batches(request.batch, whole.task)
        return calibrate.calibrate(whole, batches, part.fingerprint, bar.advance)


def prune(whole: TaskPath, found: Calibration, request: Request) -> TaskPath:
    """The path without the experts that the request has no place for."""
    plan = make_plan(whole, found, request)
    means = {name: weighted_mean_outputs(usage) for name, usage in found.layers.items()}
    return task_path.pruned(whole, plan, means)


def make_plan(whole: TaskPath, found: Calibration, request: Request) -> Plan:
    """The experts to keep."""
    layers: dict[str, Usage] = found.layers
    experts = {name: layer.experts for name, layer in whole.layers.items()}
    if request.usage is not None:
        kept = scores.used(layers, request.usage, found.chosen)
        budget = f"share of choices above {request.usage:g} % / k"
        return Plan(whole.task, kept, experts, "frequency", budget, found.fingerprint)
    if request.total is not None:
        kept = scores.spread(layers, request.score, request.total, found.chosen)
        budget = f"{request.total} over all layers"
    else:
        kept = scores.uniform(layers, request.score, request.keep or 0)
        budget = f"{request.keep} per layer"
    return Plan(whole.task, kept, experts, request.score, budget, found.fingerprint)


def _check(whole: TaskPath, request: Request) -> None:
    """What can be refused before the calibration."""
    given = (request.keep, request.total, request.usage)
    if sum(value is not None for value in given) > 1:
        raise UserError(
            "Give one of --keep (experts per layer), --total (over all layers) and --usage."
        )
    fewest = min((layer.experts for layer in whole.layers.values()), default=0)
    if whole.layers and request.keep is not None and not 1 <= request.keep <= fewest:
        raise UserError(
            f"Cannot keep {request.keep} experts per layer: the model has {fewest}, so --keep "
            f"must lie between 1 and {fewest}."
        )


def certify(
    opened: Opened,
    whole: TaskPath,
    path: TaskPath,
    found: Calibration | None,
    request: Request,
    console: Console,
) -> dict[str, Any]:
    """The certificate of a path."""
    task, parts = opened.tasks[path.task], opened.parts
    stated = certificate.contents(path)
    stated |= {"source": {"run": opened.run.name, "step": opened.step}}
    if isinstance(opened.model, Asked):
        stated |= chooser.stated(opened.model, path, golden_inputs(opened, 8))
    if isinstance(opened.model, Heard):
        apart = certificate.apart(opened.model, path, golden_inputs(opened, 8), parts.test.unit)
        stated |= {"statement": hearing.STATEMENT, "full_model": apart}
    stated |= {"cost": cost.of_path(path, opened.config.model, task)}

    def compared(part: splits.Part, title: str) -> compare.Compared:
        with console.progress(f"{title} {path.task}", len(part.source), unit=part.unit) as bar:
            batches = part.batches(request.batch, task.truth)
            return compare.compare(whole, path, task, batches, bar.advance)

    if found is not None:
        stated |= {"calibration": certificate.calibration(found, parts.calibration, path)}
        held = compared(parts.verification, "verify")
        stated |= {"verification": certificate.verification(held, parts.verification, path, task)}
    last = compared(parts.test, "test")
    return stated | {"test": certificate.scores(last, parts.test, task)}


def facts(opened: Opened, task: str) -> Facts:
    """What an export's manifest says that the path does not know."""
    labels, data = opened.info.labels.get(task), opened.config.data
    return Facts(
        mean=tuple(float(m) for m in transforms.MEAN),
        std=tuple(float(s) for s in transforms.STD),
        labels=() if labels is None else tuple(labels.names),
        source=f"{opened.run.name}, step {opened.step}",
        training_data=data.name,
        sound=hearing.facts(data) if isinstance(data, AudioDataConfig) else None,
    )


def config_of(opened: Opened) -> dict[str, Any]:
    """The run's configuration as plain data."""
    return json.loads(configs.to_json(opened.config))


def fitted(opened: Opened, task: Task, count: int = 32) -> Task:
    """The task with its pictures on the scale of a few verification labels."""
    batch = next(opened.parts.verification.batches(count, task.name))
    return replace(task, picture=task.picture.fitted(batch[task.name]))


def golden_inputs(opened: Opened, count: int = 2) -> np.ndarray:
    """A few verification examples, normalised images [B,H,W,3] or spectrograms [B,T,F], float32."""
    task = next(iter(opened.tasks.values()))
    return next(opened.parts.verification.batches(count, task.truth))["image"]
