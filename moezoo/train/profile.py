"""A window of steps recorded by JAX's profiler, and what share of it devices spent on exchange.

The recording opens in Perfetto (https://ui.perfetto.dev, the `.trace.json.gz`) and in xprof.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moezoo import storage
from moezoo.errors import UserError
from moezoo.files import write_atomically
from moezoo.json_text import json_text

FOLDER, NAME = "profile", "operations.json"
# Operations by which devices exchange, by the start of their names in compiled programs.
EXCHANGE = re.compile(
    r"%?(all-gather|all-reduce|all-to-all|collective-|ragged-all-to-all|reduce-scatter|send|recv"
    r"|nccl)",
    re.IGNORECASE,
)
# Operations that run others, which are recorded one by one.
AROUND = re.compile(r"%?(while|conditional|call)\b")
SHOWN = 20  # operations that are listed, the longest first


class Window(NamedTuple):
    """Steps first to last, both recorded."""

    first: int
    last: int


def check(text: str | None, steps: int, directory: str) -> None:
    """UserError for a window that `window` refuses, and where JAX cannot write its files."""
    if window(text, steps) is not None and storage.is_stored(directory):
        raise UserError(
            f"log.profile is {text}, but JAX's profiler writes on a disk and {directory} is in an "
            "object store: leave it out, or give a --directory on this disk."
        )


def window(text: str | None, steps: int) -> Window | None:
    """`FIRST:LAST` as numbers; UserError where it is none, or lies outside of the run's steps."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None:
        raise UserError(f"log.profile is '{text[:40]}'; give two steps, such as 100:110.")
    found = Window(int(match[1]), int(match[2]))
    if not 1 <= found.first <= found.last <= steps:
        raise UserError(
            f"log.profile is {text}; its steps must lie between 1 and {steps}, the first not after "
            "the last."
        )
    return found


class Profiler:
    """Records the steps of a window into a run's folder; without a window it does nothing.

    Every process records its own devices.
    """

    def __init__(self, folder: Path, wanted: Window | None):
        self._folder, self._wanted, self._on = folder / FOLDER, wanted, False

    def before(self, at: int) -> None:
        """Called before a step: begins with the window's first, or where a run resumes inside."""
        if self._wanted and not self._on and self._wanted.first <= at <= self._wanted.last:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._on = True

    def after(self, at: int, state: Any) -> str | None:
        """Called after a step: at the window's last waits for it, ends, and says what was seen."""
        if not self._on or self._wanted is None or at < self._wanted.last:
            return None
        jax.block_until_ready(state)
        return self.end()

    def end(self) -> str | None:
        """End a recording that is going on, and say what was seen."""
        if not self._on:
            return None
        jax.profiler.stop_trace()
        self._on = False
        seen = operations(self._folder)
        total = sum(seen.values())
        exchange = sum(s for name, s in seen.items() if EXCHANGE.match(name))
        share = exchange / total if total else 0.0
        longest = dict(sorted(seen.items(), key=lambda one: -one[1])[:SHOWN])
        if jax.process_index() == 0:
            content = {"exchange_share": share, "seconds": total, "longest": longest}
            write_atomically(self._folder / NAME, json_text(content, 1))
        return (
            f"Recorded in {self._folder}: operations took {total:.3g} s of all devices together, "
            f"{100 * share:.0f} % of them exchange between devices."
        )


def operations(folder: Path) -> dict[str, float]:
    """Seconds by operation over all devices of this process, of the newest recording there."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    found: dict[str, float] = {}
    for name, seconds in _events(files[-1]) if files else ():
        found[name] = found.get(name, 0.0) + seconds
    return found


def _events(file: Path) -> Iterator[tuple[str, float]]:
    """Operations of compiled programs with their seconds."""
    data = jax.profiler.ProfileData.from_file(str(file))
    devices = any(plane.name.startswith("/device:") for plane in data.planes)
    for plane in data.planes:
        if devices and not plane.name.startswith("/device:"):
            continue  # the host only waits there
        for line in plane.lines:
            # A TPU's lines of whole steps and modules hold what "XLA Ops" has one by one.
            if plane.name.startswith("/device:TPU") and line.name != "XLA Ops":
                continue
            for event in line.events:
                if AROUND.match(event.name):
                    continue
                if line.name == "XLA Ops" or any(name == "hlo_op" for name, _ in event.stats):
                    yield event.name, event.duration_ns / 1e9
