"""Typed overrides of a configuration on the command line, such as `--train.steps 200`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import types
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from moezoo.errors import UserError, unknown

C = TypeVar("C")
MARKERS = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)


class Given(NamedTuple):
    """One override as it stands on the command line: the option's name and its values."""

    name: str
    values: list[str]


def parse(config: C, arguments: Sequence[str], prog: str = "train.py", description: str = "") -> C:
    """`config`, a frozen dataclass, with the overrides among `arguments` applied.

    `--help` lists every override with its type, default and meaning, and ends the program.

    Raises UserError with the nearest names for an unknown override, for a value of another type,
    and where the configuration itself refuses its values together.
    """
    shown = _narrowed(config)
    if {"-h", "--help"} & set(arguments):
        _cli(shown, ["--help"], prog, description)
    options = _options(config)
    given = _split(arguments, options)
    parsed = _quiet(shown, given)
    if parsed is None:
        wrong = next((one for one in given if not _fits(shown, one)), given[-1])
        raise _wrong_value(wrong, options[wrong.name])
    return _widened(parsed, config)


def _cli(shown: Any, words: list[str], prog: str, description: str) -> Any:
    return tyro.cli(
        type(shown),
        default=shown,
        args=words,
        prog=prog,
        description=description,
        config=MARKERS,
        use_underscores=True,
    )


def _quiet(shown: Any, given: Sequence[Given]) -> Any:
    """The configuration with these overrides; None where a value is of another type."""
    words = [word for name, values in given for word in (f"--{name}", *values)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return _cli(shown, words, "", "")
    except SystemExit:
        return None


def _fits(shown: Any, override: Given) -> bool:
    """Whether an override alone is of the right type, so that an error can name the wrong one."""
    try:
        return _quiet(shown, [override]) is not None
    except UserError:  # right by itself; the configuration needs others to go with it
        return True


def _narrowed(value: Any) -> Any:
    """`value` as a class whose annotations are the types that its parts really have.

    A field that is declared as any model configuration becomes one of this very kind, so that
    the command line offers that kind's fields.
    """
    parts = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        parts[field.name] = _narrowed(inner) if dataclasses.is_dataclass(inner) else inner
    nested = [(name, type(part)) for name, part in parts.items() if dataclasses.is_dataclass(part)]
    if not nested:
        return value
    kind = type(value)
    narrow = dataclasses.make_dataclass(
        kind.__name__,
        nested,
        bases=(kind,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": kind.__doc__},
    )
    return narrow(**parts)


def _widened(value: Any, like: Any) -> Any:
    """Inverse of `_narrowed`: the classes of `like` with the values of `value`."""
    parts = {}
    for field in dataclasses.fields(like):
        part, old = getattr(value, field.name), getattr(like, field.name)
        parts[field.name] = _widened(part, old) if dataclasses.is_dataclass(old) else part
    return type(like)(**parts)


def _options(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every override's name with its type: `{"train.steps": int}`."""
    hints = get_type_hints(type(value))
    options: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            options |= _options(inner, f"{prefix}{field.name}.")
        else:
            options[prefix + field.name] = hints[field.name]
    return options


def _split(arguments: Sequence[str], options: dict[str, Any]) -> list[Given]:
    """The arguments as overrides; UserError for a name that is none."""
    given: list[Given] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            plain = name.replace("-", "_")
            if plain not in options:
                raise _unknown(plain, list(options))
            given.append(Given(plain, [value] if equals else []))
        elif given:
            given[-1].values.append(argument)
        else:
            raise UserError(
                f"'{argument}' is not an override; write --name value, for example "
                "--train.steps 200 (--help lists all)."
            )
    return given


def _unknown(name: str, known: list[str]) -> UserError:
    """The nearest full names, and those whose last part is the same."""
    last = name.rpartition(".")[2]
    ends = [option for option in known if option.rpartition(".")[2] == last]
    near = list(dict.fromkeys([*get_close_matches(name, known, n=2, cutoff=0.75), *ends]))
    hint = f" did you mean {' or '.join(f'--{option}' for option in near)}?" if near else ""
    return UserError(f"Unknown override '--{name}':{hint} --help lists all.")


def _wrong_value(override: Given, hint: Any) -> UserError:
    name, values = override
    got = f"got {' '.join(values)!r}" if values else "got no value"
    parts = get_args(hint)
    if get_origin(hint) is Literal and len(values) == 1:
        return unknown(f"value of --{name}", values[0], [str(part) for part in parts])
    return UserError(f"Override --{name} {got}; expected {_words(hint)}.")


def _words(hint: Any) -> str:
    """A type in words: "a whole number", "2 whole numbers", "a number or None"."""
    one = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    many = {int: "whole numbers", float: "numbers", bool: "Trues or Falses", str: "words"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(str(part) for part in parts)}"
    if origin is tuple and len(set(parts) - {Ellipsis}) == 1:
        count = "" if Ellipsis in parts else f"{len(parts)} "
        return count + many.get(parts[0], f"values of {parts[0]}")
    if hint is type(None):
        return "None"
    return one.get(hint, f"a value of {hint}")
