"""A reader of somebody's own: lines of numbers (`test_readers`); a copy travels in its exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import forms
else:
    import forms  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]

STEPS = forms.sequence(forms.step("divide", by=sc.number(1e-6, 1e6)))


def fits(shape: Sequence[Any], steps: Any, place: str) -> None:
    forms.need(len(shape) == 1, f"{place} is no row's")


def read(path: str | Path, steps: Any) -> np.ndarray:
    try:
        return np.array([float(word) for word in Path(path).read_text().split()])
    except (OSError, ValueError) as error:
        raise forms.ExportError(f"{path} is no line of numbers ({error}).") from error


def prepare(given: Any, shape: Sequence[int], steps: Any) -> np.ndarray:
    rows = np.asarray(given)
    if rows.shape[1:] != tuple(shape):
        raise forms.ExportError(f"Rows must have {shape[0]} numbers.")
    return rows if rows.dtype == np.float32 else (rows / steps[0]["by"]).astype(np.float32)


def backdrop(example: np.ndarray, prepared: np.ndarray) -> np.ndarray:
    return np.zeros((48, 160, 3), np.uint8)
