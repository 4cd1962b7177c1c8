"""Typed overrides of a configuration on the command line, such as `--train.steps 200`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import keyword
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import numpy as np
import tyro

from moezoo import fields
from moezoo.errors import UserError, unknown

C = TypeVar("C")
MARKERS = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)


class Override(NamedTuple):
    """One override as it stands on the command line: the option's name and its values."""

    name: str
    values: list[str]


def parse(config: C, arguments: Sequence[str], prog: str = "train.py", description: str = "") -> C:
    """`config`, a frozen dataclass, with the overrides among `arguments` applied.

    `--help` lists every override with its type, default and meaning, and ends the program.

    Raises UserError with the nearest names for an unknown override, for a value of another type or
    out of range, and where the configuration itself refuses its values together.
    """
    fields.check(config, root=config)
    narrow = shown(config)
    if {"-h", "--help"} & set(arguments):
        _cli(narrow, ["--help"], prog, description)
    options = _options(config, config)
    given = _split(arguments, options)
    parsed = _quiet(narrow, given)
    if parsed is None:
        wrong = next((one for one in given if not _fits(narrow, one)), given[-1])
        raise _wrong_value(wrong, options[wrong.name])
    changed = _widened(parsed, config, config)
    fields.check(changed, root=changed)
    _check_used(given, changed, changed)
    return changed


def shown(config: Any) -> Any:
    """A configuration as an object whose annotations are what the command line shows."""
    return _narrowed(config, config)


def replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration with other values: of fields by name, of sections as mappings of their own.

    `{"seed": 1, "train": {"steps": 200}}`. A section may also be given whole. Raises UserError with
    the nearest names for an unknown field, and for values that the configuration does not take.
    """
    changed = _with(value, changes, "")
    fields.check(changed, root=changed)
    return changed


def _with(value: Any, changes: Mapping[str, Any], where: str) -> Any:
    hints = fields.hints(type(value))
    known = [field.name for field in dataclasses.fields(value) if field.init]
    parts = {}
    for name, new in changes.items():
        if name not in known:
            raise unknown("field of the configuration", where + name, [where + n for n in known])
        old = getattr(value, name)
        section = dataclasses.is_dataclass(old) and isinstance(new, Mapping)
        parts[name] = _with(old, new, f"{where}{name}.") if section else _like(old, new)
        if not section and not dataclasses.is_dataclass(parts[name]):
            fields.check_value(hints[name], parts[name], where + name)
    return dataclasses.replace(value, **parts)


def _like(old: Any, new: Any) -> Any:
    """A list where tuples are, and a number of NumPy's: Python's users write both."""
    new = new.item() if isinstance(new, np.generic) else new
    return tuple(new) if isinstance(old, tuple) and isinstance(new, list) else new


def _check_used(given: Sequence[Override], value: Any, root: Any, prefix: str = "") -> None:
    """UserError for an override of a mapping's entry that means nothing in this configuration."""
    for name, hint in fields.hints(type(value)).items():
        inner, keys = getattr(value, name), fields.keys_of(hint)
        if dataclasses.is_dataclass(inner):
            _check_used(given, inner, root, f"{prefix}{name}.")
        elif keys is not None:
            used = list(keys.used(root))
            useful = {f"{prefix}{name}.{key}" for key in used}
            for one in given:
                if one.name.startswith(f"{prefix}{name}.") and one.name not in useful:
                    raise UserError(
                        f"Override --{one.name} has no effect: here {prefix}{name} is for "
                        f"{', '.join(used)}."
                    )


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


def _quiet(shown: Any, given: Sequence[Override]) -> Any:
    """The configuration with these overrides; None where a value is of another type."""
    words = [word for name, values in given for word in (f"--{name}", *values)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return _cli(shown, words, "", "")
    except SystemExit:
        return None


def _fits(shown: Any, override: Override) -> bool:
    """Whether an override alone is of the right type, so that an error can name the wrong one."""
    try:
        return _quiet(shown, [override]) is not None
    except UserError:  # right by itself; the configuration needs others to go with it
        return True


def _narrowed(value: Any, root: Any) -> Any:
    """`value`, a part of `root`, as a class whose annotations are what the command line shows.

    A field that is declared as any model configuration becomes one of this very kind, so that
    the command line offers that kind's fields; a mapping becomes a section with its names; a number
    says its range.
    """
    parts, declared = {}, []
    for name, hint in fields.hints(type(value)).items():
        parts[name], keys = getattr(value, name), fields.keys_of(hint)
        if dataclasses.is_dataclass(parts[name]):
            parts[name] = _narrowed(parts[name], root)
            declared.append((name, type(parts[name])))
        elif keys is not None:
            parts[name] = _section(name, hint, keys, parts[name], root)
            declared.append((name, type(parts[name])))
        elif words := fields.range_words(hint) or fields.choice_words(hint, root):
            declared.append((name, _with_words(hint, words)))
    if not declared:
        return value
    return _made(type(value), declared, parts)


def _made(kind: type, declared: list[tuple[str, Any]], parts: dict[str, Any]) -> Any:
    """A dataclass derived from `kind` with these annotations, holding these parts."""
    about = {"__doc__": kind.__doc__}
    narrow = dataclasses.make_dataclass(
        kind.__name__, declared, bases=(kind,), frozen=True, kw_only=True, namespace=about
    )
    return narrow(**parts)


def _with_words(hint: Any, words: str, help: str | None = None) -> Any:
    """A type whose help says its default and, behind that, its range or choices."""
    rest = f"; {words}" if words else ""
    said = tyro.conf.arg(
        help=help, help_behavior_hint=lambda default: f"(default: {default}{rest})"
    )
    return Annotated[hint, said]


def _section(name: str, hint: Any, keys: fields.Keys, values: Mapping[str, Any], root: Any) -> Any:
    """A mapping as a dataclass with a field for each of its names."""
    one = get_args(get_args(hint)[0])[1]
    told = _with_words(one, fields.range_words(one), keys.help)
    declared = [(key, told, dataclasses.field(default=None)) for key in _names(keys, root)]
    kind = dataclasses.make_dataclass(
        name, declared, frozen=True, kw_only=True, namespace={"__doc__": keys.help}
    )
    return kind(**{key: value for key, value in values.items() if key in _names(keys, root)})


def _names(keys: fields.Keys, root: Any) -> list[str]:
    # Others than these cannot be options, and keep what the configuration gives them.
    known = keys.names(root)
    return [name for name in known if name.isidentifier() and not keyword.iskeyword(name)]


def _widened(value: Any, like: Any, root: Any) -> Any:
    """Inverse of `_narrowed`: the classes of `like`, a part of `root`, with `value`'s values."""
    parts = {}
    for name, hint in fields.hints(type(like)).items():
        part, old, keys = getattr(value, name), getattr(like, name), fields.keys_of(hint)
        if dataclasses.is_dataclass(old):
            part = _widened(part, old, root)
        elif keys is not None:
            given = {key: getattr(part, key) for key in _names(keys, root)}
            both = {**old, **given}
            part = {key: weight for key, weight in both.items() if weight is not None}
        parts[name] = part
    return type(like)(**parts)


def _options(value: Any, root: Any, prefix: str = "") -> dict[str, Any]:
    """Every override's name with its type: `{"train.steps": int}`; `value` is a part of `root`."""
    options: dict[str, Any] = {}
    for name, hint in fields.hints(type(value)).items():
        inner, keys = getattr(value, name), fields.keys_of(hint)
        if dataclasses.is_dataclass(inner):
            options |= _options(inner, root, f"{prefix}{name}.")
        elif keys is not None:
            one = get_args(get_args(hint)[0])[1]
            options |= {f"{prefix}{name}.{key}": one for key in _names(keys, root)}
        else:
            options[prefix + name] = hint
    return options


def _split(arguments: Sequence[str], options: dict[str, Any]) -> list[Override]:
    """The arguments as overrides; UserError for a name that is none."""
    given: list[Override] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            plain = name.replace("-", "_")
            if plain not in options:
                raise _unknown(plain, list(options))
            given.append(Override(plain, [value] if equals else []))
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


def _wrong_value(override: Override, hint: Any) -> UserError:
    name, values = override
    got = f"got {fields.shown(' '.join(values))}" if values else "got no value"
    parts = get_args(hint)
    if get_origin(hint) is Literal and len(values) == 1:
        return unknown(f"value of --{name}", values[0], [str(part) for part in parts])
    return UserError(f"Override --{name} {got}; expected {fields.words(hint)}.")
