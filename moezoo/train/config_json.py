"""Configurations as JSON text and back; the text beside a checkpoint rebuilds the model."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from moezoo.errors import UserError, unknown
from moezoo.models import registry
from moezoo.train.schema import Config, ModelConfig

KIND = "kind"  # which registered model configuration stands here


def to_json(config: Config) -> str:
    """The whole configuration, every default written out; `from_json` reads it back equal."""
    values = dataclasses.asdict(config)
    kind = type(config.model).__name__
    values["model"] = {KIND: kind, **values["model"]}
    return json.dumps(values, indent=2) + "\n"


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote.

    Raises UserError naming the field that is missing, unknown or of another type, and for a
    kind of model that is not registered.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"The configuration is not JSON: {error}.") from error
    return _decode(Config, values, "")


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value` of JSON as the type `hint`; `where` is its dotted name."""
    if hint is ModelConfig:
        return _model(value, where)
    if dataclasses.is_dataclass(hint):
        return _fields(typing.cast(type, hint), value, where)
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fitting(parts, value, where)
    if origin is typing.Literal and value in parts:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(_decode(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(pairs))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(parts[1], v, f"{where}.{key}") for key, v in value.items()}
    if hint in (None, type(None)) and value is None:
        return None
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise UserError(f"Field {where} of the configuration is {value!r}; expected {name}.")


def _first_fitting(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if len(sections) > 1 and isinstance(value, Mapping):
        # One section of several kinds: that whose fields these are, so that errors are about it.
        return _decode(max(sections, key=lambda kind: len(_names(kind) & set(value))), value, where)
    errors = []
    for kind in kinds:
        try:
            return _decode(kind, value, where)
        except UserError as error:
            errors.append(error)
    # The error of a nested field says more than that of None.
    raise max(errors, key=lambda error: len(str(error)))


def _names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _fields(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"Field {where or 'configuration'} is {values!r}; expected named fields.")
    hints = get_type_hints(kind)
    known = [field for field in dataclasses.fields(kind) if field.init]
    fields = [field.name for field in known]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise unknown("field of the configuration", prefix + name, [prefix + f for f in fields])
    # A field that a later version added means, by its default, what went without saying before.
    missing = [field.name for field in known if field.name not in values and _needed(field)]
    if missing:
        names = ", ".join(prefix + name for name in missing)
        raise UserError(f"The configuration lacks {names}; it was written by another version.")
    return kind(**{name: _decode(hints[name], values[name], prefix + name) for name in values})


def _needed(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _model(values: Any, where: str) -> Any:
    if not isinstance(values, Mapping) or KIND not in values:
        raise UserError(f"Field {where} of the configuration lacks '{KIND}', the kind of model.")
    kind = values[KIND]
    if kind not in registry.CONFIGS:
        raise unknown("kind of model", str(kind), list(registry.CONFIGS))
    return _fields(registry.CONFIGS[kind], {k: v for k, v in values.items() if k != KIND}, where)
