"""JSON objects of other projects' files, checked against the table of their format before use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo import regular, schema_check
from moezoo.errors import UserError
from moezoo.schema_check import CheckValue, FormatFault
from moezoo.storage import place

AGAIN = "download it again"
LARGEST = 32 * regular.MB  # of a JSON file


def read_object(
    path: Path,
    form: CheckValue = schema_check.anything,
    *,
    absent: str = AGAIN,
    again: str = AGAIN,
    largest: int = LARGEST,
) -> dict[str, Any]:
    """The JSON object in a file, which fits `form`.

    absent, again: what to do where there is no such file, and where it is damaged or another one.
    Raises UserError for whatever is wrong with it, in one sentence with its path.
    """
    if not place(path).exists():
        raise UserError(f"There is no {path}: {absent}.")
    content = regular.read(path, largest, UserError, again)
    try:
        found = schema_check.parse(content)
        if not isinstance(found, dict):
            raise FormatFault("it holds no JSON object")
        form(found, "")
    except FormatFault as error:
        raise UserError(f"{path}: {error}; {again}.") from error
    return found
