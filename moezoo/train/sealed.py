"""JSON files that carry a checksum of themselves, so that damage shows when they are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo import regular
from moezoo.schema_check import FormatFault, parse

KEY = "checksum"
LARGEST = 256 * regular.MB


class DamagedSeal(ValueError):
    """The text is no JSON object, or not the one that its checksum was made for."""


def seal(content: Mapping[str, Any]) -> str:
    """`content` as JSON text with its checksum as the last field; `unseal` reads it back."""
    return json.dumps({**content, KEY: _checksum(content)}, indent=1) + "\n"


def unseal(text: str | bytes) -> dict[str, Any]:
    """The content of a sealed text; that of one without any checksum as it stands.

    Older versions wrote none. Raises Damaged for every other text.
    """
    try:
        content = parse(text)
    except FormatFault as error:
        raise DamagedSeal(str(error)) from error
    if not isinstance(content, dict):
        raise DamagedSeal("it is not a JSON object")
    # A checksum whose name was damaged is one, too.
    sealed = KEY in content or any(_is_checksum(value) for value in content.values())
    if sealed and content.pop(KEY, None) != _checksum(content):
        raise DamagedSeal("it was changed")
    return content


def read(path: Path) -> dict[str, Any]:
    """The content of a sealed file; Damaged also where it is missing, no file or far too large."""
    return unseal(regular.read(path, LARGEST, DamagedSeal))


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _checksum(content: Mapping[str, Any]) -> str:
    # Of the values and not of the bytes: line ends and spaces may change.
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()
