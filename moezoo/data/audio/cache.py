"""Features of clips on disk, computed once, as a memory-mapped array that training reads."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data.audio import fbank
from moezoo.data.audio.clips import Form, Listing, describe
from moezoo.data.audio.folder import once
from moezoo.data.progress import progress
from moezoo.data.source import Arrays
from moezoo.errors import UserError

VALUES, FRAMES = "features.npy", "frames.npy"


def open_listing(listing: Listing, form: Form, data_dir: Path) -> Arrays:
    """A source whose examples have `audio` float32 [T, F], `frames` int32 and a class per task.

    Raises UserError for clips that cannot be read and directories that cannot be written.
    """
    key = f"{listing.mark} {tuple(form)} {_version()}"
    folder = data_dir / "audio_features" / (
        f"{listing.name}_{listing.split}_{form.frames}x{form.mel}_"
        + hashlib.sha256(key.encode()).hexdigest()[:16]
    )  # fmt: skip
    size = 4.01 * len(listing.clips) * form.frames * form.mel + 1e6
    task = f"store the features of {listing.name} in"
    once(folder, lambda place: _compute(listing, form, place), size, task, data_dir)
    audio, frames = _read(folder, (len(listing.clips), form.frames, form.mel))
    arrays = {"audio": audio, "frames": frames, **listing.numbers()}
    return Arrays(describe(listing.name, listing.split, form, listing.names), arrays)


def _version() -> str:
    """A mark of the program that makes features."""
    here = Path(__file__).parent
    source = b"".join((here / name).read_bytes() for name in ("fbank.py", "read.py"))
    return hashlib.sha256(source).hexdigest()[:8]


def _compute(listing: Listing, form: Form, folder: Path) -> None:
    def of_clip(clip: Any) -> tuple[np.ndarray, int]:
        return fbank.features(listing.load(clip), form.frames, form.mel, form.rate)

    count = len(listing.clips)
    shape = (count, form.frames, form.mel)
    values = np.lib.format.open_memmap(folder / VALUES, "w+", np.float32, shape)
    frames = np.zeros(count, np.int32)
    label = f"features of {listing.name}, {listing.split}"
    with progress(label, "clips") as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        task = bar.add_task(label, total=count)
        for start in range(0, count, 1024):  # a bounded number of clips in memory
            made = pool.map(of_clip, listing.clips[start : start + 1024])
            for place, (audio_TF, own) in enumerate(made, start):
                values[place], frames[place] = audio_TF, own
                bar.advance(task)
    values.flush()
    np.save(folder / FRAMES, frames)


def _read(folder: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    try:
        values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        frames = np.load(folder / FRAMES, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        values, frames = np.zeros(0), np.zeros(0)
    if values.shape != shape or frames.shape != shape[:1]:
        raise UserError(f"The features in '{folder}' are damaged; delete that folder, run again.")
    return values, frames
