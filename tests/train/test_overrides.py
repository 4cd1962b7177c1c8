"""Typed overrides: what they set, and the one sentence a wrong one ends in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from moezoo.errors import UserError
from moezoo.train.config import TrainConfig
from moezoo.train.overrides import parse
from tests.train import tiny


@dataclass(frozen=True)
class Model:
    """A model of experts."""

    experts: int = 16
    """Experts of one layer."""
    widths: tuple[int, ...] = (4, 8)
    top_k: int = 4

    def __post_init__(self):
        if self.top_k > self.experts:
            raise UserError(f"top_k {self.top_k} of {self.experts} experts.")


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    clip: float | None = None
    shuffle: bool = True
    kind: Literal["poly", "cosine"] = "poly"
    image_size: tuple[int, int] = (8, 8)
    name: str | None = "x"


@dataclass(frozen=True)
class Run:
    model: Any
    inner: Inner = field(default_factory=Inner)
    steps: int = 10
    tasks: tuple[str, ...] = ("semseg",)


RUN = Run(Model())


def changed(words: str) -> Run:
    return parse(RUN, words.split())


def test_without_overrides_nothing_changes():
    assert parse(RUN, []) == RUN
    assert type(parse(RUN, []).model) is Model


@pytest.mark.parametrize(
    "words, get, value",
    [
        ("--steps 3", lambda r: r.steps, 3),
        ("--steps=-3", lambda r: r.steps, -3),
        ("--steps -1", lambda r: r.steps, -1),
        ("--model.experts 8", lambda r: r.model, Model(experts=8)),
        ("--model.widths 1 2 3", lambda r: r.model.widths, (1, 2, 3)),
        ("--inner.rate 1e-3", lambda r: r.inner.rate, 1e-3),
        ("--inner.clip 10", lambda r: r.inner.clip, 10.0),
        ("--inner.clip 10 --inner.clip None", lambda r: r.inner.clip, None),
        ("--inner.shuffle False", lambda r: r.inner.shuffle, False),
        ("--inner.kind cosine", lambda r: r.inner.kind, "cosine"),
        ("--inner.image_size 4 6", lambda r: r.inner.image_size, (4, 6)),
        ("--inner.image-size 4 6", lambda r: r.inner.image_size, (4, 6)),
        ("--inner.name None", lambda r: r.inner.name, None),
        ("--tasks semseg depth", lambda r: r.tasks, ("semseg", "depth")),
    ],
)
def test_override_sets_a_typed_value(words, get, value):
    result = get(changed(words))
    assert result == value and type(result) is type(value)


def test_overrides_combine():
    run = changed("--steps 5 --model.experts 8 --inner.rate 2")
    assert run == Run(Model(experts=8), Inner(rate=2.0), steps=5)


def test_values_are_judged_together():
    assert changed("--model.experts 2 --model.top_k 2").model == Model(experts=2, top_k=2)
    with pytest.raises(UserError, match="top_k 4 of 2 experts"):
        changed("--model.experts 2")
    with pytest.raises(UserError, match="--model.top_k got 'x'"):
        changed("--model.experts 2 --model.top_k x")


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--step 3", ["--step", "--steps"]),
        ("--experts 3", ["--experts", "--model.experts"]),
        ("--model.expert 3", ["--model.experts"]),
        ("--steps many", ["--steps", "'many'", "a whole number"]),
        ("--steps 1.5", ["--steps", "'1.5'", "a whole number"]),
        ("--steps", ["--steps", "no value"]),
        ("--steps 3 4", ["--steps", "'3 4'"]),
        ("--inner.rate fast", ["--inner.rate", "a number"]),
        ("--inner.clip fast", ["--inner.clip", "a number or None"]),
        ("--inner.shuffle maybe", ["--inner.shuffle", "True or False"]),
        ("--inner.kind polly", ["--inner.kind", "did you mean poly"]),
        ("--inner.image_size 4", ["--inner.image_size", "2 whole numbers"]),
        ("--model.widths 1 x", ["--model.widths", "whole numbers"]),
        ("3", ["'3'", "--help"]),
        ("-s 3", ["'-s'", "--help"]),
    ],
)
def test_wrong_override_is_one_sentence(words, parts, capsys):
    with pytest.raises(UserError) as caught:
        changed(words)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_help_lists_overrides_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(RUN, ["--help"], prog="train.py tiny", description="A tiny run.")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("train.py tiny", "A tiny run.", "--model.experts INT", "Experts of one layer."):
        assert part in text
    assert "--inner.kind {poly,cosine}" in text and "(default: 16)" in text


def test_an_entry_for_what_is_not_there_is_refused_where_it_is_typed() -> None:
    config = tiny.config("unused", train=TrainConfig(weights={"edge": 3.0}))
    assert config.tasks == ("semseg", "depth")
    assert parse(config, ["--train.weights.depth", "2"]).train.weights == {
        "edge": 3.0,
        "depth": 2.0,
    }
    words = ["--train.weights.edge", "4"]
    with pytest.raises(UserError, match="weights.edge has no effect: .* is for semseg, depth"):
        parse(config, words)
    assert parse(config, [*words, "--tasks", "edge"]).train.weights == {"edge": 4.0}
