"""What an exported path reads: one array of a fixed form, and how a file becomes that array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax


@dataclass(frozen=True, eq=False)
class InputSpec:
    """The input of a task path and of its export.

    name: its key in batches, in the manifest's `inputs` and among golden arrays; it also decides
    which reader the loader takes (`runtime.load.Reader`), a domain's own travels as `<name>.py`.
    unit: what examples are called, in the plural.
    shape: of one example.   layout: the names of its axes, as the manifest says them.
    words: what the manifest says besides of the array, such as the order of colours.
    preprocess: the steps from a file to the array, as the manifest lists them.
    postprocess: what is left to do with a prediction, in words.
    files: the modules that travel with an export so that it reads files by itself, by the names of
    their copies.
    """

    name: str
    unit: str
    shape: tuple[int, ...]
    layout: str
    preprocess: tuple[Mapping[str, Any], ...] = ()
    postprocess: str = "already applied in `prediction`"
    words: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, ModuleType] = field(default_factory=dict)
    dtype: str = "float32"

    def batch(self, rows: Any) -> jax.ShapeDtypeStruct:
        """The form of so many examples; `rows` may be a symbolic dimension."""
        return jax.ShapeDtypeStruct((rows, *self.shape), self.dtype)

    def described(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {
            "dtype": self.dtype,
            "shape": ["b", *self.shape],
            "layout": self.layout,
            **self.words,
            "range": "after `preprocess`",
        }
