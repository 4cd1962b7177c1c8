"""Features of clips on disk, computed once, as a memory-mapped array that training reads.

Checksums are stored beside them: features that are damaged later are detected when they are opened,
and computed again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data import store
from moezoo.data.progress import progress
from moezoo.data.source import ArraySource
from moezoo.domains.audio.data import fbank
from moezoo.domains.audio.data.clips import ClipForm, Listing, describe
from moezoo.domains.audio.data.folder import once

VALUES, FRAMES, SUMS = "features.npy", "frames.npy", "sums.json"
PROGRAMS = ("fbank.py", "read.py", "decode.py", "wav.py")


def open_listing(listing: Listing, form: ClipForm, data_dir: Path) -> ArraySource:
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

    def made() -> None:
        once(folder, lambda place: _compute(listing, form, place), size, task, data_dir)

    def opened() -> tuple[np.ndarray, np.ndarray]:
        made()
        found = _read(folder, (len(listing.clips), form.frames, form.mel))
        if found is None:
            raise store.DamagedStore(folder)
        return found

    made()  # here, so that damaged clips, which need not be ours, are not taken for features
    audio, frames = store.renewed(opened, f"Features of {listing.name}")
    arrays = {"audio": audio, "frames": frames, **listing.numbers()}
    return ArraySource(describe(listing.name, listing.split, form, listing.names), arrays)


def _version() -> str:
    """A mark of the program that makes features."""
    here = Path(__file__).parent
    source = b"".join((here / name).read_bytes() for name in PROGRAMS)
    return hashlib.sha256(source).hexdigest()[:8]


def _compute(listing: Listing, form: ClipForm, folder: Path) -> None:
    shape = (len(listing.clips), form.frames, form.mel)
    frames = np.zeros(shape[0], np.int32)
    sums = {VALUES: _write(folder / VALUES, _features(listing, form, shape, frames))}
    stored = io.BytesIO()
    np.save(stored, frames)
    sums[FRAMES] = _write(folder / FRAMES, [stored.getvalue()])
    (folder / SUMS).write_text(json.dumps(sums))


def _features(
    listing: Listing, form: ClipForm, shape: tuple[int, int, int], frames: np.ndarray
) -> Iterator[bytes]:
    """The content of an npy file of all clips' features; fills in `frames`."""

    def of_clip(clip: Any) -> tuple[np.ndarray, int]:
        return fbank.features(listing.load(clip), form.frames, form.mel, form.rate)

    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    yield header.getvalue()
    label = f"features of {listing.name}, {listing.split}"
    with progress(label, "clips") as bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        task = bar.add_task(label, total=shape[0])
        for start in range(0, shape[0], 1024):  # a bounded number of clips in memory
            made = pool.map(of_clip, listing.clips[start : start + 1024])
            for place, (audio_TF, own) in enumerate(made, start):
                frames[place] = own
                yield audio_TF.astype("<f4").tobytes()
                bar.advance(task)


def _write(path: Path, parts: Iterable[bytes]) -> int:
    """Write a file and return its checksum.

    Not through a memory map: if the disk fills up, that ends the process with a signal.
    """
    found = 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            found = zlib.crc32(part, found)
        file.flush()
        os.fsync(file.fileno())
    return found


def _read(folder: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The arrays, or None if they are not as they were written."""
    try:
        sums = json.loads((folder / SUMS).read_bytes())
        if sums != {name: _sum(folder / name) for name in (VALUES, FRAMES)}:
            return None
        values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        frames = np.load(folder / FRAMES, allow_pickle=False)
    except (OSError, ValueError, EOFError, RecursionError):
        return None
    return (values, frames) if values.shape == shape and frames.shape == shape[:1] else None


def _sum(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            found = zlib.crc32(part, found)
    return found
