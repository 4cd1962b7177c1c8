"""Measurements of a run on disk: `metrics.jsonl`, and TensorBoard event files where installed."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import jax

from moezoo import regular
from moezoo.errors import UserError
from moezoo.json_text import json_text
from moezoo.train.files import failure, write_atomically

NAME = "metrics.jsonl"
LARGEST = 4 * regular.GB


class Sink(Protocol):
    """Where measurements go."""

    def write(
        self, step: int, split: str, values: Mapping[str, float], timing: Mapping[str, float]
    ) -> None:
        """Take the values measured after `step`; `timing` is what no two runs share."""
        ...

    def close(self) -> None:
        """Write out what is buffered."""
        ...


class MetricsFile:
    """One line of JSON per measurement: step, split, the values, and apart from them `timing`.

    Lines beyond the step that a run resumes from are removed first, so that the file of a resumed
    run equals that of an uninterrupted one but for `timing`.

    Args:
      path: the file.
      resumed: step of the restored checkpoint; 0 begins a new file.

    Raises UserError where the file cannot be written.
    """

    def __init__(self, path: Path, resumed: int = 0):
        self.path = path
        kept = [line for line in read(path) if resumed and line["step"] <= resumed]
        write_atomically(path, "".join(json_text(line) for line in kept))
        self._file: TextIO = open(path, "a")

    def write(
        self, step: int, split: str, values: Mapping[str, float], timing: Mapping[str, float]
    ) -> None:
        """Append one line; it is in the file when this returns."""
        line = {"step": step, "split": split, **_plain(values), "timing": _plain(timing)}
        try:
            self._file.write(json_text(line))
            self._file.flush()
        except OSError as error:
            raise failure("write", self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order; none where it is missing.

    A line that is not whole (the run was killed while writing it) is left out.
    """
    if not path.exists():
        return []
    advice = "choose another --name or delete it"
    text = regular.read(path, LARGEST, UserError, advice).decode(errors="replace")
    lines = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            lines.append(content)
    return lines


class TensorBoard:
    """Event files for TensorBoard, by tensorboardX; scalars are named `<split>/<value>`.

    Raises UserError naming the extra where tensorboardX is not installed.
    """

    def __init__(self, folder: Path, resumed: int = 0):
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "log.tensorboard is on, but tensorboardX is not installed: "
                "pip install 'moezoo[tensorboard]', or set log.tensorboard to auto."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=resumed + 1 if resumed else None)

    def write(
        self, step: int, split: str, values: Mapping[str, float], timing: Mapping[str, float]
    ) -> None:
        """Add every finite value as a scalar."""
        for name, value in _plain({**values, **timing}).items():
            if value is not None:
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Write out and close the event file."""
        self._writer.close()


class Sinks:
    """Several sinks as one; a context manager."""

    def __init__(self, *sinks: Sink):
        self._sinks = sinks

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(
        self,
        step: int,
        split: str,
        values: Mapping[str, float],
        timing: Mapping[str, float] | None = None,
    ) -> None:
        """Pass a measurement to every sink."""
        for sink in self._sinks:
            sink.write(step, split, values, timing or {})

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(
    folder: Path, tensorboard: Literal["auto", "on", "off"] = "auto", resumed: int = 0
) -> Sinks:
    """The sinks of a run in its folder; none on processes other than the first."""
    if jax.process_index() != 0:
        return Sinks()
    sinks: list[Sink] = [MetricsFile(folder / NAME, resumed)]
    installed = importlib.util.find_spec("tensorboardX") is not None
    if tensorboard == "on" or (tensorboard == "auto" and installed):
        sinks.append(TensorBoard(folder / "tensorboard", resumed))
    return Sinks(*sinks)


def _plain(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Python numbers; what JSON has no word for (not a number, infinite) becomes null."""
    numbers = {name: float(value) for name, value in values.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
