"""Tables of claims from runs' folders, and which weights are kept; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moezoo.bench import baselines
from moezoo.cli.train import configured
from moezoo.errors import UserError


class Scored(NamedTuple):
    name: str
    headline: str
    lower_is_better: bool


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks, three seeds: the sparse model gains 10, 20 and 0 per cent on each of both."""
    tasks = Scored("semseg", "mIoU", False), Scored("depth", "rmse", True)
    monkeypatch.setattr(baselines, "tasks", lambda run: tasks)
    for seed, gain in enumerate((0.1, 0.2, 0.0)):
        for name, by in ((baselines.DENSE, 0.0), (baselines.SPARSE, gain)):
            rows: list[dict[str, Any]] = [
                {"step": 1, "split": "test", "semseg/mIoU": 0.1, "depth/rmse": 9.0},
                {
                    "step": 2,
                    "split": "test",
                    "semseg/mIoU": 0.5 * (1 + by),
                    "depth/rmse": 2 - 2 * by,
                },
                {"step": 2, "split": "train", "loss": 1.0},
            ]
            (tmp_path / f"{name}_{seed}").mkdir()
            text = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / f"{name}_{seed}" / "metrics.jsonl").write_text(text)
    return tmp_path


def test_gains_are_over_the_dense_model_of_the_same_seed(runs: Path) -> None:
    found = baselines.compared([baselines.DENSE, baselines.SPARSE], runs, 3)
    sparse = found[baselines.SPARSE]
    assert sparse["delta_m_percent"]["seeds"] == pytest.approx([10.0, 20.0, 0.0])
    assert sparse["delta_m_percent"]["mean"] == pytest.approx(10.0)
    assert sparse["delta_m_percent"]["std"] == pytest.approx(10.0)
    assert sparse["scores"]["depth"]["seeds"] == pytest.approx([1.8, 1.6, 2.0])
    assert found[baselines.DENSE]["delta_m_percent"]["seeds"] == [0.0] * 3
    assert (
        baselines.compared([baselines.SPARSE], runs, 1)[baselines.SPARSE]["scores"]["depth"]["std"]
        is None
    )
    with pytest.raises(UserError, match="no run in .*mlore_0: run the stage claim first"):
        baselines.compared(["mlore"], runs, 1)


def test_the_best_seeds_weights_are_kept_and_large_ones_refused(runs: Path) -> None:
    found, made = baselines.compared([baselines.SPARSE], runs, 3), []

    def save(words: list[str], file: Path) -> None:
        made.append(words)
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(bytes(10))

    kept = baselines.keep_best(found, runs, runs / "claim.json", "one card", save)
    assert kept == runs / "kept" / baselines.SPARSE
    assert made[0][3] == str(runs / f"{baselines.SPARSE}_1") and "one card" in made[0]
    with (kept / "weights.safetensors").open("wb") as file:
        file.truncate(baselines.LARGEST + 1)  # sparse: takes no room
    with pytest.raises(UserError, match="has 12,000,001 bytes, more than 12,000,000"):
        baselines.keep_best(found, runs, runs / "claim.json", "one card", save)
    assert len(made) == 1  # what was written is not written again


@pytest.mark.parametrize("claim", baselines.COMPARISONS, ids=lambda claim: claim.name)
def test_every_claims_words_are_a_configuration(claim: baselines.DenseComparison) -> None:
    """At full size all on one trunk, the same steps and data; tiny for a trial."""
    for name, words in claim.models.items():
        config = configured([*words.split(), "--name", name])[0]
        assert (config.model.width, config.model.depth, config.model.heads) == (192, 6, 6)
        assert (config.train.steps, config.train.batch, config.optimiser.lr) == (3000, 32, 1e-3)
        assert config.data.train == 8000
        if base := baselines.BASES.get(name):
            assert config.tasks == configured(claim.models[base].split())[0].tasks
        tiny = configured([*words.split(), *baselines.TINY.split()])[0]
        assert (tiny.model.width, tiny.train.steps) == (24, 2)
