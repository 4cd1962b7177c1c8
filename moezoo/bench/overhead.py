"""What the trainer costs: beside a bare loop of the same step, during a save, until it begins."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import rich.console
import tyro

from moezoo.bench.steps import overrides, steps
from moezoo.command import CONFIGURATIONS, parse
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.timing import machine, versions
from moezoo.train import config as configs
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.log import NAME, read
from moezoo.train.loop import train

WINDOW = 5  # steps between two lines of a run's log
STARTING = 600.0  # seconds that a start may take


@dataclass(frozen=True)
class OverheadArguments:
    """Time a run's steps beside a bare loop of the same compiled step, its steps during a save
    beside those without, and a start with a warm compilation cache until its first step is done.

    The loop has its batches on the device already and logs nothing. Loops and runs take turns; the
    ratio of each pair is that of neighbours. Everything is compiled once, and few data are enough.
    Example: moezoo bench overhead --options "train.batch=32 data.train=256 data.test=40"
    """

    config: Annotated[str, tyro.conf.Positional, CONFIGURATIONS] = "rooms/m3vit_tiny"
    """A configuration, as train.py takes it; its steps should take 100 ms or more."""
    options: str = ""
    """Overrides, quoted, such as "train.batch=32 model.depth=4"."""
    windows: int = 6
    """Windows of 5 steps in each run; a save begins in their middle."""
    pairs: int = 3
    """How often loop and run take turns."""
    json: Path | None = None
    """Also write the numbers, the machine and the versions to this file."""

    def __post_init__(self) -> None:
        if self.windows < 4 or self.pairs < 1:
            raise UserError("Give at least 4 --windows and one of --pairs.")


class BareLoop:
    """The bare loop: the step on batches that are there, one step ahead of the device."""

    def __init__(self, config: Config):
        self._made = steps(config)

    def __call__(self, count: int) -> float:
        """Seconds of each of `count` steps, in the mean."""
        last = self._made.run()
        jax.block_until_ready(last)
        began = time.perf_counter()
        for _ in range(count):
            ahead = self._made.run()
            jax.block_until_ready(last)
            last = ahead
        jax.block_until_ready(last)
        return (time.perf_counter() - began) / count


@contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Keep compiled programs in a folder, unless the user has said where they are kept."""
    own = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in own}
    if before["jax_compilation_cache_dir"]:
        yield
        return
    for name, value in own.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def windows_of(config: Config, folder: Path, name: str, every: int) -> list[float]:
    """Seconds of a step in every window of a fresh run but the first, which compiles.

    A checkpoint is begun after every `every` steps.
    """
    own = replace(
        config,
        directory=str(folder),
        name=name,
        train=replace(config.train, log_every=WINDOW),
        evaluate=replace(config.evaluate, examples=config.evaluate.batch or config.train.batch),
        checkpoint=replace(config.checkpoint, every=every),
        log=replace(config.log, tensorboard="off"),
    )
    finished = train(own, Console(rich.console.Console(quiet=True)))
    rows = [row for row in read(finished.directory / NAME) if row["split"] == "train"]
    return [row["timing"]["seconds"] / WINDOW for row in rows][1:]


def until_first_step(config: str, words: list[str], folder: Path, cache: Path) -> float:
    """Seconds from the start of `moezoo train` until its first step is logged."""
    own = ["--train.steps", "1", "--train.log_every", "1", "--directory", str(folder)]
    own += ["--optimiser.warmup", "0"]
    command = [sys.executable, "-m", "moezoo", "train", config, *words, *own, "--name", "start"]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    began = time.perf_counter()
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet) as process:
        while not read(folder / "start" / NAME):
            if process.poll() is not None or time.perf_counter() - began > STARTING:
                process.kill()
                raise UserError(f"The run did not come to its first step: {' '.join(command)}")
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        process.wait(STARTING)
    return seconds


def measure(arguments: OverheadArguments, folder: Path) -> dict[str, Any]:
    """All numbers: seconds, and ratios pair by pair."""
    words = overrides(arguments.options) if arguments.options else []
    config = configs.load(arguments.config, words)
    total = WINDOW * arguments.windows
    config = replace(
        config,
        train=replace(config.train, steps=total),
        optimiser=replace(config.optimiser, warmup=min(config.optimiser.warmup, total - 1)),
    )
    middle, bare, trained, saving = arguments.windows // 2, *([] for _ in range(3))
    with compiled_once(folder / "own"):
        loop = BareLoop(config)
        for number in range(arguments.pairs):
            before = loop(total)
            found = windows_of(config, folder, f"run{number}", WINDOW * middle)
            # The save begins behind window `middle`; the first window is not in the list.
            calm = [s for at, s in enumerate(found, 2) if at != middle + 1]
            bare.append((before + loop(total)) / 2)
            trained.append(float(np.median(calm)))
            saving.append(found[middle - 1])
            print(f"{number + 1} of {arguments.pairs} pairs measured", flush=True)
    starts = [until_first_step(arguments.config, words, folder / str(i), folder / "compiled")
              for i in range(2)]  # fmt: skip
    return {
        "step_seconds": {"bare": bare, "trainer": trained, "saving": saving},
        "trainer_over_bare": [t / b for t, b in zip(trained, bare, strict=True)],
        "saving_over_trainer": [s / t for s, t in zip(saving, trained, strict=True)],
        "start_seconds": {"cold": starts[0], "warm": starts[1]},
    }


def run(words: list[str]) -> int:
    """Measure, print, write."""
    a = parse(OverheadArguments, words, prog="moezoo bench overhead")
    check_file(a.json)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(a, Path(folder))
    each = found["step_seconds"]
    print(f"{a.config}: a step takes {1e3 * np.median(each['bare']):.0f} ms in a bare loop")
    for name, what in (
        ("trainer_over_bare", "in a run, divided by that"),
        ("saving_over_trainer", "in a run that saves, divided by that without"),
    ):
        print(f"{what}: {', '.join(f'{ratio:.3f}' for ratio in found[name])}")
    start = found["start_seconds"]
    print(f"first step after {start['cold']:.1f} s, with a warm cache {start['warm']:.1f} s")
    if a.json is not None:
        about = {"benchmark": "overhead", "config": a.config, "options": a.options}
        made_on = {"machine": machine(), "versions": versions("jax", "jaxlib", "flax")}
        write_atomically(a.json, json_text(about | found | made_on, 1))
        print(f"wrote {a.json}")
    return 0
