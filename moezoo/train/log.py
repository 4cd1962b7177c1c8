"""Measurements of a run: `metrics.jsonl`, TensorBoard event files where installed, W&B if asked."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import jax

from moezoo import regular, storage
from moezoo.errors import UserError
from moezoo.files import failure, write_atomically
from moezoo.json_text import json_text
from moezoo.schema_check import first_line

NAME = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"  # the run in W&B that a resumed run goes on writing to
Switch = Literal["auto", "on", "off"]
LARGEST = 4 * regular.GB


class Sink(Protocol):
    """Where measurements go."""

    def write(
        self, step: int, split: str, values: Mapping[str, float], timing: Mapping[str, float]
    ) -> None:
        """Take the values measured after `step`; `timing` is what no two runs share."""
        ...

    def flush(self) -> None:
        """Write what must be there before a checkpoint is."""
        ...

    def abandon(self) -> None:
        """Leave what is not written: the run may be another process's by now."""
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
        self._lines = (StoredLines if storage.is_stored(path) else DiskLines)(path)

    def write(
        self, step: int, split: str, values: Mapping[str, float], timing: Mapping[str, float]
    ) -> None:
        """Append one line; it is in the file when this returns.

        But for lines of training in an object store, see `StoredLines`.
        """
        line = {"step": step, "split": split, **_plain(values), "timing": _plain(timing)}
        try:
            self._lines.write(json_text(line))
            if split != "train" or self._lines.due():
                self._lines.flush()
        except OSError as error:
            raise failure("write", self.path, error) from error

    def flush(self) -> None:
        """Let every line be in the file when this returns."""
        try:
            self._lines.flush()
        except OSError as error:
            raise failure("write", self.path, error) from error

    def abandon(self) -> None:
        """Leave what an object store does not have yet."""
        self._lines.abandon()

    def close(self) -> None:
        """Close the file."""
        try:
            self._lines.close()
        except OSError as error:
            raise failure("write", self.path, error) from error


class DiskLines:
    """A text file on a disk, to which every line is appended at once."""

    def __init__(self, path: Path):
        self._file: TextIO = open(path, "a")

    def write(self, text: str) -> None:
        """Take a line."""
        self._file.write(text)

    def due(self) -> bool:
        """Always: appending costs nothing."""
        return True

    def flush(self) -> None:
        """Let every line be in the file."""
        self._file.flush()

    def abandon(self) -> None:
        """Nothing: what was written is there."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StoredLines:
    """A text file in an object store, which appends nothing: it is written whole, again and again.

    A store takes an object about once a second, and a long file takes a while: so a line may wait
    for `PAUSE` seconds, until a checkpoint is written or the file is closed.
    """

    PAUSE = 10.0

    def __init__(self, path: Path):
        self._path, self._text = path, path.read_text()
        self._written, self._at = len(self._text), time.monotonic()

    def write(self, text: str) -> None:
        """Take a line."""
        self._text += text

    def due(self) -> bool:
        """Whether the last writing is some time ago."""
        return time.monotonic() > self._at + self.PAUSE

    def flush(self) -> None:
        """Write the file, unless it holds everything."""
        if self._written != len(self._text):
            self._path.write_bytes(self._text.encode())
            self._written, self._at = len(self._text), time.monotonic()

    def abandon(self) -> None:
        """Write no more: the folder may be another process's by now."""
        self._written = len(self._text)

    def close(self) -> None:
        """Write the file for the last time."""
        self.flush()


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

    def flush(self) -> None:
        """Nothing: the writer has its own rhythm."""

    def abandon(self) -> None:
        """Nothing: its files or lines are its own."""

    def close(self) -> None:
        """Write out and close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; values are named `<split>/<value>`, over `step`.

    A resumed run goes on in the same one, whose id lies in the run's folder. WANDB_MODE=offline
    keeps everything in the folder and needs no network; further settings are W&B's own variables.

    Raises UserError naming the extra where wandb is not installed, and where it does not begin.
    """

    def __init__(self, folder: Path, resumed: int = 0):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "log.wandb is on, but wandb is not installed: pip install 'moezoo[wandb]', or set "
                "log.wandb to off."
            ) from error
        id = _wandb_id(folder / WANDB_ID, resumed)
        try:
            self._run: Any = wandb.init(
                project="moezoo", name=folder.name, dir=_here(folder), id=id, resume="allow"
            )
        except Exception as error:  # of wandb's own kinds, which differ between its versions
            raise UserError(
                f"log.wandb is on, but W&B did not begin ({first_line(error)}): run `wandb login`, "
                "set WANDB_MODE=offline, or set log.wandb to off."
            ) from error
        # W&B's own steps only rise: after a resumption some of ours come again.
        self._run.define_metric("*", step_metric="step")

    def write(
        self, step: int, split: str, values: Mapping[str, float], timing: Mapping[str, float]
    ) -> None:
        """Add every finite value."""
        numbers = _plain({**values, **timing}).items()
        named = {f"{split}/{name}": value for name, value in numbers if value is not None}
        self._run.log({"step": step, **named})

    def flush(self) -> None:
        """Nothing: W&B has its own rhythm."""

    def abandon(self) -> None:
        """Nothing: its files or lines are its own."""

    def close(self) -> None:
        """Send what is left, and end the run there."""
        self._run.finish()


def _here(folder: Path) -> str:
    """A local folder for W&B's own files, which go to its server anyway."""
    return tempfile.mkdtemp(prefix="moezoo-wandb-") if storage.is_stored(folder) else str(folder)


def _wandb_id(path: Path, resumed: int) -> str:
    """The id that a resumed run had, or a new one, which is kept."""
    if resumed and path.exists():
        text = regular.read(path, regular.MB, UserError, "delete it").decode(errors="replace")
        if re.fullmatch(r"[0-9a-f]{16}\n", text):
            return text.strip()
    made = uuid.uuid4().hex[:16]
    write_atomically(path, made + "\n")
    return made


class Sinks:
    """Several sinks as one; a context manager."""

    def __init__(self, *sinks: Sink):
        self._sinks = sinks

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: Any, error: object, trace: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            for sink in self._sinks:
                sink.abandon()
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

    def flush(self) -> None:
        """What every sink must have written before a checkpoint."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(
    folder: Path, tensorboard: Switch = "auto", resumed: int = 0, wandb: Switch = "off"
) -> Sinks:
    """The sinks of a run in its folder; none on processes other than the first."""
    if jax.process_index() != 0:
        return Sinks()
    sinks: list[Sink] = [MetricsFile(folder / NAME, resumed)]
    if storage.is_stored(folder) and tensorboard == "on":
        raise UserError(
            f"log.tensorboard is on, but its files grow line by line and {folder} is in an object "
            "store: set log.tensorboard to auto (metrics.jsonl has all of it), or log.wandb to on."
        )
    if not storage.is_stored(folder) and _asked(tensorboard, "tensorboardX"):
        sinks.append(TensorBoard(folder / "tensorboard", resumed))
    if _asked(wandb, "wandb"):
        sinks.append(WandB(folder, resumed))
    return Sinks(*sinks)


def _asked(choice: Switch, package: str) -> bool:
    installed = importlib.util.find_spec(package) is not None if choice == "auto" else False
    return choice == "on" or installed


def _plain(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Python numbers; what JSON has no word for (not a number, infinite) becomes null."""
    numbers = {name: float(value) for name, value in values.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}
