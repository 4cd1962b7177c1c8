"""The trade-off curve of a task's path: what is lost at each number of experts, for several ways
of removing them; and the smallest path that loses at most what a user can bear.

Every point is measured on the verification examples, where a budget may be chosen, and on the test
examples, which decide nothing. A budget is chosen by fixed-sequence testing: budgets are tried
from the largest one down, each as a test at the 95 % level, and the first one that fails ends it;
because the order is fixed beforehand, no correction for many tests is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from moezoo.deploy import certificate, compare, cost, novices, produce, recover, scores
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.compare import Compared
from moezoo.deploy.path import TaskPath
from moezoo.deploy.plan import Plan
from moezoo.deploy.produce import Request, TrainedRun
from moezoo.deploy.splits import Subset
from moezoo.deploy.trial import Trial
from moezoo.errors import UserError
from moezoo.tasks.base import Task
from moezoo.train.console import Console


class Method(NamedTuple):
    """A way of removing experts: a label for readers, and the options of `moezoo prune`."""

    label: str
    score: str
    novice: str
    router: str
    recover: str = "none"


RANK = 8
# What every curve shows besides the way that was asked for.
BASELINES = (
    Method("REAP sum, means", "reap", "mean", "whole"),
    Method(f"REAP sum, maps of rank {RANK}", "reap", f"affine:{RANK}", "whole"),
    Method("MoNE", "mone", "mean", "whole"),
    Method("REAP, router cut", "reap_mean", "mean", "cut"),
    Method("random, means", "random", "mean", "whole"),
    Method("random, router cut", "random", "mean", "cut"),
)


# What recovery is called in a picture.
RECOVERED = {"progressive": "progressive", "router": "routers taught", "finetune": "fine-tuned"}


@dataclass(frozen=True)
class Limits:
    """What a user can bear.

    loss: relative loss of the task's metric, 0.01 for 1 %; its one-sided 95 % bound by paired
    bootstrap is tested.   disagreement: the share of examples whose prediction differs by the
    task's middle level, by its Clopper-Pearson bound. None: any. Raises UserError for a number
    that is no share.
    """

    loss: float | None = None
    disagreement: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("loss", self.loss), ("disagreement", self.disagreement)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"--max-{name} is {value:g}; it must lie between 0 and 100 %.")

    def __str__(self) -> str:
        said = []
        if self.loss is not None:
            said.append(f"a loss of the metric of {100 * self.loss:g} %")
        if self.disagreement is not None:
            said.append(f"{100 * self.disagreement:g} % of examples that differ")
        return " and ".join(said)

    @property
    def given(self) -> bool:
        """Whether there is any limit."""
        return (self.loss, self.disagreement) != (None, None)


def share(text: str, option: str) -> float:
    """A share such as "1%" or "0.01" as a number; raises UserError naming the option."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise UserError(f"{option} is '{text[:40]}'; give a share such as 1% or 0.01.") from None
    return number / 100 if text.endswith("%") else number


@dataclass(frozen=True, eq=False)
class Point:
    """One budget of one method: experts per layer, and what was measured.

    verification, test: as a certificate has them, and `relative_loss` with its one-sided 95 %
    bound.   cost: parameters, bytes and mean FLOPs of an example.   latency: as `cost.latency` of
    the path from which the experts are gone.   recovery: what was done, as a certificate has it.
    """

    keep: int
    kept: scores.Kept
    verification: Mapping[str, Any]
    test: Mapping[str, Any]
    cost: Mapping[str, float]
    latency: Mapping[str, float]
    recovery: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Curve:
    """All points of one task, by method in the order of budgets, the largest first.

    full: the metric with all experts.   differs: what it means that an example differs.
    """

    task: str
    unit: str
    metric: str
    lower_is_better: bool
    full: float
    differs: str
    points: Mapping[Method, Sequence[Point]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "task": self.task,
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "all_experts": self.full,
            "methods": [
                {**method._asdict(), "points": [_plain(point) for point in points]}
                for method, points in self.points.items()
            ],
        }


def _plain(point: Point) -> dict[str, Any]:
    kept = {name: list(ids) for name, ids in point.kept.items()}
    return {**vars(point), "kept": kept}


def methods(trained: TrainedRun, request: Request) -> list[Method]:
    """The way that was asked for, first, and the baselines that the model has a place for."""
    router = produce.routers_of(trained, request)
    own = Method("as asked", request.score, request.novice or novices.MEAN.name, router)
    known = {method[1:4]: method for method in BASELINES}
    first = known.get(own[1:4], own)
    others = [m for m in BASELINES if m.router in trained.subject.removals and m != first]
    if request.recover == "none":
        return [first, *others]
    back = [Method(f"{first.label}, {words}", *first[1:4], k) for k, words in RECOVERED.items()]
    return [first, *back, *others]


def budgets(whole: TaskPath) -> list[int]:
    """Experts per layer, the largest first: all numbers up to 8, above that about halves."""
    most = max(len(layer.within) for layer in whole.layers.values())
    below = list(range(most - 1, 0, -1))
    if most <= 8:
        return below
    fractions = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
    return sorted({max(round(most * f), 1) for f in fractions}, reverse=True)


def tried(whole: TaskPath, method: Method) -> list[int]:
    """The budgets that a method is tried at: where it trains, half and a quarter of the experts."""
    if method.recover == "none":
        return budgets(whole)
    most = max(len(layer.within) for layer in whole.layers.values())
    return sorted({max(most // part, 1) for part in (2, 4)} & {*budgets(whole)}, reverse=True)


def check(trained: TrainedRun, whole: TaskPath, request: Request) -> None:
    """UserError where there is nothing to sweep over."""
    if not request.whole:
        raise UserError(
            "A sweep tries every number of experts: leave out --keep, --total and other budgets."
        )
    produce.check_removable(trained.config)
    if not whole.layers:
        raise UserError(f"The {whole.task} path has no MoE layer: there is nothing to sweep over.")


def sweep(
    trained: TrainedRun,
    whole: TaskPath,
    found: Calibration,
    ways: Sequence[Method],
    request: Request,
    console: Console,
) -> Curve:
    """Every budget by every method; `found` holds moments where a method's novices need them."""
    task = trained.subject.tasks[whole.task]
    chosen = {
        (method, keep): kept
        for method in ways
        for keep in tried(whole, method)
        if (kept := _kept(whole, found, method, keep)) is not None
    }
    tests = _tests(trained, whole, found, chosen, request, console)
    runners = {place: test.run for place, test in tests.items()}
    times = _latencies(trained, whole, found, chosen)
    _, flops = produce.costs(trained, whole, found, request, "flops")
    parts = trained.parts
    measured = {
        part.where: _measured(whole, runners, task, part, request.batch, console, title)
        for title, part in (("verify", parts.verification), ("test", parts.test))
    }
    points: dict[Method, list[Point]] = {method: [] for method in ways}
    for (method, keep), test in tests.items():
        held, last = (
            _stated(measured[p.where][method, keep], p, task)
            for p in (parts.verification, parts.test)
        )
        cost = _cost(trained, whole, found, method, test.kept, flops)
        spent = times[method[2:4], keep]
        points[method].append(Point(keep, test.kept, held, last, cost, spent, test.stated))
    headline = task.headline
    one = next(iter(measured[parts.test.where].values()))
    full = task.metric.compute(compare.total(task, one.whole))[headline]
    words = task.prediction.event(LEVEL)
    return Curve(whole.task, parts.test.unit, headline, task.lower_is_better, full, words, points)


def _kept(whole: TaskPath, found: Calibration, method: Method, keep: int) -> scores.Kept | None:
    """The experts that a method keeps; None where tokens choose more than would be there."""
    layers = produce.candidates(whole, found)
    if method.router == "cut" and any(layer.chosen > keep for layer in layers.values()):
        return None
    return {
        name: scores.uniform({name: layer}, method.score, min(keep, len(layer.within)))[name]
        for name, layer in layers.items()
    }


ChosenExperts = Mapping[tuple[Method, int], scores.Kept]  # by method and budget


class TestedPoint(NamedTuple):
    """A point before it is measured: experts, the path without the others, recovery in words."""

    kept: scores.Kept
    run: compare.Runner
    stated: Mapping[str, Any]


def _tests(
    trained: TrainedRun,
    whole: TaskPath,
    found: Calibration,
    chosen: ChosenExperts,
    request: Request,
    console: Console,
) -> dict[tuple[Method, int], TestedPoint]:
    widths = {name: usage.output_ED.shape[1] for name, usage in found.layers.items()}
    trials: dict[bool, Trial] = {}
    made = {}
    for (method, keep), kept in chosen.items():
        cut, kind = method.router == "cut", novices.by_name(method.novice)
        if method.recover != "none":
            console.say(f"{method.label}: {keep} experts per layer of {whole.task}")
            asked = _asked(method, request)
            made[method, keep] = _recovered(trained, whole, found, method, kept, asked, console)
            continue
        if cut not in trials:
            rank = 0 if cut else max(rank_of(m) for m, _ in chosen if m.router != "cut")
            trials[cut] = Trial(whole, widths, rank, cut=cut)
        made[method, keep] = TestedPoint(kept, trials[cut].of(kept, found, kind), {})
    return made


def _recovered(
    trained: TrainedRun,
    whole: TaskPath,
    found: Calibration,
    method: Method,
    kept: scores.Kept,
    asked: Request,
    console: Console,
) -> TestedPoint:
    """A path by itself: what was recovered is in its weights."""
    plan = _plan(whole, found, method, kept)
    remove, kind = produce.way(trained, asked)
    lost = produce.lost_of(trained, whole, found, plan, asked)
    back = recover.recovered(lost, remove(whole, plan, found, kind), asked.recovery, console)
    return TestedPoint(dict(back.path.plan.kept), compare.runner(back.path), back.stated)


def _asked(method: Method, request: Request) -> Request:
    """A request for what a method does, with the recovery's options of another one."""
    novice = None if method.router == "cut" else method.novice
    own = {"score": method.score, "novice": novice, "router": method.router}
    uses = {
        f"recover_{name}": getattr(request, f"recover_{name}") if method.recover in kinds else None
        for name, kinds in recover.USES.items()
    }
    return replace(request, **own, recover=method.recover, **uses)


def _plan(whole: TaskPath, found: Calibration, method: Method, kept: scores.Kept) -> Plan:
    experts = {name: layer.experts for name, layer in whole.layers.items()}
    novice = "cut" if method.router == "cut" else method.novice
    said = method.score, "a sweep", found.fingerprint, novice
    return Plan(whole.task, kept, experts, *said)


BATCH = 8  # examples at once for latencies


def _latencies(
    trained: TrainedRun, whole: TaskPath, found: Calibration, chosen: ChosenExperts
) -> dict[tuple[tuple[str, ...], int], dict[str, Any]]:
    """Milliseconds by (novice, router) and budget: which experts stay changes nothing."""
    times: dict[tuple[tuple[str, ...], int], dict[str, Any]] = {}
    for (method, keep), kept in chosen.items():
        place = method[2:4], keep
        if place not in times:
            remove, kind = trained.subject.removals[method.router], novices.by_name(method.novice)
            path = remove(whole, _plan(whole, found, method, kept), found, kind)
            times[place] = cost.latency(path, BATCH, whole.input)
    return times


def rank_of(method: Method) -> int:
    """The rank of the novices of a method; 0 for constants."""
    return int(method.novice.partition(":")[2] or 0)


def _measured(
    whole: TaskPath,
    runners: Mapping[Any, compare.Runner],
    task: Task,
    part: Subset,
    batch: int,
    console: Console,
    title: str,
) -> dict[Any, Compared]:
    with console.progress(f"{title} {whole.task}", len(part.source), unit=part.unit) as bar:
        batches = part.batches(batch, task.truth)
        return compare.compare_all(whole, runners, task, batches, bar.advance)


def _stated(found: Compared, part: Subset, task: Task) -> dict[str, Any]:
    """What a certificate says of a comparison, and the relative loss of the metric."""
    changes = certificate.resampled_changes(task, found)
    stated = certificate.scores(found, part, task, changes)
    agreed = certificate.agreement(found, task)
    return {**stated, **agreed, "relative_loss": relative_loss(found, task, changes)}


def relative_loss(found: Compared, task: Task, changes: np.ndarray) -> dict[str, float | None]:
    """The loss of the task's metric as a share of the whole path's, and its upper 95 % bound."""
    sign = 1.0 if task.lower_is_better else -1.0
    before = task.metric.compute(compare.total(task, found.whole))[task.headline]
    after = task.metric.compute(compare.total(task, found.cut))[task.headline]
    if not abs(before) > 0 or not len(changes):
        return {"value": None, "at_most": None}
    bound = float(np.quantile(sign * changes, 0.95)) / abs(before)
    return {"value": sign * (after - before) / abs(before), "at_most": bound}


def _cost(
    trained: TrainedRun,
    whole: TaskPath,
    found: Calibration,
    method: Method,
    kept: scores.Kept,
    flops: Callable[[scores.Kept], float],
) -> dict[str, float]:
    asked = Request(
        score=method.score,
        novice=None if method.router == "cut" else method.novice,
        router=method.router,
    )
    stated = {}
    for unit in ("parameters", "bytes"):
        stated[unit] = produce.costs(trained, whole, found, asked, unit)[1](kept)
    everything = {name: layer.kept for name, layer in whole.layers.items()}
    # With a router that is cut every token still runs as many experts.
    runs = everything if method.router == "cut" else kept
    return stated | {"flops": flops(runs)}


LEVEL = 5.0  # a level of disagreement that every kind of output has (`tasks.output`)


def differing(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of disagreement at that level."""
    (found,) = (d for d in stated["disagreement"] if d["level"] == LEVEL)
    return found


def within(point: Point, limits: Limits) -> bool:
    """Whether a point keeps the limits on the verification examples, by its 95 % bounds."""
    if limits.loss is not None:
        bound = point.verification["relative_loss"]["at_most"]
        if bound is None or bound > limits.loss:
            return False
    if limits.disagreement is not None:
        if differing(point.verification)["rate_at_most"] > limits.disagreement:
            return False
    return True


def choose(curve: Curve, method: Method, limits: Limits) -> Point | None:
    """The smallest budget that keeps the limits, by fixed-sequence testing; None: not even the
    largest does."""
    chosen = None
    for point in curve.points[method]:
        if not within(point, limits):
            break
        chosen = point
    return chosen
