"""From a run's folder to one task's path, whole or pruned, with its certificate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.deploy import (
    calibrate,
    certificate,
    compare,
    cost,
    novices,
    recover,
    rounded,
    scores,
    splits,
)
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.exporter import Exporter, Subject
from moezoo.deploy.manifest import Facts
from moezoo.deploy.novices import NoviceKind
from moezoo.deploy.path import TaskPath
from moezoo.deploy.plan import Plan
from moezoo.deploy.recover import Lost, Recovered, Recovery
from moezoo.deploy.task_path import Remove
from moezoo.errors import UserError, unknown
from moezoo.models.shared.config import traits
from moezoo.tasks.base import Task
from moezoo.train import config as configs
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.domain import Classes
from moezoo.train.restore import read_config
from moezoo.train.setup import Loaded, load_run


@dataclass(frozen=True)
class Request:
    """What is asked for; of the first six at most one, none for all experts.

    keep: experts per MoE layer.   total: experts over all layers instead, where every layer keeps
    at least as many as a token chooses.   usage: the share of a layer's choices in percent, times
    k, above which an expert stays instead.   parameters, bytes: of the whole path's weights, at
    most.   flops: of an example, at most, as the calibration examples would spend them on average.
    score: of `scores.SELECTIONS`.   novice: of `novices.by_name`.   router: of the subject's
    `removals`; None: its usual one.   weights: of `rounded.TYPES`, how they are stored.
    calibration: training images.   batch: images per step.   recover, recover_steps, recover_lr,
    recover_trains: `recover.Recovery`, None for its usual numbers.
    Raises UserError for numbers below 1 and for options that exclude each other.
    """

    keep: int | None = None
    total: int | None = None
    usage: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    flops: int | None = None
    score: str = "reap"
    novice: str | None = None
    router: str | None = None
    weights: str = "float32"
    calibration: int = 256
    batch: int = 32
    recover: str = "none"
    recover_steps: int | None = None
    recover_lr: float | None = None
    recover_trains: str | None = None

    def __post_init__(self) -> None:
        for name in ("keep", "total", "parameters", "bytes", "flops", "calibration", "batch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UserError(f"--{name} is {value!r:.60}; it must be a whole number.")
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1.")
        if self.score not in scores.SELECTIONS:
            raise unknown("score", str(self.score), list(scores.SELECTIONS))
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} both say how much stays: give one.")
        if self.usage is not None and not 0 <= self.usage <= 100:
            raise UserError(f"--usage is {self.usage}; it is a share, between 0 and 100 %.")
        if self.score == "gram" and given and given[0] != "keep":
            scores.by_name("gram")
        if self.router == "cut" and self.novice is not None:
            raise UserError(
                f"--novice is {self.novice}, but with --router cut tokens choose among the experts "
                "that stay, and no novice is asked: leave one of the two out."
            )
        if self.weights not in rounded.TYPES:
            raise unknown("type of --weights", str(self.weights), list(rounded.TYPES))
        novices.by_name(self.novice or novices.MEAN.name)
        # A sweep does all of them, and here nobody knows of one.
        self._recovery(() if self.recover == "none" else recover.KINDS)

    @property
    def recovery(self) -> Recovery:
        """What is done after experts were removed.

        Raises UserError where an option of recovery is given that this kind does not use.
        """
        return self._recovery((self.recover,))

    def _recovery(self, kinds: Sequence[str]) -> Recovery:
        given = {name: getattr(self, f"recover_{name}") for name in recover.USES}
        return recover.recovery_of(self.recover, kinds, **given)

    @property
    def whole(self) -> bool:
        """Whether all experts stay."""
        return all(getattr(self, name) is None for name in BUDGETS)

    def changed(self, **budget: Any) -> Request:
        """The same with another budget."""
        return replace(self, **{**dict.fromkeys(BUDGETS), **budget})


BUDGETS = ("keep", "total", "usage", "parameters", "bytes", "flops")


class TrainedRun(NamedTuple):
    """A run that paths are cut from.

    name: what certificates and manifests call it.   size: what its model was built for.
    labels: names of classes by task.
    """

    name: str
    config: Config
    exporter: Exporter
    subject: Subject
    size: tuple[int, int]
    step: int
    parts: splits.Subsets
    labels: Mapping[str, tuple[str, ...]]


class Produced(NamedTuple):
    """A path and everything that is known about it; `calibration` is None for a whole path."""

    path: TaskPath
    whole: TaskPath
    task: Task
    calibration: Calibration | None
    certificate: dict[str, Any]


def open_run(
    run: Path, calibration: int, task: str | None = None, *, fewer: bool = False
) -> TrainedRun:
    """A run's newest valid checkpoint and its data, divided for pruning.

    task, fewer: what will be asked for, where that is known; fewer: experts are to be removed.
    Raises UserError where the folder holds no run, one that has no paths, or the data cannot be
    had.
    """
    config = read_config(run)
    check_before(config, task, fewer=fewer)
    train, test, classes = _open(config)
    return _trained(run.name, load_run(run, classes), (train, test), classes, calibration)


def open_model(
    loaded: Loaded, calibration: int, task: str | None = None, *, fewer: bool = False
) -> TrainedRun:
    """As `open_run`, of a model that is loaded already, under its configuration's name."""
    check_before(loaded.config, task, fewer=fewer)
    train, test, classes = _open(loaded.config)
    return _trained(loaded.config.name, loaded, (train, test), classes, calibration)


def check_before(config: Config, task: str | None = None, *, fewer: bool = False) -> None:
    """UserError where a run has no such path, before data is opened or made, which takes long."""
    config.data.domain.exports(config).check(task)
    if fewer:
        check_removable(config)


def _open(config: Config) -> tuple[Any, Any, Classes]:
    domain = config.data.domain
    exporter: Exporter = domain.exports(config)
    train, test = exporter.open("train"), exporter.open("test")
    return train, test, domain.classes(config, test)


def _trained(
    name: str, loaded: Loaded, data: tuple[Any, Any], classes: Classes, calibration: int
) -> TrainedRun:
    config = loaded.config
    exporter: Exporter = config.data.domain.exports(config)
    return TrainedRun(
        name,
        config,
        exporter,
        exporter.subject(loaded, classes),
        config.data.domain.size(config),
        loaded.step,
        splits.divide(exporter, *data, calibration),
        classes.names,
    )


def whole_path(trained: TrainedRun, task: str) -> TaskPath:
    """The path of one task with all its experts."""
    subject = trained.subject
    if task not in subject.tasks:
        raise unknown("task of this run", task, list(subject.tasks))
    return subject.cut(subject.model, task, trained.exporter.input)


def removable(trained: TrainedRun, whole: TaskPath) -> bool:
    """Whether experts of a path can be removed."""
    return bool(whole.layers) and traits(trained.config.model).whole() is None


def check_removable(config: Config) -> None:
    """Raise UserError where no expert of the configured model can be removed."""
    why = traits(config.model).whole()
    if why is not None:
        raise UserError(
            f"No expert of {config.name} can be removed, because {why}: export the task as it is, "
            "with moezoo export and without --keep."
        )


def produce(
    trained: TrainedRun,
    task: str,
    request: Request,
    console: Console,
    *,
    found: Calibration | None = None,
) -> Produced:
    """Cut, prune and certify one task's path as requested.

    found: what was measured on the calibration examples already, with the moments that the
    request's novices need.
    """
    whole, told = whole_path(trained, task), dict[str, Any]()
    if request.whole:
        if request.recover != "none":
            raise UserError(
                f"--recover {request.recover} has nothing to recover: say how much stays (--keep)."
            )
        path, found = whole, None
    else:
        _check(whole, request)
        check_removable(trained.config)
        found = found or measure(trained, whole, request, console)
        path, found, told = recovered(trained, whole, found, request, console)
    exact, path = path, rounded.rounded(path, request.weights)
    stated = certify(trained, whole, path, found, request, console)
    if told:
        stated |= {"recovery": told}
    if told and request.recovery.learns:
        stated |= {"statement": certificate.LEARNED.format(part=LEARNS[request.recover])}
    if path is not exact:
        stated |= {"weights": rounded.described(path, exact, request.weights)}
        stated["statement"] += ROUNDED
    return Produced(path, whole, trained.subject.tasks[task], found, stated)


ROUNDED = (
    " Weights are stored in fewer bits: all outputs differ from those of the float32 weights, by "
    "what `verification` and `test` say."
)


def measure(
    trained: TrainedRun, whole: TaskPath, request: Request, console: Console
) -> Calibration:
    """Usage statistics on the calibration examples."""
    _, kind = way(trained, request)
    part = trained.parts.calibration
    with console.progress(f"calibrate {whole.task}", len(part.source), unit=part.unit) as bar:
        batches = part.batches(request.batch, whole.task)
        seen = part.fingerprint, bar.advance
        return calibrate.calibrate(whole, batches, *seen, moments=kind.moments)


def routers_of(trained: TrainedRun, request: Request) -> str:
    """What becomes of the routers, a name of the subject's `removals`.

    Raises UserError for one that the model's format has no place for.
    """
    ways = trained.subject.removals
    name = request.router or next(iter(ways))
    if name not in ways:
        others = " or ".join(f"--router {way}" for way in ways)
        raise UserError(
            f"--router is {name}, for which this kind of model has no place: give {others}."
        )
    if name != "cut":
        return name
    if request.novice is not None:
        raise UserError(
            f"--novice is {request.novice}, but this kind of model has no place for novices: its "
            "routers lose the columns of removed experts. Leave it out."
        )
    if request.flops is not None:
        raise UserError(
            "--flops is given, but with routers that are cut every token still runs as many "
            "experts: give --keep, --total, --parameters or --bytes."
        )
    return name


def way(trained: TrainedRun, request: Request) -> tuple[Remove, NoviceKind]:
    """How experts are removed, and what answers for them; raises UserError as `routers_of`."""
    remove = trained.subject.removals[routers_of(trained, request)]
    return remove, novices.by_name(request.novice or novices.MEAN.name)


def prune(trained: TrainedRun, whole: TaskPath, found: Calibration, request: Request) -> TaskPath:
    """The path without the experts that the request has no place for."""
    remove, kind = way(trained, request)
    plan = make_plan(trained, whole, found, request)
    return remove(whole, plan, found, kind)


# What `recover` changes, in a certificate's words.
LEARNS = {"router": "Its routers were", "finetune": "Weights of the full model were"}


def recovered(
    trained: TrainedRun,
    whole: TaskPath,
    found: Calibration,
    request: Request,
    console: Console,
) -> Recovered:
    """The path without the experts that the request has no place for, after its recovery."""
    remove, kind = way(trained, request)
    plan = make_plan(trained, whole, found, request)
    lost = lost_of(trained, whole, found, plan, request)
    return recover.recovered(lost, remove(whole, plan, found, kind), request.recovery, console)


def lost_of(
    trained: TrainedRun, whole: TaskPath, found: Calibration, plan: Plan, request: Request
) -> Lost:
    """What a recovery of the plan's path works on."""
    remove, kind = way(trained, request)
    part, subject = trained.parts.calibration, trained.subject

    def batches() -> Iterator[dict[str, Any]]:
        return part.batches(request.batch, whole.task)

    def layers(seen: Calibration) -> scores.Layers:
        return candidates(whole, seen)

    task = subject.tasks[whole.task]
    return Lost(whole, plan, found, kind, remove, batches, layers, task, subject.head(whole.task))


def make_plan(trained: TrainedRun, whole: TaskPath, found: Calibration, request: Request) -> Plan:
    """The experts to keep."""
    layers = candidates(whole, found)
    kept, budget = _kept(trained, whole, layers, found, request)
    cut = routers_of(trained, request) == "cut"
    stand_ins = "cut" if cut else request.novice or novices.MEAN.name
    return Plan(
        task=whole.task,
        kept=kept,
        experts={name: layer.experts for name, layer in whole.layers.items()},
        score="frequency" if request.usage is not None else request.score,
        budget=budget,
        calibration=found.fingerprint,
        novices=stand_ins,
    )


def candidates(whole: TaskPath, found: Calibration) -> scores.Layers:
    """The layers that experts are chosen in."""
    return {
        name: scores.Candidates(found.layers[name], layer.within, layer.chosen)
        for name, layer in whole.layers.items()
    }


def _kept(
    trained: TrainedRun,
    whole: TaskPath,
    layers: scores.Layers,
    found: Calibration,
    request: Request,
) -> tuple[scores.Kept, str]:
    """The experts to keep, and the budget in words."""
    if request.usage is not None:
        words = f"share of choices above {request.usage:g} % / k"
        return scores.used(layers, request.usage), words
    if request.total is not None:
        return scores.spread(layers, request.score, request.total), f"{request.total} in all"
    for name in ("parameters", "bytes", "flops"):
        most = getattr(request, name)
        if most is not None:
            price, cost_of = costs(trained, whole, found, request, name)
            kept = scores.cheapest(layers, request.score, price, cost_of, most)
            return kept, f"at most {most:,} {name}"
    # `keep` is there: a request for all experts needs no plan.
    return scores.uniform(layers, request.score, request.keep or 0), f"{request.keep} per layer"


def costs(
    trained: TrainedRun, whole: TaskPath, found: Calibration, request: Request, unit: str
) -> tuple[dict[str, float], Callable[[scores.Kept], float]]:
    """What an expert of each layer costs, and what a choice of experts costs altogether."""
    if unit == "flops":
        return _flops(trained, whole, found)
    _, kind = way(trained, request)
    cut = routers_of(trained, request) == "cut"
    scalar = 1 if unit == "parameters" else np.dtype(np.float32).itemsize
    price, instead = dict[str, float](), dict[str, float]()
    for name, size in cost.expert_sizes(whole).items():
        price[name] = float(getattr(size, unit))
        width = found.layers[name].output_ED.shape[1]
        instead[name] = 0.0 if cut else float(scalar * kind.size(width))
    everything = {"parameters": cost.parameters, "bytes": cost.bytes_of}[unit](whole.weights)

    def stored(kept: scores.Kept) -> float:
        gone = {name: len(layer.kept) - len(kept[name]) for name, layer in whole.layers.items()}
        return everything - sum((price[name] - instead[name]) * n for name, n in gone.items())

    return price, stored


def _flops(
    trained: TrainedRun, whole: TaskPath, found: Calibration
) -> tuple[dict[str, float], Callable[[scores.Kept], float]]:
    task = trained.subject.tasks[whole.task]
    everything = cost.flops_of(whole, trained.config.model, trained.size, task)
    price = {name: 2.0 * size.matrices for name, size in cost.expert_sizes(whole).items()}

    def spent(kept: scores.Kept) -> float:
        saved = 0.0  # A token that a novice answers runs an expert fewer.
        for name, layer in whole.layers.items():
            gone = [e for e in layer.kept if e not in kept[name]]
            saved += price[name] * float(found.layers[name].count_E[gone].sum())
        return everything - saved / max(found.images, 1)

    return price, spent


def _check(whole: TaskPath, request: Request) -> None:
    """What can be refused before the calibration."""
    fewest = min((layer.experts for layer in whole.layers.values()), default=0)
    if whole.layers and request.keep is not None and not 1 <= request.keep <= fewest:
        raise UserError(
            f"Cannot keep {request.keep} experts per layer: the model has {fewest}, so --keep "
            f"must lie between 1 and {fewest}."
        )


def certify(
    trained: TrainedRun,
    whole: TaskPath,
    path: TaskPath,
    found: Calibration | None,
    request: Request,
    console: Console,
) -> dict[str, Any]:
    """The certificate of a path."""
    subject, parts = trained.subject, trained.parts
    task = subject.tasks[path.task]
    stated = certificate.contents(path)
    stated |= {"source": {"run": trained.name, "step": trained.step}}
    if path.task in subject.statements:
        apart = certificate.apart(subject.model, path, golden_inputs(trained, 8))
        stated |= {"statement": subject.statements[path.task], "full_model": apart}
    stated |= {"cost": cost.of_path(path, trained.config.model, trained.size, task)}

    def compared(part: splits.Subset, title: str) -> compare.Compared:
        with console.progress(f"{title} {path.task}", len(part.source), unit=part.unit) as bar:
            batches = part.batches(request.batch, task.truth)
            return compare.compare(whole, path, task, batches, bar.advance)

    if found is not None:
        stated |= {"calibration": certificate.calibration(found, parts.calibration, path)}
    if found is not None or request.weights != "float32":
        # Not on the calibration examples, to which the choice of experts is fitted.
        held = compared(parts.verification, "verify")
        stated |= {"verification": certificate.verification(held, parts.verification, path, task)}
    last = compared(parts.test, "test")
    changes = certificate.resampled_changes(task, last)
    return stated | {"test": certificate.scores(last, parts.test, task, changes)}


def facts(trained: TrainedRun, task: str) -> Facts:
    """What an export's manifest says that the path does not know."""
    return Facts(
        labels=tuple(trained.labels.get(task, ())),
        source=f"{trained.name}, step {trained.step}",
        training_data=trained.config.data.name,
    )


def config_of(trained: TrainedRun) -> dict[str, Any]:
    """The run's configuration as plain data."""
    return json.loads(configs.to_json(trained.config))


def fitted(trained: TrainedRun, task: Task, count: int = 32) -> Task:
    """The task with its pictures on the scale of a few verification labels."""
    batch = next(trained.parts.verification.batches(count, task.name))
    return replace(task, picture=task.picture.fitted(batch[task.name]))


def golden_inputs(trained: TrainedRun, count: int = 2) -> np.ndarray:
    """A few verification examples as a path reads them, [B, *input.shape]."""
    task = next(iter(trained.subject.tasks.values()))
    batch = next(trained.parts.verification.batches(count, task.truth))
    return batch[trained.exporter.input.name]
