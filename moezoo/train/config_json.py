"""Configurations as JSON text and back; the text beside a checkpoint rebuilds the model."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from moezoo import fields, registry
from moezoo.errors import UserError, unknown
from moezoo.models.shared.config import traits
from moezoo.train import sealed
from moezoo.train.schema import Config, DataSection, ModelConfig

PROTOCOL = "protocol"
KIND = "kind"  # which registered class stands here: a model's configuration, a data section


def to_json(config: Config) -> str:
    """The whole configuration, every default written out; `from_json` reads it back equal."""
    values = dataclasses.asdict(config)
    for name in ("model", "data"):
        values[name] = {KIND: type(getattr(config, name)).__name__, **values[name]}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote, or a run's config.json (which has a checksum).

    Raises UserError naming the field that is missing, unknown, of another type or out of range, and
    for a kind of model that is not registered.
    """
    try:
        values = sealed.unseal(text)
    except sealed.DamagedSeal as error:
        raise UserError(f"The configuration is damaged: {error}.") from error
    protocol = values.pop(PROTOCOL, None) if isinstance(values, dict) else None
    config = _fields(Config, values, "")
    if protocol is not None:
        config = dataclasses.replace(config, protocol=_protocol(config, protocol))
    fields.check(config, root=config)
    return config


def _protocol(config: Config, values: Any) -> Any:
    """The section, whose class is that of the data's domain."""
    kind = type(config.data.domain.protocol())
    if not dataclasses.fields(kind) and isinstance(values, Mapping):
        return kind()  # what older versions kept here for every run, whether it meant anything
    return _fields(kind, values, PROTOCOL)


def check_kept(config: Config) -> None:
    """UserError for what a run's config.json would not bring back, so that it could not go on.

    Values that are no JSON, and sections of a class of one's own other than the model.
    """
    _check_values(config, "")
    _check_kinds(config, from_json(to_json(config)), "")


def _check_values(section: Any, where: str) -> None:
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{where}{field.name}"
        if name in (f"model.{KIND}", f"data.{KIND}"):
            raise UserError(
                f"{name} cannot be a field: a run's config.json keeps the name of the class there; "
                "rename the field."
            )
        if not field.init:
            raise UserError(
                f"{name} is a field that the class sets itself, which a run's config.json cannot "
                "bring back: make it a property, or give it a default without init=False."
            )
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{name}.")
            continue
        try:
            json.dumps(value, allow_nan=False, default=_section)
        except (TypeError, ValueError, RecursionError):
            raise UserError(
                f"{name} is {fields.shown(value)}, which a run's config.json cannot hold: take "
                "numbers, text, True or False, None, and tuples or mappings of them."
            ) from None


def _section(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError


def _check_kinds(config: Any, again: Any, where: str) -> None:
    if type(config) is not type(again):
        raise UserError(
            f"{where or 'config'} is a {type(config).__name__}, which a run's config.json brings "
            f"back as a {type(again).__name__}: only the model and the data section may be of a "
            "class of one's own."
        )
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            name = f"{where}.{field.name}" if where else field.name
            _check_kinds(value, getattr(again, field.name), name)


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value` of JSON in the form that `hint` wants: sections, tuples; `where` is its dotted name.

    What has no such form stays what it is, for `fields.check` to refuse.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _decode(parts[0], value, where)
    if hint is ModelConfig:
        return _model(value, where)
    if hint is DataSection:
        return _data(value, where)
    if dataclasses.is_dataclass(hint):
        return _fields(typing.cast(type, hint), value, where)
    if origin in (Union, types.UnionType):
        return _of_union(parts, value, where)
    if origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(_decode(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(pairs))
    if origin is dict and isinstance(value, dict):
        # None is as good as no entry; older versions stored one for every task of every domain.
        given = {key: v for key, v in value.items() if v is not None}
        return {key: _decode(parts[1], v, f"{where}.{key}") for key, v in given.items()}
    if hint is float and type(value) is int and abs(value) <= fields.LARGEST:
        return float(value)
    return value


def _of_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if sections and isinstance(value, Mapping):
        # One section of several kinds: that whose fields these are, so that errors are about it.
        return _decode(max(sections, key=lambda kind: len(_names(kind) & set(value))), value, where)
    others = [kind for kind in kinds if kind is not type(None) and kind not in sections]
    for kind in others:
        made = _decode(kind, value, where)
        if made is not value:
            return made
    return value


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _fields(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where or 'The configuration'} is {fields.shown(values)}; expected named fields."
        )
    hints = fields.hints(kind)
    known = [field for field in dataclasses.fields(kind) if field.init]
    names = [field.name for field in known]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in names:
            full = [prefix + known_name for known_name in names]
            raise unknown("field of the configuration", prefix + fields.short(name), full)
    # A field that a later version added means, by its default, what went without saying before.
    missing = [field.name for field in known if field.name not in values and _needed(field)]
    if missing:
        lacks = ", ".join(prefix + name for name in missing)
        raise UserError(f"The configuration lacks {lacks}; it was written by another version.")
    return kind(**{name: _decode(hints[name], values[name], prefix + name) for name in values})


def _needed(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _model(values: Any, where: str) -> Any:
    if not isinstance(values, Mapping) or KIND not in values:
        raise UserError(f"{where} of the configuration lacks '{KIND}', the kind of model.")
    name = values[KIND]
    if not isinstance(name, str) or name not in registry.SYSTEMS.names:
        raise unknown("kind of model", fields.short(str(name)), list(registry.SYSTEMS.names))
    kind = registry.SYSTEMS.by_name(name)
    # The defaults of a class of somebody's own that answers nothing itself.
    traits(kind).check_stored(values)
    renamed = traits(kind).renamed
    return _fields(kind, {renamed.get(k, k): v for k, v in values.items() if k != KIND}, where)


def _data(values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {fields.shown(values)}; expected named fields.")
    kind = data_kind(values)
    if kind is None:
        known = list(registry.DOMAINS.names)
        raise unknown("kind of data section", fields.short(str(values[KIND])), known)
    return _fields(kind, {k: v for k, v in values.items() if k != KIND}, where)


def data_kind(values: Mapping[str, Any]) -> Any:
    """The class of a stored data section; None where nobody here knows it."""
    if KIND in values:
        name = values[KIND]
        known = isinstance(name, str) and name in registry.DOMAINS.names
        return registry.DOMAINS.by_name(name) if known else None
    # Older versions told the kind by the fields alone: it is that whose fields these are.
    return max(registry.DOMAINS.all(), key=lambda kind: len(_names(kind) & set(values)))
