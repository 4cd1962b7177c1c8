"""How fast a run is, and where its wall time goes.

Everything is measured on the host and waits for nothing that the run would not wait for: the loop
is one step ahead of the device, so that what passes between two steps is the device's own time, or
that of the input where the device waits for it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from moezoo import regular
from moezoo.errors import UserError
from moezoo.files import write_atomically
from moezoo.json_text import json_text
from moezoo.train.chips import Chip

NAME = "wall_time.json"
# What time was spent on. "lost": steps that were done and had to be done again, because the run
# ended before they were in a checkpoint.
Cause = Literal["start", "compile", "input", "steps", "evaluate", "save", "restore", "lost"]
CAUSES: tuple[str, ...] = get_args(Cause)
FORWARD = "steps"  # the only one that moves the model


class WallTime:
    """Seconds of a run by cause.

    Begins to count with the first cause that is entered; what is entered inside of another cause
    does not count for that one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._clock = clock
        self._causes: list[str] = []
        self._since = clock()

    def add(self, cause: Cause, seconds: float) -> None:
        """Count what was measured elsewhere."""
        self._seconds[cause] += seconds

    def moved(self, to: Cause, seconds: float) -> None:
        """Count some of the time of steps as something else, which it has turned out to be."""
        self._settle()
        there = min(seconds, self._seconds[FORWARD])
        self._seconds[FORWARD] -= there
        self._seconds[to] += there

    @contextlib.contextmanager
    def of(self, cause: Cause) -> Iterator[None]:
        """What passes inside is spent on this."""
        self._settle()
        self._causes.append(cause)
        try:
            yield
        finally:
            self._settle()
            self._causes.pop()

    def _settle(self) -> None:
        now = self._clock()
        if self._causes:
            self._seconds[self._causes[-1]] += now - self._since
        self._since = now

    @property
    def seconds(self) -> dict[str, float]:
        """By cause, up to now."""
        self._settle()
        return dict(self._seconds)

    @property
    def goodput(self) -> float:
        """The share of the counted time in which steps moved the model; 0 before there is any."""
        found = self.seconds
        total = sum(found.values())
        return found[FORWARD] / total if total > 0 else 0.0

    def __str__(self) -> str:
        found = self.seconds
        total = max(sum(found.values()), 1e-9)
        spent = sorted(found.items(), key=lambda one: -one[1])
        parts = [f"{name} {100 * s / total:.0f} %" for name, s in spent if s >= 0.005 * total]
        return f"{total:.0f} s: {', '.join(parts)}"


class Account(NamedTuple):
    """Seconds by cause up to a step of a run."""

    step: int
    seconds: dict[str, float]


def keep(folder: Path, spent: WallTime, at: int) -> None:
    """Write what was spent up to a step into a run's folder."""
    content = {"step": at, "seconds": spent.seconds, "goodput": spent.goodput}
    write_atomically(folder / NAME, json_text(content, 1))


def kept(folder: Path) -> Account:
    """What a run's folder says; nothing was spent where it says nothing."""
    path = folder / NAME
    if not path.exists():
        return Account(0, {})
    advice = "wall time counts from here on"
    content = regular.read(path, regular.MB, UserError, advice)
    try:
        found = json.loads(content)
        seconds = {cause: float(found["seconds"][cause]) for cause in CAUSES}
        if not all(0 <= s < float("inf") for s in seconds.values()):
            raise ValueError("a time is negative")
        return Account(int(found["step"]), seconds)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"'{path}' is damaged: {advice}.") from error


def resume(
    spent: WallTime,
    folder: Path,
    at: int,
    lines: Iterable[Mapping[str, Any]],
    say: Callable[[str], None],
) -> None:
    """Go on counting where a run did that goes on from a step.

    lines: of its measurements. Those of training after that step tell what is lost, whether it was
    counted before or not. An account that is damaged keeps no run from going on.
    """
    try:
        before = kept(folder)
    except UserError as error:
        say(str(error))
        before = Account(0, {})
    for cause, seconds in before.seconds.items():
        spent.add(cause, seconds)  # type: ignore[arg-type]
    for line in lines:
        timing = line.get("timing")
        seconds = timing.get("seconds") if isinstance(timing, dict) else None
        if line.get("split") != "train" or line["step"] <= at:
            continue
        if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
            continue  # of a file that somebody has changed
        if line["step"] <= before.step:
            spent.moved("lost", seconds)
        else:
            spent.add("lost", seconds)


class StepTime(NamedTuple):
    """One step: its seconds, those of them that went by waiting for a batch, its operations."""

    seconds: float
    input: float
    flops: float | None


class Speed:
    """The speed of the steps since it was last asked for.

    examples: of a step.   unit: what they are called.   devices: that share a step.   chip: what
    each of them could do, None where that is not known.
    """

    def __init__(self, examples: int, unit: str, devices: int, chip: Chip | None):
        self._examples, self._unit = examples, unit
        self._devices, self._chip = devices, chip
        self._steps: list[StepTime] = []

    def step(self, step: StepTime) -> None:
        """Note a step that is done."""
        self._steps.append(step)

    def taken(self) -> dict[str, float]:
        """Numbers of the steps since the last call, by name; none where there was no step.

        Rates are per second; `step_ms_*` percentiles of single steps; `input_wait` the share of
        time that the device waited for a batch; `tflops_per_device` operations of matrix products,
        gradients and what is computed again included, and `mfu` their share of what the chip can.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        ms, total = [1e3 * s.seconds for s in steps], sum(s.seconds for s in steps)
        rate = len(steps) / max(total, 1e-9)
        examples = self._examples * rate
        found = {
            "steps_per_second": rate,
            f"{self._unit}_per_second": examples,
            f"{self._unit}_per_second_per_device": examples / self._devices,
            "step_ms_median": float(np.median(ms)),
            "step_ms_p95": float(np.percentile(ms, 95)),
            "input_wait": sum(s.input for s in steps) / max(total, 1e-9),
        }
        known = [s.flops for s in steps if s.flops is not None]
        if len(known) == len(steps):
            each = sum(known) / max(total, 1e-9) / self._devices
            found["tflops_per_device"] = each / 1e12
            if self._chip is not None:
                found["mfu"] = each / self._chip.flops
        return found
