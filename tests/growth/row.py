"""How an export of the toy domain reads a line of numbers; a copy of this travels in exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo.deploy.runtime import forms
else:
    import forms  # pyright: ignore[reportMissingImports]

STEPS = forms.sequence()


def fits(shape: Sequence[Any], steps: Any, place: str) -> None:
    """A row has one axis."""
    forms.need(len(shape) == 1, f"{place} is no row's")


def read(path: str | Path, steps: Any) -> np.ndarray:
    """The numbers of a file."""
    try:
        return np.array([float(word) for word in Path(path).read_text().split()], np.float32)
    except (OSError, ValueError) as error:
        raise forms.ExportError(f"{path} is no line of numbers ({error}).") from error


def prepare(given: Any, shape: Sequence[int], steps: Any) -> np.ndarray:
    """Rows as the program takes them."""
    rows = np.asarray(given, np.float32)
    if rows.shape[1:] != tuple(shape):
        raise forms.ExportError(f"Rows must have {shape[0]} numbers.")
    return rows


def backdrop(example: np.ndarray, prepared: np.ndarray) -> np.ndarray:
    """What a prediction is painted on."""
    return np.zeros((48, 160, 3), np.uint8)
