"""Configurations that disagree with themselves, and models by name."""

from __future__ import annotations

import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module
from moezoo.registry import SYSTEMS
from tests.fixtures import ROOT
from tests.models.tiny import SIZE, TASKS, config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_k": 5}, "top_k is 5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"experts": 0, "top_k": 0}, "experts is 0"),
        ({"heads": 3}, "heads is 3"),
        ({"heads": 0}, "heads is 0"),
        ({"width": 0}, "width is 0"),
        ({"patch": 6}, "patch is 6"),
        ({"patch": 1}, "patch is 1"),
        ({"mlp_ratio": 0.01}, "mlp_ratio"),
        ({"expert_ratio": 0.1}, "expert_ratio"),
        ({"moe_every": 5}, "moe_every is 5"),
        ({"moe_every": 0}, "moe_every is 0"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"head_channels": 0}, "head_channels"),
        ({"tam": (1,)}, "tam is"),
        ({"tam": (0, 0)}, "tam is"),
        ({"patch": 2, "tam": (0,)}, "tam is"),
        ({"task_embedding": 0}, "task_embedding"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"routing": "multigate"}, "multi_gate"),
        ({"selection": "softmax_top_k"}, "softmax_then_top_k"),
        ({"dispatch": "block"}, "blocks"),
        ({"dispatch": "al_to_all"}, "all_to_all"),
        ({"reference_quirks": ("expert_inits",)}, "expert_init"),
    ],
)
def test_disagreeing_sizes_are_refused_in_one_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "tasks", "size", "says"),
    [
        ({}, TASKS, (10, 16), "10x16"),
        ({}, {}, SIZE, "at least one task"),
        ({}, {"depth": 0}, SIZE, "Task depth has 0"),
        ({"tam": (0,)}, TASKS, (12, 16), "even number of patches"),
    ],
)
def test_sizes_that_do_not_fit_images_or_tasks_are_refused(changes, tasks, size, says):
    with pytest.raises(UserError, match=says):
        config(**changes).build(tasks, size, nnx.Rngs(0))


def test_unknown_and_missing_tasks_are_refused():
    model = module.merge(*module.create(lambda: ViTDenseConfig(
        width=8, depth=1, heads=1, patch=4, head_channels=2).build(
            {"depth": 1}, SIZE, nnx.Rngs(0))))  # fmt: skip
    with pytest.raises(UserError, match="did you mean depth"):
        model.wanted(("dept",))
    with pytest.raises(UserError, match="No task"):
        model.wanted(())


def test_models_by_name():
    assert SYSTEMS.by_name("M3ViTConfig") is M3ViTConfig
    assert [kind.__name__ for kind in map(SYSTEMS.by_name, SYSTEMS.places)] == list(SYSTEMS.places)
    with pytest.raises(UserError, match="M3ViTConfig"):
        SYSTEMS.by_name("M3VitConfig")


def test_variants():
    assert (M3ViTConfig.tiny().width, M3ViTConfig.tiny().heads) == (192, 3)
    assert (M3ViTConfig.small().width, M3ViTConfig.small().heads) == (384, 12)
    assert (ViTDenseConfig.small().heads, ViTDenseConfig.base(depth=2).depth) == (6, 2)


@pytest.mark.parametrize("name", SYSTEMS.names)
def test_every_system_has_a_card_that_names_what_there_is(name):
    """The table of systems shows cards: configurations that exist, fixtures that a test reads."""
    kind = SYSTEMS.by_name(name)
    assert "card" in vars(kind), "a card of its own, not the one of a class that it builds on"
    card = vars(kind)["card"]
    assert card.title and card.kind and card.headline != "not measured"
    for trained in card.trained:
        assert f"model={name}" in (ROOT / "configs" / f"{trained}.py").read_text()
    read = "".join(path.read_text() for path in (ROOT / "tests" / "parity").glob("*.py"))
    for folder in card.fixtures:
        assert f'"{folder}"' in read
    assert bool(card.fixtures) != card.parity.startswith("none")
