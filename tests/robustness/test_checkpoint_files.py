"""Damaged checkpoints: the newest sound one comes back bit for bit, or a sentence says why not."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moezoo.train import restore, run_folder
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.config import Config, from_json, to_json
from tests.robustness import fuzz
from tests.train import tiny
from tests.train.test_checkpoint import make_state

STEPS = (1, 2, 3)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, dict[int, Any]]:
    """A run's folder with three checkpoints, its configuration, and the states by step."""
    folder = tmp_path_factory.mktemp("sound")
    config = tiny.config(str(folder))
    run_folder.write_config(folder / "tiny", config)
    states = {step: make_state(step) for step in STEPS}
    with Checkpointer(folder / "tiny" / restore.FOLDER, to_json(config), keep=3) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, score=step / 10)
    return folder / "tiny", config, states


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def harm(chance: random.Random, run: Path) -> tuple[str, Path]:
    """One damage somewhere in a run's checkpoints, its configuration included."""
    checkpoint = run / restore.FOLDER / str(chance.choice(STEPS))
    # The manifest is one small file of many, and the one that all else is judged by.
    path = chance.choice([checkpoint / "manifest.json", run / "config.json", *files(checkpoint)])
    kind = chance.choice(("bytes", "bytes", "bytes", "gone", "folder", "link", "pipe"))
    if kind == "bytes":
        what, content = fuzz.mutate_bytes(chance, path.read_bytes())
        path.write_bytes(content)
        return f"{path.relative_to(run)}: {what}", path
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    return f"{path.relative_to(run)}: {kind}", path


def same(found: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def read_again(run: Path, config: Config, states: dict[int, Any], hurt: Path, new: bool) -> None:
    """Resume and read as the tools do; the newest checkpoint that is as it was must come back."""
    untouched = [s for s in STEPS if not new or str(s) not in hurt.relative_to(run).parts]
    silent = lambda sentence: None  # noqa: E731
    with Checkpointer(run / restore.FOLDER, to_json(config), keep=3, say=silent) as found:
        step = found.latest_valid()
        assert step in (max(untouched), max(STEPS)), f"step {step} and not {max(untouched)}"
        assert same(found.restore(step, states[step]), states[step]), f"another state {step}"
        wanted = {group: states[step][group] for group in ("params", "stats")}
        loaded = restore.load_params(run, wanted, silent)
        assert loaded["step"] == step and same({k: loaded[k] for k in wanted}, wanted)
        assert restore.read_config(run) == config
        assert run_folder.load_config(run) == config
        assert from_json(run_folder.read_config(run)) == config
        found.save(4, states[step])
        found.wait()
        assert found.latest_valid() == 4, "a new one cannot be written"


@fuzz.counts(ci=10, full=200)
def test_damaged_checkpoints(count: int, sound: tuple, tmp_path: Path) -> None:
    whole, config, states = sound

    def case(chance: random.Random) -> fuzz.Case:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        before = {path: path.read_bytes() for path in files(run)}
        name, hurt = harm(chance, run)
        changed = not hurt.is_file() or hurt.read_bytes() != before[hurt]
        return name, lambda: read_again(run, config, states, hurt, changed)

    found = fuzz.run("checkpoints", case, count)
    assert found["accepted"] == count, "two sound checkpoints are left in every case"


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "arrays"])
def test_where_no_checkpoint_is_sound_one_sentence_says_so(
    name: str, sound: tuple, tmp_path: Path
) -> None:
    run = shutil.copytree(sound[0], tmp_path / "run")
    for step in STEPS:
        place = run / restore.FOLDER / str(step) / name
        path = files(place)[0] if place.is_dir() else place
        path.write_bytes(path.read_bytes()[:-2])
    for read in (restore.read_config, restore.find):
        outcome = fuzz.attempted(lambda read=read: read(run))
        assert outcome.kind == "refused" and "all 3 are damaged" in outcome.detail, outcome
