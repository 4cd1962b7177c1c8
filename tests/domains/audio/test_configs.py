"""The configurations of runs on sounds: they are sound themselves and fit their data sets."""

from __future__ import annotations

from typing import Any

import pytest

from moezoo.domains.audio.domain import names_of
from moezoo.errors import UserError
from moezoo.train import config as configs

NAMES = ("ast_tiny", "soft_moa_tiny", "soft_moa_esc50", "soft_moa_urbansound8k")
NAMES += ("soft_moa_speech_commands", "soft_moa_fluent")


@pytest.mark.parametrize("name", NAMES)
def test_configurations_validate_and_have_a_form(name: str) -> None:
    config = configs.load(f"sounds/{name}")
    configs.validate(config, 1)
    assert config.name == name
    batch, classes = config.data.domain.example(config)
    model: Any = config.model
    assert batch["audio"].shape == (1, *config.data.domain.size(config))
    assert config.data.mel == model.ast.mel and set(config.tasks) <= set(batch)
    assert classes.counts[config.tasks[0]] >= 10
    assert configs.from_json(configs.to_json(config)) == config


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.mel", "64"], "64 mel bands, but model.ast.mel is 32"),
        (["--data.frames", "10"], "smaller than a patch"),
    ],
)
def test_clips_that_the_model_cannot_read_are_told_before_they_are_made(words, says) -> None:
    with pytest.raises(UserError, match=says):
        configs.validate(configs.load("sounds/soft_moa_tiny", words), 1)


def test_the_small_base_hears_other_events_than_what_is_built_on_it() -> None:
    base, adapted = (configs.load(f"sounds/{name}") for name in ("ast_tiny", "soft_moa_tiny"))
    assert adapted.start_from == "sounds/ast_tiny"
    heard = [set(names_of(c.data)["event"]) for c in (base, adapted)]  # type: ignore[arg-type]
    assert not heard[0] & heard[1] and all(len(events) >= 12 for events in heard)
    trunks: list[Any] = [base.model, adapted.model]
    same = [{k: v for k, v in vars(m.ast).items() if k != "init_std"} for m in trunks]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("name", "steps", "tokens"),
    [
        ("esc50", 1875, 590),
        ("urbansound8k", 6548, 470),
        ("speech_commands", 49_712, 110),
        ("fluent", 54_215, 470),
    ],
)
def test_published_recipes(name: str, steps: int, tokens: int) -> None:
    config = configs.load(f"sounds/soft_moa_{name}")
    model: Any = config.model
    assert config.train.steps == steps
    assert model.ast.tokens(config.data.frames) == tokens  # type: ignore[union-attr]
    optimiser = config.optimiser
    assert (optimiser.lr, optimiser.b1, optimiser.b2) == (5e-3, 0.9, 0.98)
    assert (optimiser.weight_decay, optimiser.decay, optimiser.warmup) == (0.1, "all", 0)
    assert (model.experts, model.slots, model.bottleneck) == (7, 1, 6)
