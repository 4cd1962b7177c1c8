"""The cards that are kept in a file: those of today, and shown without JAX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moezoo.front import card, catalogue, printed
from moezoo.train import zoo
from tests.fixtures import ROOT

AGAIN = "python -m moezoo.front.card"
NAMES = tuple(printed.sources())
# Building the shapes of these takes a second or longer each, of the others much less.
SLOW = {"nyud/m3vit_small", "nyud/taskexpert_b", "rooms/mlore_tiny", "sounds/soft_moa_esc50"}
SLOWEST = {"jft/", "nyud/", "pascal/", "sounds/soft_moa_", "rooms/conditional_moe_base"}


def marked(name: str) -> object:
    if name in SLOW:
        return pytest.param(name, marks=pytest.mark.slow)
    heavy = any(name.startswith(part) for part in SLOWEST) and name not in zoo.names()
    return pytest.param(name, marks=pytest.mark.claims) if heavy else name


def test_what_is_kept_is_of_todays_configurations() -> None:
    assert tuple(printed.cards()) == NAMES, AGAIN


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_no_model_is_as_kept(name: str) -> None:
    kept, config = printed.cards()[name], card.config_of(name)
    assert kept.tasks == config.tasks, AGAIN
    lines = card.paper(config)
    assert kept.lines[: len(lines)] == lines, AGAIN


@pytest.mark.parametrize("name", map(marked, NAMES))
def test_every_kept_line_is_computed_again(name: str) -> None:
    assert printed.cards()[name] == card.to_print(name), AGAIN


def test_a_changed_configuration_is_computed_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rooms").mkdir()
    own = (ROOT / "configs/rooms/vit_dense_tiny.py").read_text()
    (tmp_path / "rooms/vit_dense_tiny.py").write_text(own.replace('"depth"', '"edge"', 1))
    monkeypatch.setattr(zoo, "CONFIGS", tmp_path)
    for cached in (printed.cards, catalogue.entries, catalogue.configuration):
        cached.cache_clear()
    try:
        assert printed.cards() == {} and printed.card("rooms/vit_dense_tiny") is None
        entry = catalogue.entries()["rooms/vit_dense_tiny"]
        assert entry.reads == "images" and "edge" in entry.tasks
    finally:
        monkeypatch.undo()
        for cached in (printed.cards, catalogue.entries, catalogue.configuration):
            cached.cache_clear()


def test_a_card_is_the_same_whether_kept_or_computed() -> None:
    for name in ("rooms/vmoe_tiny", "rooms/vit_dense_small"):
        kept, computed = printed.card(name), card.of(name)
        assert kept is not None
        assert kept == computed._replace(tensors={})


def test_short_names_mean_the_weights_too() -> None:
    assert dict(card.of("vmoe_tiny").lines)["weights"].startswith("vmoe_tiny, step")


def test_files_of_ones_own_that_are_not_named_are_no_fault_of_a_card() -> None:
    lines = dict(card.of("text/smora_llama2_7b").lines)
    assert "data.train_file and data.test_file are needed" in lines["sizes"]


@pytest.mark.parametrize("words", [["list"], ["list", "--task", "depth"], ["info", "vmoe_tiny"]])
def test_looking_around_needs_no_jax(words: list[str]) -> None:
    code = (
        "import sys; from moezoo.cli import entry\n"
        "try: entry.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules), 'slow'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rooms/vmoe_tiny" in done.stdout or "rooms/m3vit_tiny" in done.stdout
