"""The comparison of systems of adapters: trains what is missing, counts, and says what it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moezoo.bench import multitask
from moezoo.bench.multitask import (
    CLAIMS,
    OWN,
    SYSTEMS,
    MultitaskArguments,
    MultitaskSystem,
    library_of,
    run,
)
from moezoo.configs.text.smora_tiny import NEW
from moezoo.domains.text.data.example import plain
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.domains.text.library import BaseDecoder
from moezoo.errors import UserError
from moezoo.front.catalogue import configuration
from moezoo.train import config_file
from moezoo.train.console import Console
from moezoo.train.loop import train
from moezoo.weights.library import BaseModel, Library, create
from moezoo.weights.library_bank import attach_merged
from tests.weights.libraries import decoder, member, sha

TINY = """
from dataclasses import replace
from moezoo.backbones.decoder import DecoderConfig
from moezoo.configs.text.{module} import config as first

decoder = DecoderConfig(vocabulary=259, width=8, depth=1, heads=2, groups=1, hidden=8, length=64)
config = replace(
    first,
    name="{name}",
    model=replace(first.model, decoder=decoder),
    data=replace(first.data, train=40, test=18),
    train=replace(first.train, steps=1, batch=8),
    optimiser=replace(first.optimiser, warmup=0),
    checkpoint=replace(first.checkpoint, every=1),
)
"""


def tiny(folder: Path, name: str, module: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(TINY.format(module=module, name=name))
    return str(path)


@pytest.mark.slow
def test_systems_are_trained_once_scored_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = config_file.load(tiny(tmp_path, "base", "skills_tiny"), ["--directory", str(tmp_path)])
    train(base)
    lora = tiny(tmp_path, "lora", "library_member")
    poly = tiny(tmp_path, "poly", "polytropon_tiny")
    monkeypatch.setitem(SYSTEMS, "lora", MultitaskSystem((lora, f"{lora} optimiser.lr=0.001")))
    monkeypatch.setitem(SYSTEMS, "polytropon", MultitaskSystem((f"{poly} model.rank=2",)))
    even = MultitaskSystem((f"{poly} model.rank=2 model.trained=skills",))
    monkeypatch.setitem(SYSTEMS, "mhr_mu", even)
    out = tmp_path / "family"
    words = ["--out", str(out), "--base", str(tmp_path / "base"), "--test", "18"]
    words += ["--systems", "lora", "polytropon", "mhr_mu"]
    assert run([*words, "--repeats", "1"]) == 0
    told = json.loads((out / "multitask.json").read_text())
    rows = {row["system"]: row for row in told["rows"]}
    one, other = rows["lora"], rows["polytropon"]
    # q, k, v, o, gate, up, down at width 8, of 8 ranks: (8 + 8) * 8 twice, (8 + 4) * 8 twice, ...
    updates = 8 * (2 * 16 + 2 * 12 + 3 * 16)
    assert one["trained"] == one["held"] == one["active"] == updates
    assert other["trained"] == 8 * 2 * (updates // 8) + 7 * 9 * 8
    assert other["active"] == other["trained"] - 7 * 8 * 8  # one row of each table
    assert rows["mhr_mu"]["active"] == rows["mhr_mu"]["trained"]  # even shares have none
    assert set(one["tasks"]) == set(NEW) and 0 <= one["exact_match"] <= 1
    assert other["step"]["ratio"] > 0 and other["tokens"]["ratio"] > 0
    assert one["tokens"]["milliseconds"] > 0 and one["step"]["ratio"] == 1
    assert [c["claim"] for c in told["claims"]] == [CLAIMS[3].text]
    assert "| polytropon |" in (out / "multitask.md").read_text()
    assert (out / "lora_stage1_0" / "config.json").exists()

    def no_training(*given: object) -> None:
        raise AssertionError("it was trained before")

    monkeypatch.setattr(multitask, "train", no_training)
    assert run([*words, "--repeats", "0"]) == 0
    assert run([*words, "--repeats", "0", "--seeds", "0", "1", "--trained"]) == 0
    with pytest.raises(UserError, match="holds a run with data.test = 18, not 20"):
        run([*words, "--repeats", "0", "--test", "20"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--systems loar", "Unknown system of adapters 'loar'.*lora"),
        ("--seeds 1 1", "each once"),
        ("--test 8", "test is 8: at least 9"),
        ("--steps 0", "steps is 0"),
        ("--library nowhere", "nowhere"),
    ],
)
def test_bad_words_are_refused_before_training(words: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        run(["--out", str(tmp_path / "out"), *words.split()])
    assert not (tmp_path / "out").exists()


def library(folder: Path, names: tuple[str, ...], rank: int = 8, scale: float = 1.0) -> Library:
    members = [
        member(name, i, rank, scale, tasks=(task,))
        for i, (name, task) in enumerate(zip(names, [*NEW, "more"], strict=False))
    ]
    return create(folder, BaseModel("tiny", sha(decoder())), members)


def test_a_library_that_does_not_fit_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = configuration("text/meteora_tiny").model
    scale = wanted.alpha / wanted.rank  # type: ignore[attr-defined]
    made = {
        "many": library(tmp_path / "many", tuple(f"m{i}" for i in range(10)), 8, scale),
        "rank": library(tmp_path / "rank", NEW, 2, scale),
        "scale": library(tmp_path / "scale", NEW, 8, 3 * scale),
        "fits": library(tmp_path / "fits", NEW, 8, scale),
    }
    monkeypatch.setattr(multitask, "trained_system", None)
    words = ["--out", str(tmp_path / "out"), "--base", str(tmp_path / "base"), "--library"]
    for name, says in (
        ("many", "model.loras is 9"), ("rank", "model.rank is 8"), ("scale", "has scale"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            run([*words, str(made[name].folder)])
    fits = str(made["fits"].folder)
    with pytest.raises(UserError, match="none of lora, smora stands on one"):
        run([*words, fits, "--systems", "lora", "smora"])
    other = decoder(1)
    base = BaseDecoder("other", other, ByteTokenizer(), plain, sha(other))
    monkeypatch.setattr(multitask, "open_base", lambda path: base)
    with pytest.raises(UserError, match="whose arrays are others"):
        run([*words, fits])
    assert not any((tmp_path / "out").iterdir())


def test_a_library_that_is_there_is_that_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = MultitaskArguments(tmp_path)
    names = tuple(f"members_{task}_0" for task in NEW)
    held = library(tmp_path / "library_0", names)
    bases = {
        str(seed): BaseDecoder("b", made, ByteTokenizer(), plain, sha(made))
        for seed, made in ((0, decoder()), (1, decoder(1)))
    }
    monkeypatch.setattr(multitask, "open_base", lambda path: bases[path.name])

    def found(first: str = "0", seed: int = 0) -> Path | None:
        return library_of(a, seed, Console(), first)

    assert found() == held.folder  # its runs are gone, which says nothing
    with pytest.raises(UserError, match="whose arrays are others"):
        found("1")
    library(tmp_path / "library_1", names)
    with pytest.raises(UserError, match="library_1 has other members than members_compare_1"):
        found(seed=1)
    monkeypatch.setattr(multitask, "check_same_run", lambda *given: {})
    monkeypatch.setattr(multitask, "trained", lambda run: True)
    monkeypatch.setattr(multitask, "finished", lambda run, steps: steps == 600)

    def model(path: Path) -> tuple[Any, None]:
        made = decoder()
        attach_merged(made, held, {path.name: scales.get(path.name, 1.0)})
        return made, None

    monkeypatch.setattr(multitask, "language_model", model)
    scales: dict[str, float] = {}
    assert found() == held.folder
    scales[names[-1]] = 2.0
    with pytest.raises(UserError, match="members_swap_halves_0 before it was trained on"):
        found()
    a = MultitaskArguments(tmp_path, steps=700)
    with pytest.raises(UserError, match="is not finished after 700 steps"):
        found()


def test_claims_name_systems_that_are_there() -> None:
    assert {name for c in CLAIMS for name in (c.one, c.other)} <= {*SYSTEMS, OWN}
