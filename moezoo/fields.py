"""What a configuration's fields may hold: types and ranges stand in their declarations.

One checker, `check`, walks nested dataclasses. `Annotated[int, Range(1)]` declares a number from 1
on, `FilePath` the name of a file; every number is finite. `--help` of the command line has ranges.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from moezoo.errors import UserError, unknown

LONGEST_PATH, LONGEST_NAME = 4095, 200  # bytes of a path and of one name in it, with room for marks
SHOWN = 80  # characters of a wrong value that a message repeats
LARGEST = float(np.finfo(np.float32).max)  # everything is computed in float32


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes; None: no bound. `above` and `below` are themselves left out.

    What is left out is left out in float32, too, in which everything is computed: 1e-60 is 0 there.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def broken(self, value: float) -> str:
        """The bound that a number does not keep, in words: "at least 1"; "" where it is within."""
        single = float(np.float32(value)) if isinstance(value, float) else value
        if self.least is not None and value < self.least:
            return f"at least {self.least:g}"
        if self.above is not None and min(value, single) <= self.above:
            return f"above {self.above:g}"
        if self.most is not None and value > self.most:
            return f"at most {self.most:,}"
        if self.below is not None and max(value, single) >= self.below:
            return f"below {self.below:g}"
        return ""

    @property
    def words(self) -> str:
        """The whole range in words: "at least 1", "from 0 to below 1"."""
        if self.least is not None and (self.most, self.below) != (None, None):
            end = f"{self.most:,}" if self.most is not None else f"below {self.below:g}"
            return f"from {self.least:g} to {end}"
        parts = [f"at least {self.least:g}"] if self.least is not None else []
        parts += [f"above {self.above:g}"] if self.above is not None else []
        parts += [f"at most {self.most:,}"] if self.most is not None else []
        parts += [f"below {self.below:g}"] if self.below is not None else []
        return " and ".join(parts)


@dataclass(frozen=True)
class IsPath:
    """A text that names a file or folder."""


@dataclass(frozen=True)
class Keys:
    """The names that a mapping may have, and what a value means.

    names: gives them for the whole configuration that is checked.   used: likewise those of them
    that mean something in it, so that no other one is typed for nothing.
    """

    names: Callable[[Any], Iterable[str]]
    used: Callable[[Any], Iterable[str]]
    help: str


@dataclass(frozen=True)
class KnownWords:
    """The words that a field may have, given by the whole configuration; for its help."""

    names: Callable[[Any], Iterable[str]]


Count = Annotated[int, Range(1, 2**31 - 1)]  # of examples, steps, bytes
Whole = Annotated[int, Range(0, 2**31 - 1)]
AxisSize = Annotated[int, Range(1, 2**16)]  # of one axis of an array
Depth = Annotated[int, Range(1, 512)]  # layers; each is compiled
ExampleCount = Annotated[int, Range(1, 10_000_000)]  # of a split
Side = Annotated[int, Range(8, 4096)]  # pixels
BatchSize = Annotated[int, Range(1, 2**20)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX drops higher bits
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, below=1)]
Ratio = Annotated[float, Range(above=0, most=1024)]  # of two sizes
FilePath = Annotated[str, IsPath()]


class Wrong(UserError):
    """A field holds a value of another type, or out of range (`fits` is True)."""

    def __init__(self, text: str, fits: bool = False):
        super().__init__(text)
        self.fits = fits


def check(config: Any, where: str = "", root: Any = None) -> None:
    """UserError for the first field of a dataclass, or of one inside, that holds what it must not.

    Args:
      config: an instance; its annotations say what its fields hold.
      where: its dotted name, for the messages.
      root: the whole configuration, which decides what names some mappings may have (`Keys`); None:
        those names are not checked.
    """
    for name, hint in hints(type(config)).items():
        full = f"{where}.{name}" if where else name
        check_value(hint, getattr(config, name), full, root=root)


@lru_cache(maxsize=512)
def hints(kind: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields by name, with their ranges (`Annotated`).

    Raises UserError where an annotation cannot be read.
    """
    try:
        found = get_type_hints(kind, include_extras=True)
    except Exception as error:  # annotations are expressions: anything may go wrong in them
        raise UserError(
            f"The types of the fields of {kind.__name__} cannot be read: "
            f"{type(error).__name__}: {error}."
        ) from error
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def check_value(
    hint: Any, value: Any, where: str, limits: tuple[Any, ...] = (), root: Any = None
) -> None:
    """UserError where `value` is not of the type `hint`, or out of its range or of `limits`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check_value(parts[0], value, where, (*limits, *parts[1:]), root)
    elif origin is ClassVar or hint is Any or isinstance(hint, TypeVar):
        if _is_section(value):
            check(value, where, root)
    elif origin in (Union, types.UnionType):
        _check_union(hint, value, where, limits, root)
    elif origin is Literal:
        # True equals 1 and is none of the values 1 and 2.
        if not any(type(value) is type(part) and value == part for part in parts):
            raise _unknown_choice(where, value, parts)
    elif origin is tuple and isinstance(value, tuple):
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) != len(value):
            raise wrong(hint, value, where)
        for i, (kind, part) in enumerate(zip(kinds, value, strict=True)):
            check_value(kind, part, f"{where}[{i}]", limits, root)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        for key, part in value.items():
            check_value(parts[0], key, f"A name in {where}")
            for keys in (limit for limit in limits if isinstance(limit, Keys)):
                if root is not None and key not in (known := keys.names(root)):
                    raise unknown(f"name in {where}", short(key), list(known))
            check_value(parts[1], part, f"{where}.{key}", limits, root)
    elif not _is_of(hint, value):
        raise wrong(hint, value, where)
    elif _is_section(value):
        check(value, where, root)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(value, where, limits)
    elif isinstance(value, str):
        _check_text(value, where, limits)


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value is of a type without parts."""
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False):
        return _is_section(value) and isinstance(value, hint)
    if isinstance(hint, type):
        return isinstance(value, hint)
    # An annotation that only a user's own configuration has, such as list[int].
    from typeguard import TypeCheckError, check_type

    try:
        check_type(value, hint)
    except TypeCheckError:
        return False
    return True


def _check_union(hint: Any, value: Any, where: str, limits: tuple[Any, ...], root: Any) -> None:
    errors = []
    for part in get_args(hint):
        try:
            return check_value(part, value, where, limits, root)
        except UserError as error:
            errors.append((part, error))
    inner = [error for part, error in errors if _is_section(value) and _is_of(part, value)]
    inner += [error for _, error in errors if getattr(error, "fits", False)]
    raise inner[0] if inner else wrong(hint, value, where)


def _check_number(value: float, where: str, limits: tuple[Any, ...]) -> None:
    ranges = [limit for limit in limits if isinstance(limit, Range)]
    words = " and ".join(limit.words for limit in ranges)
    if not (abs(value) <= LARGEST and math.isfinite(value)):
        rest = f", {words}" if words else ""
        raise Wrong(f"{where} is {shown(value)}; it must be a finite number{rest}.", fits=True)
    for limit in ranges:
        if bound := limit.broken(value):
            raise Wrong(f"{where} is {shown(value)}; it must be {bound}.", fits=True)


def _check_text(value: str, where: str, limits: tuple[Any, ...]) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise Wrong(f"{where} is {shown(value)}, which is no valid Unicode.", fits=True) from None
    if "\0" in value:
        raise Wrong(f"{where} is {shown(value)}; it must not have a zero byte.", fits=True)
    if IsPath() in limits:
        if not value or not value.isprintable():
            raise Wrong(
                f"{where} is {value!r:.{SHOWN}}; it must have printable characters, at least one.",
                fits=True,
            )
        longest = max(len(part.encode()) for part in value.split("/"))
        if size > LONGEST_PATH or longest > LONGEST_NAME:
            raise Wrong(
                f"{where} is {shown(value)}, which is too long for a path: a name in it has at "
                f"most {LONGEST_NAME} bytes, all of it {LONGEST_PATH}.",
                fits=True,
            )


def shown(value: Any) -> str:
    """A wrong value on one line, short."""
    try:
        text = repr(value)
    except Exception:  # a whole number of more than 4,300 digits, or somebody's broken class
        text = f"a {type(value).__name__} that cannot be written"
    return short(text)


def short(text: str) -> str:
    """A wrong text on one line, its beginning only where it is long."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def wrong(hint: Any, value: Any, where: str) -> Wrong:
    """The error for a value of another type."""
    parts = [n for n in dir(hint) if n[0] != "_"] if getattr(hint, "_is_protocol", False) else []
    lacks = [name for name in parts if not hasattr(value, name)] if _is_section(value) else []
    without = f" without {', '.join(lacks)}" if lacks else ""
    return Wrong(f"{where} is {shown(value)}{without}; expected {words(hint)}.")


def _unknown_choice(where: str, value: Any, known: tuple[Any, ...]) -> UserError:
    if not isinstance(value, str):
        return wrong(Literal[known], value, where)
    names = [str(part) for part in known]
    return unknown(where, short(value), names)


def words(hint: Any) -> str:
    """A type in words: "a whole number", "2 whole numbers", "a number or None"."""
    one = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    many = {int: "whole numbers", float: "numbers", bool: "Trues or Falses", str: "words"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return words(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(words(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(str(part) for part in parts)}"
    if origin is tuple and len(set(parts) - {Ellipsis}) == 1:
        count = "" if Ellipsis in parts else f"{len(parts)} "
        inner = get_args(parts[0])[0] if get_origin(parts[0]) is Annotated else parts[0]
        return f"{count}{many.get(inner, f'values of {words(inner)}')}"
    if hint is type(None):
        return "None"
    if origin is dict:
        return f"a mapping from {words(parts[0])} to {words(parts[1])}"
    if getattr(hint, "_is_protocol", False) or dataclasses.is_dataclass(hint):
        return f"a {cast(type, hint).__name__}"
    return one.get(hint, f"a value of {getattr(hint, '__name__', hint)}")


def keys_of(hint: Any) -> Keys | None:
    """The names that a mapping may have, where its type declares them."""
    return next((part for part in get_args(hint) if isinstance(part, Keys)), None)


def choice_words(hint: Any, root: Any) -> str:
    """The words that a type declares for a configuration, as "of: a, b"; "" without any."""
    own = [part for part in get_args(hint) if isinstance(part, KnownWords)]
    return f"of: {', '.join(own[0].names(root))}" if own else ""


def range_words(hint: Any) -> str:
    """The range that a type declares, in words; "" without one."""
    own = [part.words for part in get_args(hint) if isinstance(part, Range)]
    inner = [range_words(part) for part in get_args(hint) if not isinstance(part, Range)]
    return next((text for text in own + inner if text), "")
