"""JSON as everything here writes it: what JSON has no word for becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """`value` as JSON text with a newline at its end; NaN and infinite numbers are null.

    Python would write them as bare words that are no JSON and that other readers refuse.
    """
    text = json.dumps(plain(value), indent=indent, sort_keys=sort_keys, allow_nan=False)
    return text + "\n"


def plain(value: Any) -> Any:
    """A copy of nested mappings and sequences in which None stands for numbers that are none."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
