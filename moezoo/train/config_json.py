"""Configurations as JSON text and back; the text beside a checkpoint rebuilds the model."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from moezoo import fields
from moezoo.errors import UserError, unknown
from moezoo.models import registry
from moezoo.train import sealed
from moezoo.train.schema import Config, ModelConfig

KIND = "kind"  # which registered model configuration stands here


def to_json(config: Config) -> str:
    """The whole configuration, every default written out; `from_json` reads it back equal."""
    values = dataclasses.asdict(config)
    kind = type(config.model).__name__
    values["model"] = {KIND: kind, **values["model"]}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote, or a run's config.json (which has a checksum).

    Raises UserError naming the field that is missing, unknown, of another type or out of range, and
    for a kind of model that is not registered.
    """
    try:
        values = sealed.unseal(text)
    except sealed.Damaged as error:
        raise UserError(f"The configuration is damaged: {error}.") from error
    config = _fields(Config, values, "")
    fields.check(config)
    return config


def check_kept(config: Config) -> None:
    """UserError for what a run's config.json would not bring back, so that it could not go on.

    Values that are no JSON, and sections of a class of one's own other than the model.
    """
    _check_values(config, "")
    _check_kinds(config, from_json(to_json(config)), "")


def _check_values(section: Any, where: str) -> None:
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{where}{field.name}"
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
            f"back as a {type(again).__name__}: only the model may be of a class of one's own."
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
        return {key: _decode(parts[1], v, f"{where}.{key}") for key, v in value.items()}
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
    kind = values[KIND]
    if not isinstance(kind, str) or kind not in registry.CONFIGS:
        raise unknown("kind of model", fields.short(str(kind)), list(registry.CONFIGS))
    config = registry.CONFIGS[kind]
    if hasattr(config, "check_stored"):
        config.check_stored(values)  # type: ignore[attr-defined]
    return _fields(config, {k: v for k, v in values.items() if k != KIND}, where)
