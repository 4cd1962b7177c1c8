"""The synthesised clips on disk: WAV files to listen to, and labels.csv."""

from __future__ import annotations

import csv
import hashlib
import io
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moezoo import regular
from moezoo.data.progress import progress
from moezoo.data.store import DamagedStore
from moezoo.domains.audio.data.folder import once
from moezoo.domains.audio.data.read import resampled
from moezoo.domains.audio.data.sounds.example import NAMES, SECONDS, synthesise
from moezoo.domains.audio.data.sounds.synth import RATE

LABELS = "labels.csv"
COLUMNS = ("file", *NAMES)
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SoundsConfig:
    """Numbers of clips, seed, and the events in them."""

    train: int
    valid: int
    test: int
    seed: int
    events: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name: the numbers, and marks for the events and the generator's version."""
        events = hashlib.sha256("|".join(self.events).encode()).hexdigest()[:4]
        return (
            f"train{self.train}_valid{self.valid}_test{self.test}_seed{self.seed}"
            f"_events{len(self.events)}-{events}_{fingerprint()}"
        )


def fingerprint() -> str:
    """Eight hex digits of the generator's sources, so that a changed generator makes new data."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in ("__init__.py", "store.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def prepare(config: SoundsConfig, data_dir: Path) -> Path:
    """The folder of the data set, synthesised first if it is missing.

    `<split>/<number> <what is heard>.wav` and `<split>/labels.csv`. Raises UserError if the
    directory cannot be written or the disk is full.
    """
    clips = config.train + config.valid + config.test
    return once(
        data_dir / "sounds" / config.name,
        lambda folder: _write(config, folder),
        2.1 * RATE * SECONDS * clips,
        "store the sounds data set in",
        data_dir,
    )


def _write(config: SoundsConfig, folder: Path) -> None:
    for split in SPLITS:
        (folder / split).mkdir()
        count = getattr(config, split)
        with (
            open(folder / split / LABELS, "w", newline="", encoding="utf-8") as file,
            progress(f"synthesising sounds, {split}", "clips") as bar,
        ):
            table, task = csv.DictWriter(file, COLUMNS), bar.add_task(split, total=count)
            table.writeheader()
            for index in range(count):
                clip = synthesise(config.seed, split, index, config.events)
                name = _name(index, clip.heard)
                _write_wave(folder / split / name, clip.wave)
                table.writerow({"file": name} | clip.heard)
                bar.advance(task)


def _name(index: int, heard: Mapping[str, str]) -> str:
    """The name of a clip's file, which says what is heard."""
    return f"{index:05d} {', '.join(heard[task] for task in NAMES)}.wav"


def _write_wave(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def load(path: Path, rate: int = RATE) -> np.ndarray:
    """A clip of this data set, float32 [N]; needs no package for sound files.

    Raises Damaged, a UserError, if the file is gone or not as it was written.
    """
    length, trouble = int(RATE * SECONDS), DamagedStore(path.parents[1])
    stored = regular.read(path, 10 * length, lambda sentence: trouble)
    try:
        with wave.open(io.BytesIO(stored), "rb") as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()
            samples = np.frombuffer(file.readframes(length), "<i2")
    except (EOFError, wave.Error, ValueError) as error:
        raise trouble from error
    if form != (1, 2, RATE, length) or len(samples) != length:
        raise trouble
    return resampled(samples.astype(np.float32) / 32768, RATE, rate)


def rows(folder: Path, split: str, count: int) -> list[dict[str, str]]:
    """The rows of labels.csv for a split; Damaged if it is not as it was written."""
    trouble = DamagedStore(folder)
    stored = regular.read(folder / split / LABELS, 1000 * (count + 1), lambda sentence: trouble)
    try:
        found = list(csv.DictReader(io.StringIO(stored.decode(), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise trouble from error
    if len(found) != count or any(set(row) != set(COLUMNS) for row in found):
        raise trouble
    for index, row in enumerate(found):
        known = all(row[task] in names for task, names in NAMES.items())
        if not known or row["file"] != _name(index, row):
            raise trouble
    return found
