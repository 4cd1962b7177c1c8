"""Types and ranges in declarations, and the one checker that reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from moezoo import fields
from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.domains.images.domain import DataConfig
from moezoo.domains.pairs.domain import PairsDataConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.errors import UserError
from moezoo.registry import SYSTEMS
from moezoo.train.config import Config


@dataclass(frozen=True)
class Inner:
    rate: fields.Positive = 0.5
    clip: fields.Positive | None = None
    share: fields.Share = 0.0


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    steps: fields.Count = 10
    plain: float = 0.0
    on: bool = True
    kind: Literal["poly", "cosine"] = "poly"
    channels: Literal[1, 2] = 1
    sizes: tuple[fields.AxisSize, ...] = (1,)
    pair: tuple[int, int] = (1, 2)
    weights: Annotated[
        dict[str, fields.NotNegative | None],
        fields.Keys(lambda root: ("depth", "edge"), lambda root: ("depth",), ""),
    ] = field(default_factory=dict)
    folder: fields.FilePath | None = None
    own: list[int] = field(default_factory=list)


def changed(**changes: Any) -> Outer:
    return dataclasses.replace(Outer(), **changes)


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        changed(inner=Inner(1, 3, 0.999)),
        changed(steps=2**31 - 1, plain=-1e30, on=False, channels=2, sizes=(), folder="a/b"),
        changed(weights={"depth": 1, "edge": None}, own=[1, 2]),
    ],
)
def test_what_fits_is_accepted(config: Outer) -> None:
    fields.check(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inner": None}, "inner is None; expected a Inner"),
        ({"inner": Inner}, "inner is .*; expected a Inner"),
        ({"inner": 3}, "inner is 3"),
        ({"inner": Inner(rate=0)}, "inner.rate is 0; it must be above 0"),
        ({"inner": Inner(rate=1e-60)}, "inner.rate is 1e-60; it must be above 0"),
        ({"inner": Inner(rate=float("nan"))}, "inner.rate is nan; it must be a finite number"),
        ({"inner": Inner(rate=1e300)}, "inner.rate is 1e.300; it must be a finite number"),
        ({"inner": Inner(rate=10**5000)}, "inner.rate is a int that cannot be written; .* finite"),
        ({"inner": Inner(rate="0.1")}, "inner.rate is '0.1'; expected a number"),  # pyright: ignore
        ({"inner": Inner(rate=True)}, "inner.rate is True; expected a number"),
        ({"inner": Inner(clip=-1.0)}, "inner.clip is -1.0; it must be above 0"),
        ({"inner": Inner(clip="x")}, "inner.clip is 'x'; expected a number or None"),  # pyright: ignore
        ({"inner": Inner(share=0.99999999999)}, "inner.share is 0.99999999999; .* below 1"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2**31}, "steps is 2147483648; it must be at most 2,147,483,647"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"steps": 3.0}, "steps is 3.0; expected a whole number"),
        ({"steps": "200"}, "steps is '200'; expected a whole number"),
        ({"steps": "\n" * 3 + "x" * 1000}, "steps is '.*xxx\\.\\.\\.; expected"),
        ({"plain": float("-inf")}, "plain is -inf; it must be a finite number"),
        ({"on": 1}, "on is 1; expected True or False"),
        ({"kind": "polly"}, "Unknown kind 'polly': did you mean poly"),
        ({"kind": 3}, "kind is 3; expected one of poly, cosine"),
        ({"channels": True}, "channels is True; expected one of 1, 2"),
        ({"channels": 1.0}, "channels is 1.0"),
        ({"sizes": [1]}, r"sizes is \[1\]; expected whole numbers"),
        ({"sizes": (1, 0)}, r"sizes\[1\] is 0; it must be at least 1"),
        ({"pair": (1, 2, 3)}, r"pair is \(1, 2, 3\); expected 2 whole numbers"),
        ({"pair": 12}, "pair is 12"),
        ({"weights": {"dept": 1.0}}, "Unknown name in weights 'dept': did you mean depth"),
        ({"weights": {"depth": -1.0}}, "weights.depth is -1.0; it must be at least 0"),
        ({"weights": {3: 1.0}}, "A name in weights is 3; expected text"),
        ({"weights": [1.0]}, "weights is"),
        ({"folder": "a\0b"}, "folder is .*zero byte"),
        ({"folder": "\ud800"}, "folder is .*Unicode"),
        ({"folder": "x" * 201}, "folder is .*too long for a path"),
        ({"folder": "x/" * 2100}, "folder is .*too long for a path"),
        ({"own": ["a"]}, "own is"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        made = changed(**changes)
        fields.check(made, root=made)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_annotations_that_cannot_be_read_are_a_sentence() -> None:
    kind = dataclasses.make_dataclass("Odd", [("x", "NoSuchType", 1)])
    with pytest.raises(UserError, match="fields of Odd cannot be read: NameError"):
        fields.check(kind())


def sections() -> list[Any]:
    """Every dataclass of every configuration."""
    models = [kind() for kind in SYSTEMS.all()]
    config = Config("run", models[0], ("depth",))
    data = [DataConfig(), TextDataConfig(), AudioDataConfig(), PairsDataConfig()]
    found, waiting = {}, [config, *models, *data]
    while waiting:
        section = waiting.pop()
        found[type(section)] = section
        waiting += [
            value
            for one in dataclasses.fields(section)
            if dataclasses.is_dataclass(value := getattr(section, one.name))
        ]
    return list(found.values())


def _numbers(hint: Any, limited: bool = False) -> list[bool]:
    """For each whole number in a type whether it has a range."""
    if get_origin(hint) is Annotated:
        first, *rest = get_args(hint)
        return _numbers(first, limited or any(isinstance(one, fields.Range) for one in rest))
    if get_origin(hint) is Literal:
        return []
    if hint is int:
        return [limited]
    return [one for part in get_args(hint) for one in _numbers(part, limited)]


@pytest.mark.parametrize("section", sections(), ids=lambda section: type(section).__name__)
def test_every_default_fits_and_every_whole_number_has_a_range(section: Any) -> None:
    fields.check(section)
    without = [n for n, hint in fields.hints(type(section)).items() if not all(_numbers(hint))]
    assert not without
