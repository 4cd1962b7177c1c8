"""Structured files from outside: JSON within bounds, one table per format says what values are.

A check is a function `(value, place)` that raises `FormatFault` with a sentence about that place,
or returns nothing; `table`, `list_of` and `map_of` put checks together:

    FORM = table({"depth": whole(1, 1000), "bias": maybe(flag)}, required=("depth",))
    values = parse(content)
    FORM(values, "")

Imports the standard library only, so that a copy may travel with files that do not have moezoo.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DEEPEST = 64  # lists and objects inside each other
SHOWN = 60  # characters of a value in a message

CheckValue = Callable[[Any, str], None]


class FormatFault(ValueError):
    """A file or a value in it that is not what its format says, as one sentence without a stop."""


def parse(content: bytes | str) -> Any:
    """A JSON text, parsed; FormatFault where it is none, too deep or repeats an object's name."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_object)
    except FormatFault:
        raise
    except (RecursionError, MemoryError):
        raise FormatFault("it is nested too deep") from None
    except ValueError as error:  # JSON's own, bytes that are no UTF-8, numbers of 5000 digits
        raise FormatFault(f"it is not JSON ({first_line(error)})") from None
    _check_depth(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        left = list(found)
        twice = next((a for (a, _), b in zip(pairs, left, strict=False) if a != b), pairs[-1][0])
        raise FormatFault(f"it has {shown(twice)} twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inside = (v.values() if isinstance(v, dict) else v for v in level if _holds(v))
        level = [v for values in inside for v in values if _holds(v)]
        if not level:
            return
    raise FormatFault("it is nested too deep")


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, of a bounded length; its kind where it has none."""
    return shortened((str(error).splitlines() or [""])[0] or type(error).__name__, 200)


def shown(value: Any) -> str:
    """A value for a message, on one line and not longer than a few words."""
    if isinstance(value, str):  # before `repr` copies what may be millions of characters
        return shortened(repr(value[: SHOWN + 1]), SHOWN)
    if isinstance(value, list | tuple | Mapping) and len(value) > SHOWN:
        return f"a {type(value).__name__} of {len(value)}"
    return shortened(repr(value), SHOWN)


def shortened(text: str, length: int) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def anything(value: Any, place: str) -> None:
    """No check."""


def flag(value: Any, place: str) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise FormatFault(f"{place} is {shown(value)}, it must be true or false")


def whole(low: int = 0, high: int = 2**31 - 1) -> CheckValue:
    """A whole number within bounds, both included; 1.0 and true are none."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise FormatFault(f"{place} is {shown(value)}, it must be a whole number")
        if not low <= value <= high:
            raise FormatFault(f"{place} is {shown(value)}, it must be from {low:,} to {high:,}")

    return check


def number(low: float = -math.inf, high: float = math.inf) -> CheckValue:
    """A finite number within bounds, both included."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FormatFault(f"{place} is {shown(value)}, it must be a number")
        if not (-1e308 <= value <= 1e308):  # NaN, too; and whole numbers that no float holds
            raise FormatFault(f"{place} is {shown(value)}, it must be a finite number")
        if not low <= value <= high:
            raise FormatFault(f"{place} is {shown(value)}, it must be from {low:g} to {high:g}")

    return check


def text(longest: int = 4096, pattern: str = "") -> CheckValue:
    """A text of at most so many characters, all of which match `pattern` where one is given."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, str):
            raise FormatFault(f"{place} is {shown(value)}, it must be a text")
        if len(value) > longest:
            raise FormatFault(
                f"{place} has {len(value):,} characters, where at most {longest:,} may be"
            )
        if pattern and not re.fullmatch(pattern, value):
            raise FormatFault(f"{place} is {shown(value)}, which is no such name")

    return check


def line(longest: int = 4096) -> CheckValue:
    """A text that can be shown: on one line, without characters that steer a terminal."""

    def check(value: Any, place: str) -> None:
        text(longest)(value, place)
        if not value.isprintable():
            raise FormatFault(f"{place} is {shown(value)}, it must have printable characters only")

    return check


def one_of(*values: Any) -> CheckValue:
    """One of these values; true is not 1."""

    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            told = "one of " * (len(values) > 1) + ", ".join(map(repr, values))
            raise FormatFault(f"{place} is {shown(value)}, it must be {told}")

    return check


def maybe(inner: CheckValue) -> CheckValue:
    """null, or what `inner` wants."""

    def check(value: Any, place: str) -> None:
        if value is not None:
            inner(value, place)

    return check


def either(*checks: CheckValue) -> CheckValue:
    """What one of these wants; the sentence is the last one's."""

    def check(value: Any, place: str) -> None:
        for one in checks[:-1]:
            try:
                return one(value, place)
            except FormatFault:
                continue
        checks[-1](value, place)

    return check


def list_of(item: CheckValue, shortest: int = 0, longest: int = 100_000) -> CheckValue:
    """A list of so many values."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list):
            raise FormatFault(f"{place} is {shown(value)}, it must be a list")
        if not shortest <= len(value) <= longest:
            raise FormatFault(
                f"{place} has {len(value):,} entries, it must have from {shortest:,} to {longest:,}"
            )
        for i, one in enumerate(value):
            item(one, f"{place}[{i}]")

    return check


def map_of(item: CheckValue, shortest: int = 0, longest: int = 1_000_000) -> CheckValue:
    """An object with any names, all of whose values are alike."""

    def check(value: Any, place: str) -> None:
        _check_object(value, place)
        if not shortest <= len(value) <= longest:
            raise FormatFault(
                f"{_told(place)} has {len(value):,} entries, it must have from {shortest:,} to "
                f"{longest:,}"
            )
        for name, one in value.items():
            item(one, _within(place, name))

    return check


def table(
    fields: Mapping[str, CheckValue], required: Sequence[str] = (), others: CheckValue = anything
) -> CheckValue:
    """An object whose values are checked by name; `others` checks those that have no line.

    `required` must be there. With `others=refused` a name without a line is an error.
    """

    def check(value: Any, place: str) -> None:
        _check_object(value, place)
        for name in required:
            if name not in value:
                raise FormatFault(f"{_within(place, name)} is missing")
        for name, one in value.items():
            fields.get(name, others)(one, _within(place, name))

    return check


def refused(value: Any, place: str) -> None:
    """As `others` of a table: no further name."""
    raise FormatFault(f"{place} is not known")


def _check_object(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise FormatFault(f"{_told(place)} is {shown(value)}, it must be an object")


def _told(place: str) -> str:
    return place or "it"


def _within(place: str, name: str) -> str:
    name = shortened(name if name.isprintable() else repr(name), SHOWN)
    return f"{place}.{name}" if place else name


def relative(value: Any, place: str) -> None:
    """The name of a file inside a folder: relative, without `..`, on every system."""
    text(1024)(value, place)
    parts = re.split(r"[\\/]", value)
    if not value or ".." in parts or "" in parts or ":" in value or not value.isprintable():
        raise FormatFault(f"{place} is {shown(value)}, which is no file inside this folder")
