"""Which configuration a run's folder belongs to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moezoo.errors import UserError
from moezoo.train import run_folder
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    OptimConfig,
    TrainConfig,
    from_json,
    to_json,
)
from moezoo.train.resume import check_same_run, continued, split
from tests.train import tiny


def test_a_run_that_failed_before_training_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    first = tiny.config(str(tmp_path), start_from="runs/mistyped")
    second = replace(first, start_from=None)
    check_same_run(first, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    never = replace(second, checkpoint=CheckpointConfig(resume="never"))
    for config in (never, second):
        check_same_run(config, tmp_path)
        assert from_json((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/2"])
def test_a_run_that_has_trained_keeps_its_folder(tmp_path: Path, left: str) -> None:
    first = tiny.config(str(tmp_path))
    check_same_run(first, tmp_path)
    (tmp_path / left).mkdir(parents=True)
    check_same_run(first, tmp_path)
    with pytest.raises(UserError, match="holds a run with seed = 0, not 5"):
        check_same_run(replace(first, seed=5), tmp_path)
    assert from_json((tmp_path / "config.json").read_text()) == first


def test_fields_that_the_folder_does_not_know_have_their_defaults(tmp_path: Path) -> None:
    config = tiny.config(str(tmp_path))
    old = to_json(config).replace('"start_from": null,', "")
    assert old != to_json(config)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text(old)
    check_same_run(config, tmp_path)
    with pytest.raises(UserError, match="start_from = None, not elsewhere"):
        check_same_run(replace(config, start_from="elsewhere"), tmp_path)


def begun(directory: Path, **changes: Any) -> Config:
    """The folder of a run `tiny` that has trained, and its configuration."""
    config = tiny.config(str(directory), **changes)
    check_same_run(config, directory / "tiny")
    (directory / "tiny" / "metrics.jsonl").write_text("")
    return config


def test_what_changes_no_numbers_may_change(tmp_path: Path) -> None:
    config = begun(tmp_path)
    other = replace(
        config,
        directory="elsewhere",
        train=replace(config.train, log_every=5),
        evaluate=replace(config.evaluate, every=3, pictures=0, batch=2, examples=4),
        checkpoint=CheckpointConfig(every=1, keep=7),
        mesh=replace(config.mesh, fsdp=2),
        hosts=replace(config.hosts, timeout=9),
        log=replace(config.log, tensorboard="off"),
    )
    assert check_same_run(other, tmp_path / "tiny") == {}


def test_steps_may_grow_and_not_shrink(tmp_path: Path) -> None:
    config = begun(tmp_path)
    more = replace(config, train=replace(config.train, steps=9))
    assert check_same_run(more, tmp_path / "tiny") == {"train.steps": (6, 9)}
    with pytest.raises(UserError, match="train.steps = 6, not 5"):
        check_same_run(replace(config, train=replace(config.train, steps=5)), tmp_path / "tiny")


def test_the_rest_changes_only_where_it_is_named(tmp_path: Path) -> None:
    config = begun(tmp_path)
    other = replace(config, optimiser=OptimConfig(lr=0.5))
    with pytest.raises(UserError, match="--resume .*/tiny --optimiser.lr 0.5"):
        check_same_run(other, tmp_path / "tiny")
    assert check_same_run(other, tmp_path / "tiny", {"optimiser.lr"}) == {
        "optimiser.lr": (0.01, 0.5)
    }
    with pytest.raises(UserError, match="seed"):
        check_same_run(replace(other, seed=3), tmp_path / "tiny", {"optimiser.lr"})


def test_another_model_is_not_offered_to_go_on(tmp_path: Path) -> None:
    config = begun(tmp_path)
    with pytest.raises(UserError, match="model.width = 16, not 32") as refused:
        check_same_run(replace(config, model=tiny.model(width=32)), tmp_path / "tiny")
    assert "--resume" not in str(refused.value)


def resumed(config: Config) -> Config:
    """What --resume makes of a run's configuration: it does not begin the run again."""
    return replace(config, checkpoint=replace(config.checkpoint, resume="always"))


def test_a_run_goes_on_as_it_was_configured(tmp_path: Path) -> None:
    config = resumed(begun(tmp_path))
    assert continued(tmp_path / "tiny", []) == (config, frozenset())
    found, names = continued(tmp_path / "tiny", ["--optimiser.lr", "0.5", "--train.log_every", "5"])
    train = replace(config.train, log_every=5)
    assert found == replace(config, optimiser=OptimConfig(lr=0.5), train=train)
    assert names == {"optimiser.lr"}


def test_a_damaged_configuration_is_replaced_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = begun(tmp_path)
    file = tmp_path / "tiny/config.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1', 1))
    monkeypatch.setattr(run_folder.restore, "read_config", lambda directory: config)
    assert continued(tmp_path / "tiny", [])[0] == resumed(config)
    said = capsys.readouterr().err
    assert "config.json is damaged" in said and "newest checkpoint is taken" in said


def test_a_run_may_have_moved(tmp_path: Path) -> None:
    begun(tmp_path / "runs")
    shutil.move(tmp_path / "runs" / "tiny", tmp_path / "kept")
    found, names = continued(tmp_path / "kept", [])
    assert (found.directory, found.name, names) == (str(tmp_path), "kept", frozenset())
    assert check_same_run(found, tmp_path / "kept") == {}


def test_a_run_in_a_group_keeps_its_name(tmp_path: Path) -> None:
    config = tiny.config(str(tmp_path), name="group/one")
    check_same_run(config, tmp_path / "group/one")
    assert continued(tmp_path / "group/one", [])[0] == resumed(config)


@pytest.mark.parametrize(
    ("folder", "words", "says"),
    [
        ("nowhere", [], "there is no such folder"),
        (".", [], "no run's folder"),
        ("tiny/checkpoints/2", [], "is a checkpoint: name the run's folder"),
        ("tiny", ["--name", "other"], "--name cannot be given"),
        ("tiny", ["--directory", "other"], "--directory cannot be given"),
        ("tiny", ["--start_from", "other"], "--start_from cannot be given"),
        ("tiny", ["--upcycle.experts", "split"], "--upcycle cannot be given"),
        ("tiny", ["--optimiser.lrr", "1"], "optimiser.lr"),
    ],
)
def test_what_cannot_be_gone_on_with(
    tmp_path: Path, folder: str, words: list[str], says: str
) -> None:
    begun(tmp_path)
    (tmp_path / "tiny/checkpoints/2").mkdir(parents=True)
    with pytest.raises(UserError, match=says):
        continued(tmp_path / folder, words)


def test_words_of_the_command_line() -> None:
    assert split([]) == (None, None, [])
    assert split(["rooms/x", "--a", "1"]) == ("rooms/x", None, ["--a", "1"])
    for words in (
        ["--resume", "r", "--a", "1"],
        ["--a", "1", "--resume", "r"],
        ["--resume=r", "--a", "1"],
    ):
        assert split(words) == (None, Path("r"), ["--a", "1"])
    wrong = (
        ["--resume"],
        ["--resume", "--a"],
        ["x", "--resume", "r"],
        ["--resume", "r", "--resume", "s"],
    )
    for words in wrong:
        with pytest.raises(UserError, match="--resume"):
            split(words)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"seed": 7, "checksum": "0"}', "\x00" * 40])
def test_a_damaged_configuration_is_that_of_the_newest_checkpoint(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = begun(tmp_path)
    (tmp_path / "tiny/config.json").write_text(damage)
    with pytest.raises(UserError, match="config.json is damaged .* no sound checkpoint"):
        continued(tmp_path / "tiny", [])
    monkeypatch.setattr(run_folder.restore, "read_config", lambda directory: config)
    assert continued(tmp_path / "tiny", [])[0] == resumed(config)
    with pytest.raises(UserError, match="holds a run with seed = 0, not 5"):
        check_same_run(replace(config, seed=5), tmp_path / "tiny")


def test_every_flipped_bit_of_a_configuration_is_seen(tmp_path: Path) -> None:
    config = begun(tmp_path)
    path = tmp_path / "tiny/config.json"
    content = path.read_bytes()
    seen = 0
    for at in range(0, 8 * len(content), 31):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            assert continued(tmp_path / "tiny", [])[0] == config  # flipped in a space
        except UserError as error:
            assert "is damaged" in str(error)
            seen += 1
    assert seen > 100


def test_changes_are_recorded_with_their_step(tmp_path: Path) -> None:
    config = begun(tmp_path)
    folder = tmp_path / "tiny"
    second = replace(config, optimiser=OptimConfig(lr=0.5))
    run_folder.record(folder, second, 4, {"optimiser.lr": (0.01, 0.5)})
    third = replace(second, train=TrainConfig(steps=9, batch=8, log_every=2))
    run_folder.record(folder, third, 6, {"train.steps": (6, 9)})
    assert run_folder.changes(folder) == [
        (4, "optimiser.lr", 0.01, 0.5),
        (6, "train.steps", 6, 9),
    ]
    assert run_folder.load_config(folder) == third
    run_folder.record(folder, third, 2, {})  # the newer checkpoints were damaged
    assert [change.step for change in run_folder.changes(folder)] == [2, 2]
    run_folder.record(folder, third, 0, {})
    assert run_folder.changes(folder) == []


def test_a_run_is_named_by_its_folder_however_that_is_written(tmp_path: Path, monkeypatch) -> None:
    begun(tmp_path)
    inner = tmp_path / "tiny" / "checkpoints"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for words in ("..", "../", "../.", str(inner / "..")):
        config, changed = continued(Path(words), [])
        assert (config.name, config.directory, changed) == ("tiny", str(tmp_path), frozenset())


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000])
def test_a_folder_that_is_too_long(name: str) -> None:
    with pytest.raises(UserError, match="too long for a path"):
        continued(Path(name), [])


@pytest.mark.parametrize("words", [["--resume", ""], ["--resume="]])
def test_no_folder_is_not_the_present_one(words: list[str]) -> None:
    with pytest.raises(UserError, match="--resume needs the folder of a run"):
        split(words)
