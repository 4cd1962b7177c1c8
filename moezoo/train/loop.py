"""A training run, from its start or its newest checkpoint to the report.

A signal or a pod's preemption notice asks it to stop, which it does between two steps.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from moezoo import plain_path, storage
from moezoo.errors import UserError
from moezoo.models.shared.config import traits
from moezoo.ops.grouped import speak_of_choices
from moezoo.train import (
    agree,
    chips,
    optim,
    origin,
    profile,
    resume,
    run_folder,
    start,
    state,
    takeover,
    together,
    upcycling,
    watch,
)
from moezoo.train import evaluate as best
from moezoo.train import mesh as meshes
from moezoo.train.ahead import Ahead, Step
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.config import Config, to_json, validate
from moezoo.train.console import Console
from moezoo.train.evaluate import Evaluation
from moezoo.train.guard import Guard, not_finite
from moezoo.train.hang import HangWatch
from moezoo.train.lock import locked
from moezoo.train.log import NAME, Sinks, open_sinks, read
from moezoo.train.profile import Profiler
from moezoo.train.resume import check_same_run, trained
from moezoo.train.scoring import nothing, placed, run_evaluation
from moezoo.train.setup import Setup, described, extra_state, make_rules, make_update, prepare
from moezoo.train.step import Update
from moezoo.train.watch import Speed, StepTime, WallTime


class Stop:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # The second request means it: leave at once, finished checkpoints are intact.
            raise KeyboardInterrupt
        self.signal = number
        if jax.process_count() > 1 and number != signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # JAX takes it for a notice and tells the others

    def requested(self, step: int) -> bool:
        """Whether to save and leave before `step`; all hosts of a pod give the same answer."""
        if jax.process_count() > 1:
            # A notice reaches one host first; they agree on the step at which all of them stop.
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGTERM and Ctrl-C into a polite request for the time of the block."""
    stop = Stop()
    # On a pod, JAX's preemption service owns SIGTERM.
    numbers = [signal.SIGINT] + ([signal.SIGTERM] if jax.process_count() == 1 else [])
    before: dict[int, Callable | int | None] = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


FOLDER = "checkpoints"


class Interrupted(together.Agreed):
    """The run was asked to stop; it saved its state before leaving."""


@dataclass
class CompiledStep:
    """A step for batches of one form, and its operations once they are counted."""

    run: Step
    flops: float | None


class Finished(NamedTuple):
    """What a run that came to its end holds."""

    setup: Setup
    directory: Path
    definition: Any
    state: dict[str, Any]
    evaluation: Evaluation
    spent: WallTime


class Trainer:
    """One run: its setup, its state on the devices, its files, and what watches over it."""

    def __init__(
        self,
        setup: Setup,
        directory: Path,
        console: Console,
        checkpoints: Checkpointer,
        spent: WallTime,
        hang: HangWatch,
    ):
        self.setup, self.directory, self.console = setup, directory, console
        self.checkpoints, self.spent, self.hang = checkpoints, spent, hang
        steps, devices = setup.config.train.steps, setup.mesh.devices
        self.profiler = Profiler(directory, profile.window(setup.config.log.profile, steps))
        chip, size = chips.of_kind(devices.flat[0].device_kind), setup.config.train.batch
        self.speed = Speed(size, setup.domain.unit, devices.size, chip)
        extra = extra_state(setup.config, len(setup.tasks))
        created = state.create(
            setup.build, setup.optimiser, setup.mesh, make_rules(setup.config), extra
        )
        self.definition, self.state, self.shardings = created
        self.start = 0
        self.rate = optim.schedule(setup.config.optimiser, setup.config.train.steps)
        self.guard = Guard(setup.config, directory, checkpoints.newest_sound, console.say)

    def restore(self) -> None:
        """Continue from the newest sound checkpoint; without one, begin where `start_from` says."""
        target = state.target(self.state, self.shardings)
        while (found := self.checkpoints.latest_valid()) is not None:
            restored = self.checkpoints.restore(found, target)
            bad = not_finite(restored)
            if not bad:
                self.state, self.start, self.guard.resumed = restored, found, found
                return self.console.say(f"Resuming {self.directory} from step {found}.")
            self.checkpoints.pass_over(found, f"{bad[0]} is not finite")
        if self.setup.config.checkpoint.resume == "always" and (
            self.checkpoints.skipped() or read(self.directory / NAME)
        ):
            raise UserError(
                f"{self.directory} has trained but has no checkpoint that can be read, so it "
                "cannot go on: to train it again from its start, add --checkpoint.resume auto."
            )
        self.start_from(self.setup.config.start_from)
        # A file that a run starts from may hold a NaN as well.
        self.guard.check(0, self.state)

    def record(self, changed: resume.Changed) -> None:
        """Keep and tell in what the run's configuration differs from what it was."""
        config = self.setup.config
        if self.start > config.train.steps:
            raise UserError(
                f"{self.directory} has trained for {self.start} steps already; train.steps is "
                f"{config.train.steps}: it must be at least {self.start}."
            )
        idle = [name for name in changed if name != resume.STEPS]
        if idle and self.start == config.train.steps:
            raise UserError(
                f"{self.directory} has trained for all of its {self.start} steps, so {idle[0]} "
                "would change nothing: raise --train.steps, too."
            )
        if jax.process_index() == 0:
            run_folder.record(self.directory, config, self.start, changed)
        for line in resume.told(self.start, changed, config.optimiser.schedule):
            self.console.say(line)

    def start_from(self, run: str | None) -> None:
        """Take over the parameters of another run or of a file, where one is named."""
        config = self.setup.config
        if run is not None:
            begun = start.started(run, config, self.state, self.definition, self.first_batches)
            self.state, told = begun
            self.console.say(told)
        self.state = start.completed(config, self.state, self.setup.groups)

    def first_batches(self) -> Iterator[Any]:
        """The first few batches of the run on its devices, before there is a step."""
        domain, names, size = self.setup.domain, self.setup.names, self.setup.config.train.batch
        rows = meshes.rows(self.setup.mesh, size)
        made = domain.training(self.setup.config, self.setup.train, names, 0, rows)
        some = itertools.islice((batch for _, batch in made), upcycling.BATCHES)
        return placed(self.setup, some, size)

    @property
    def on_the_way(self) -> str:
        """The split of evaluations between the steps: `valid` where there is one."""
        return "test" if self.setup.valid is None else "valid"

    def evaluate(
        self, at: int, sinks: Sinks, split: str = "test", between: Callable[[], None] = nothing
    ) -> Evaluation:
        """Score the current parameters on a split, log and show the result.

        `between` is called after every batch and may raise. Diverged where there is no model to
        score: some metrics of a NaN look like numbers.
        """
        self.guard.check(at, self.state)
        model = (self.definition, self.state["params"], self.state["stats"])
        source = self.setup.valid if split == "valid" else self.setup.test

        def done() -> None:
            self.hang.beat(f"evaluating after step {at}")
            between()

        with self.spent.of("evaluate"):
            result = run_evaluation(self.setup, *model, self.console, source, done)
        before = [r for r in read(self.directory / NAME) if r["split"] == split]
        if not any(row["step"] == at for row in before):  # else: evaluated before an interruption
            values = {f"{t}/{k}": v for t, part in result.scores.items() for k, v in part.items()}
            sinks.write(at, split, values)
        tasks = self.setup.tasks
        rows = [
            (task.name, task.headline, "down" if task.lower_is_better else "up", value)
            for task, value in zip(tasks, result.headline(tasks).values(), strict=True)
        ]
        title = {"test": "Test", "valid": "Validation"}[split]
        self.console.table(f"{title} scores after step {at}", ("task", "score", "better", ""), rows)
        return result

    def score(self, result: Evaluation) -> float | None:
        """What "best checkpoint" means; see `best.rank`."""
        rows = [r for r in read(self.directory / NAME) if r["split"] == self.on_the_way]
        lower = {f"{t.name}/{t.headline}": t.lower_is_better for t in self.setup.tasks}
        return best.rank(result.headline(self.setup.tasks), rows, lower)

    def save(self, at: int, sinks: Sinks, score: float | None = None) -> None:
        """Write a checkpoint in the background; Diverged where the state is not finite.

        Measurements up to it are written first: a run that goes on from it measures them no more.
        """
        self.guard.check(at, self.state)
        self.hang.beat(f"saving step {at}")
        with self.spent.of("save"):
            sinks.flush()
            self.checkpoints.save(at, self.state, score)
        if jax.process_index() == 0:
            watch.keep(self.directory, self.spent, at)

    def run(self, sinks: Sinks, stop: Stop, ahead: Ahead) -> None:
        """All remaining steps; raises Interrupted after saving when asked to stop."""
        config, things = self.setup.config, {self.setup.domain.unit: self.setup.config.train.batch}
        total, update = config.train.steps, self.update()
        with (
            self.console.progress("train", total, self.start, things=things) as bar,
            self.spent.of("steps"),
        ):
            recent: dict[str, Any] = {}  # of every task, where each step is one's
            given = waited(self.batches(), lambda: recent.get("loss/total"))
            compiled: dict[tuple[str, ...], CompiledStep] = {}
            clock = began = time.monotonic()
            for at, (batch, missed) in enumerate(given, self.start + 1):
                if stop.requested(at):
                    self.interrupted(at - 1, sinks)
                kind = tuple(batch)
                new = kind not in compiled
                if new:
                    bar.doing("compiling")
                    compiled[kind] = self.compiled(update, ahead, batch)
                recent |= self.step(at, compiled[kind], batch)
                # One step ahead of the device and no more: the bar tells what is done, not asked.
                self.guard.seen(at, recent["loss/total"], recent.get("skipped", False))
                if self.guard.exhausted:
                    self.give_up(at, sinks)
                if new:
                    bar.rate.restart()
                else:
                    self.measure(time.monotonic() - began, missed, compiled[kind])
                if at % config.train.log_every == 0 or at == total:
                    clock = self.log(at, recent, sinks, bar, clock)
                self.milestones(at, sinks, bar)
                began = time.monotonic()
                bar.update(at)
                self.hang.beat(f"doing step {at + 1}")
        self.guard.settle()
        if self.guard.exhausted or self.guard.idle:
            self.give_up(total, sinks)
        if self.start < total:  # else it was saved there
            self.save(total, sinks)

    def measure(self, seconds: float, missed: float, step: CompiledStep) -> None:
        """Count a step's seconds, those of them in which devices missed a batch."""
        self.spent.moved("input", missed)
        self.speed.step(StepTime(seconds, missed, step.flops))

    def update(self) -> Update:
        """The program of a step, which is compiled when it is first run."""
        setup = self.setup
        parts = setup.tasks, setup.optimiser, self.shardings, len(setup.groups)
        return make_update(setup.config, self.definition, *parts)

    def batches(self) -> Iterator[Any]:
        """The batches of all remaining steps, on the devices."""
        setup, size = self.setup, self.setup.config.train.batch
        rows = meshes.rows(setup.mesh, size)
        made = setup.domain.training(setup.config, setup.train, setup.names, self.start, rows)
        total = setup.config.train.steps
        return placed(setup, batches_of(made, self.start, total), size)

    def compiled(self, update: Update, ahead: Ahead, batch: Any) -> CompiledStep:
        """The step for batches of this form; its first run, which may compile, is still to come."""
        self.hang.beat("compiling a step")
        with self.spent.of("compile"):
            return CompiledStep(ahead.step(update, self.setup.classes, self.state, batch), None)

    def step(self, at: int, step: CompiledStep, batch: Any) -> dict[str, Any]:
        """Start a step; the first one of its form is compiled, and its operations are counted."""
        self.profiler.before(at)
        with self.spent.of("compile" if step.flops is None else "steps"):
            if step.flops is None:
                # Of the state as it is now: the step takes its memory.
                step.flops = step.run.flops(self.state, batch)
            self.state, metrics = step.run(self.state, batch)
        if told := self.profiler.after(at, self.state):
            self.console.say(told)
        return metrics

    def give_up(self, at: int, sinks: Sinks) -> None:
        """Always raises Diverged: too many steps changed nothing; the last good state is kept."""
        if self.guard.sound or self.start:
            self.save(at, sinks)
            self.checkpoints.wait()
        self.guard.give_up()

    def milestones(self, at: int, sinks: Sinks, bar: Any) -> None:
        """Evaluate and save between the steps where it is due; the end of the run does both."""
        config, score = self.setup.config, None
        if at == config.train.steps:
            return
        if config.evaluate.every and at % config.evaluate.every == 0:
            score = self.score(self.evaluate(at, sinks, self.on_the_way))
            bar.rate.restart()
        if at % config.checkpoint.every == 0:
            self.save(at, sinks, score)

    def log(self, at: int, metrics: dict, sinks: Sinks, bar: Any, clock: float) -> float:
        """Write the step's metrics; Diverged where its loss is not finite."""
        self.guard.settle()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values.pop("skipped", None)  # of this step alone; `timing` has all of them
        now = time.monotonic()
        values["learning_rate"] = float(self.rate(at - 1))  # the one this step was taken with
        timing = {"seconds": now - clock, "skipped_steps": self.guard.skipped, **self.speed.taken()}
        sinks.write(at, "train", values, timing)
        shown = {"weighted loss": values["loss/total"], "gradient": values["gradient_norm"]}
        bar.update(at, shown | {"lr": values["learning_rate"]})
        return now

    def interrupted(self, at: int, sinks: Sinks) -> None:
        """Save the state after step `at` and leave."""
        if told := self.profiler.end():
            self.console.say(told)
        if at > self.start:
            self.save(at, sinks)
        self.checkpoints.wait()
        raise Interrupted(
            f"Stopped after step {at}; the same command continues from there ({self.directory})."
        )

    def finish(self, sinks: Sinks, stop: Stop) -> Evaluation:
        """The scores after the last step; the run is saved, so being asked to stop ends it."""
        total = self.setup.config.train.steps
        steps = itertools.count(total + 1)

        def between() -> None:
            if stop.requested(next(steps)):
                self.checkpoints.wait()
                raise Interrupted(
                    f"Stopped after step {total}, the last, before its report; the same command "
                    f"scores it again ({self.directory})."
                )

        result = self.evaluate(total, sinks, between=between)
        between()
        return result


def waited(batches: Iterator[Any], last: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
    """Each batch, and the seconds that the devices had nothing to do before it was there.

    last: what they were given to compute last, None for nothing. They are busy for a part of the
    time that a batch takes; which part is known where they were done before it was asked for, or
    not yet when it came. Between the two it is taken for half.
    """
    while True:
        idle, began = _is_done(last()), time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        seconds = time.monotonic() - began
        share = 1.0 if idle else 0.5 if _is_done(last()) else 0.0
        yield batch, share * seconds


def _is_done(array: Any) -> bool:
    return array is not None and array.is_ready()


def batches_of(made: Iterator[tuple[int, Any]], start: int, total: int) -> Iterator[Any]:
    """The batches of the steps after `start`; UserError where they end before the last step."""
    at = start
    for _, batch in made:
        yield batch
        at += 1
    if at < total:
        raise UserError(
            f"The data ended after {at} of {total} steps: the `training` of a domain must give a "
            "batch for every step."
        )


def train(
    config: Config,
    console: Console | None = None,
    explicit: Collection[str] = frozenset(),
    file: Path | None = None,
) -> Finished:
    """Train, evaluate and keep everything under `<directory>/<name>/`.

    Continues an unfinished run of the same configuration; `explicit` are the settings in which
    it may be another one (see `resume`), and `file` is the configuration file that it came from,
    which the run's folder keeps (see `origin`). Raises UserError for input that cannot work and
    Interrupted after a polite stop.
    """
    console = console or Console()
    speak_of_choices()
    agree.check_same_command(config)
    validate(config, jax.device_count())
    directory = storage.place(config.directory) / config.name
    plain_path.check(directory, "--name or --directory")
    if not trained(directory):  # before a base is trained for it
        start.check_bank(config, config.start_from)
        if config.start_from is None:
            takeover.check_alone(config)
    config = start.with_start(config, console, train)
    if config.start_from is not None and not trained(directory):
        start.check(config.start_from, config)
        start.check_fits(config.start_from, config)
    first = jax.process_index() == 0
    made = not directory.exists()
    with locked(directory, console.say) if first else contextlib.nullcontext():
        try:
            return train_in(directory, config, console, explicit, file)
        except UserError:
            # Under the lock: a run that is another process's stays.
            if first and made and not trained(directory):
                run_folder.discard(directory)
            raise


def train_in(
    directory: Path, config: Config, console: Console, explicit: Collection[str], file: Path | None
) -> Finished:
    """`train` in a folder that no other run uses."""
    changed = check_same_run(config, directory, explicit)
    agree.check_shared(directory)
    origin.keep(directory, file, console.say)
    spent = WallTime()
    with spent.of("start"), Ahead(config, console.say) as ahead:
        setup = prepare(config)
    with (
        jax.set_mesh(setup.mesh),
        Checkpointer(
            directory / FOLDER, to_json(config), config.checkpoint.keep, console.say
        ) as checkpoints,
        stop_on_signals() as stop,
        HangWatch(f"Process {jax.process_index()}", config.log.hang) as hang,
    ):
        with spent.of("start"):
            trainer = Trainer(setup, directory, console, checkpoints, spent, hang)
            console.say(described(setup, trainer.state["params"]))
            if (told := traits(config.model).beyond(setup.groups)) is not None:
                console.say(told)
        with spent.of("restore"):
            trainer.restore()
        trainer.record(changed)
        # Also where it begins again: what was done without reaching a checkpoint is lost.
        watch.resume(spent, directory, trainer.start, read(directory / NAME), console.say)
        chosen = config.log
        with open_sinks(directory, chosen.tensorboard, trainer.start, chosen.wandb) as sinks:
            trainer.run(sinks, stop, ahead)
            evaluation = trainer.finish(sinks, stop)
        if jax.process_index() == 0:
            watch.keep(directory, spent, config.train.steps)
        console.say(f"Wall time {spent}; {100 * spent.goodput:.0f} % of it moved the model.")
        return Finished(setup, directory, trainer.definition, trainer.state, evaluation, spent)
