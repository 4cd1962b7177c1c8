"""A checkpoint's manifest: what it holds and the checksum of every file, written last.

A folder without one was never finished; a folder that disagrees with its own is damaged, and so is
a manifest that disagrees with the checksum it carries of itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from moezoo import schema_check as check
from moezoo import storage
from moezoo.errors import UserError
from moezoo.files import failure, write_atomically
from moezoo.train import sealed

NAME = "manifest.json"


class Manifest(NamedTuple):
    """`arrays`: path -> [shape, dtype]; `files`: relative path -> [bytes, sha256]."""

    step: int
    score: float | None
    arrays: dict[str, list[Any]]
    files: dict[str, list[Any]]


def write(folder: Path, step: int, score: float | None, arrays: Mapping[str, Any]) -> None:
    """Seal a checkpoint's folder; every file in it is read once for its checksum."""
    described = {path: [list(x.shape), str(x.dtype)] for path, x in arrays.items()}

    def summed(path: Path) -> list[Any]:
        return [path.stat().st_size, checksum(path)]

    try:
        found = [p for p in sorted(folder.rglob("*")) if storage.is_stored(p) or p.is_file()]
        names = [path.relative_to(folder).as_posix() for path in found]
        files = dict(zip(names, storage.each(summed, found, folder), strict=True))
    except OSError as error:
        raise failure("read", folder, error) from error
    content = Manifest(step, None if score is None else float(score), described, files)._asdict()
    write_atomically(folder / NAME, sealed.seal(content))


def read(folder: Path) -> Manifest | None:
    """The manifest; None where the checkpoint was never finished or the manifest is damaged."""
    try:
        content = sealed.read(folder / NAME)
        FORM(content, "")
    except ValueError:
        return None
    held = Manifest(**content)
    if str(held.step) != folder.name:
        return None
    scored = held.score is not None and math.isfinite(held.score)
    return held if scored else held._replace(score=None)  # older versions wrote NaN, too


def _pair(first: check.CheckValue, second: check.CheckValue) -> check.CheckValue:
    def both(value: Any, place: str) -> None:
        check.list_of(check.anything, 2, 2)(value, place)
        first(value[0], f"{place}[0]")
        second(value[1], f"{place}[1]")

    return both


def _dtype(value: Any, place: str) -> None:
    check.text(32)(value, place)
    try:
        known = str(jnp.dtype(value)) == value
    except TypeError:
        known = False
    if not known:
        raise check.FormatFault(f"{place} is {value}, which is no kind of number")


def _score(value: Any, place: str) -> None:
    if value is not None and type(value) is not float:
        raise check.FormatFault(f"{place} is {check.shown(value)}, it must be a number")


def _files(value: Any, place: str) -> None:
    check.map_of(_pair(check.whole(0, 2**62), check.text(64)), shortest=1)(value, place)
    for name in value:
        check.relative(name, place)


FORM = check.table(
    {
        "step": check.whole(),
        "score": _score,
        "arrays": check.map_of(_pair(check.list_of(check.whole()), _dtype)),
        "files": _files,
    },
    required=Manifest._fields,
    others=check.refused,
)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None where nothing is."""
    manifest = read(folder)
    if manifest is None:
        return f"{NAME} is missing or damaged"
    if storage.is_stored(folder):
        found = storage.each(lambda item: _fault(folder, *item), manifest.files.items(), folder)
        return next((fault for fault in found if fault), None)
    faults = (_fault(folder, *item) for item in manifest.files.items())
    return next((fault for fault in faults if fault), None)


def _fault(folder: Path, name: str, stated: list[Any]) -> str | None:
    """What is wrong with one file, of which the manifest states size and checksum."""
    path, (size, written) = folder / name, stated
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} of {size} bytes"
    if checksum(path) != written:
        return f"{name} was changed"
    return None


def check_arrays(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """UserError naming the first paths and shapes where a checkpoint is of another model.

    `held` is a manifest's `arrays`; `wanted` maps paths to arrays or ShapeDtypeStructs. Groups
    (the first part of a path) of which nothing is wanted are not compared.
    """
    groups = {path.partition("/")[0] for path in wanted}
    compared = [path for path in held if path.partition("/")[0] in groups]
    wrong = [f"{path} is not in the model" for path in compared if path not in wanted]
    for path, leaf in wanted.items():
        shape, dtype = held.get(path, (None, None))
        if shape is None:
            wrong.append(f"{path} is missing")
        elif tuple(shape) != tuple(leaf.shape):
            wrong.append(f"{path} is {tuple(shape)}, the model's is {tuple(leaf.shape)}")
        elif dtype != str(leaf.dtype):
            wrong.append(f"{path} is {dtype}, the model's is {leaf.dtype}")
    if wrong:
        # What follows from the parameters comes after them, the optimiser's state last.
        wrong.sort(key=lambda text: (not text.startswith("params/"), text.startswith("optimiser/")))
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        another = "model" if not wrong[0].startswith("optimiser/") else "optimiser"
        raise UserError(
            f"Checkpoint {folder} is of another {another}: {'; '.join(wrong[:3])}{more}. "
            "Give the run another name, or the configuration the checkpoint was written with."
        )


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
