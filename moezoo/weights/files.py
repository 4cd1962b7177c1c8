"""Arrays in files of other projects, by name; whatever is wrong with a file is one sentence."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moezoo.errors import UserError

Arrays = dict[str, np.ndarray]


class Format(NamedTuple):
    """`names` reads only what the file lists; `load` all of it."""

    names: Callable[[Path], list[str]]
    load: Callable[[Path], Arrays]


def _open_npz(path: Path) -> Any:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it holds one array without a name")
    return archive


def _npz_names(path: Path) -> list[str]:
    with _open_npz(path) as archive:
        return list(archive.files)


def _npz(path: Path) -> Arrays:
    with _open_npz(path) as archive:
        return {name: _number(archive[name]) for name in archive.files}


def _number(array: np.ndarray) -> np.ndarray:
    """bfloat16, which NumPy writes as two bytes of nothing in particular, as what it is."""
    two_bytes = array.dtype.kind == "V" and array.dtype.itemsize == 2
    return array.view(ml_dtypes.bfloat16) if two_bytes else array


def _safetensors_names(path: Path) -> list[str]:
    with safe_open(path, "numpy") as archive:
        return list(archive.keys())


def _safetensors(path: Path) -> Arrays:
    with safe_open(path, "numpy") as archive:
        return {name: archive.get_tensor(name) for name in archive.keys()}


FORMATS = {
    ".npz": Format(_npz_names, _npz),
    ".safetensors": Format(_safetensors_names, _safetensors),
}


def names(path: Path) -> list[str]:
    """The names of the arrays of an .npz or .safetensors file, without reading the arrays.

    Raises UserError for a missing file, another format and a damaged file.
    """
    return _read(path, "names")


def load(path: Path) -> Arrays:
    """The arrays of an .npz or .safetensors file; UserError as for `names`."""
    return _read(path, "load")


def _read(path: Path, what: str) -> Any:
    if path.suffix not in FORMATS:
        raise UserError(
            f"'{path}' is no file of weights that can be read here: name an .npz file (augreg) or "
            "a .safetensors file (timm, DeiT)."
        )
    try:
        return getattr(FORMATS[path.suffix], what)(path)
    except FileNotFoundError as error:
        raise UserError(f"There is no file '{path}': name a file of weights.") from error
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise UserError(f"Cannot read '{path}': {reason}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile, SafetensorError, TypeError) as error:
        raise UserError(
            f"'{path}' cannot be read as {path.suffix} ({str(error).splitlines()[0]}): it is "
            "damaged or another kind of file; download it again."
        ) from error
