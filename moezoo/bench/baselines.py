"""Models trained beside a dense baseline on one card, several seeds at once: papers' claims.

Small models leave most of a card idle between their kernels, so that six processes take little
longer than one. A run that was cut off goes on from its newest checkpoint when its stage is called
again with the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from moezoo.errors import UserError
from moezoo.tasks.delta import delta_m
from moezoo.train import zoo
from moezoo.train.restore import read_config
from moezoo.train.setup import classes_of, make_tasks

SEEDS = 3
TINY = "--data.train 8 --data.test 4 --train.steps 2 --train.batch 2 --optimiser.warmup 1"
TINY += " --evaluate.batch 4 --evaluate.pictures 0 --model.width 24 --model.depth 2 --model.heads 2"
# What makes a laptop's configuration one of the size of `rooms/m3vit_small`.
GROWN = "--data.train 8000 --model.width 192 --model.depth 6 --model.heads 6 --train.steps 3000"
GROWN += " --train.batch 32 --optimiser.lr 1e-3 --checkpoint.every 1000"
DENSE, SPARSE = "vit_dense_small", "m3vit_small"
LARGEST = 12_000_000  # bytes of weights that are kept to be given away

RunWords = Callable[[list[str], Path], None]  # runs words; its output goes beside a file


class DenseComparison(NamedTuple):
    """Models to train beside the dense one: a run's name to the words of `moezoo train`."""

    name: str
    models: Mapping[str, str]
    expected: float  # seconds


COMPARISONS = (
    DenseComparison("claim", {DENSE: f"rooms/{DENSE}", SPARSE: f"rooms/{SPARSE}"}, 300),
    DenseComparison(
        "claim_systems",
        {
            "mlore": f"rooms/mlore_tiny {GROWN}",
            "taskexpert": f"rooms/taskexpert_tiny {GROWN}",
        },
        400,
    ),
    DenseComparison(
        "claim_routing",
        {
            "task_conditioned": f"rooms/{SPARSE} --model.routing task_conditioned",
            "single": f"rooms/{SPARSE} --model.routing single",
        },
        300,
    ),
    # Its own tasks, and so a dense model of its own.
    DenseComparison(
        "claim_mod_squad",
        {
            "mod_squad": f"rooms/mod_squad_tiny {GROWN}",
            "mod_squad_dense": f"rooms/{DENSE} --train.weights.parts 8 "
            "--tasks semseg parts saliency normals edge depth",
        },
        300,
    ),
)
BASES = {"mod_squad": "mod_squad_dense"}  # of a model; else `DENSE`


def trained(
    claim: DenseComparison, runs: Path, file: Path, small: bool, command: RunWords
) -> dict[str, Any]:
    """Train what is not trained yet, all at once; the scores and gains over the dense model."""
    seeds = 1 if small else SEEDS
    tiny = f" {TINY}" if small else ""
    # The first to come makes the data, which the others then find.
    words = f"train.py rooms/{DENSE} --directory {runs} --name data{tiny}"
    words += " --train.steps 1 --optimiser.warmup 0 --evaluate.pictures 0"
    command(words.split(), file.with_name("data.json"))

    def one(seed: int, name: str) -> None:
        own = f"{name}_{seed}"
        words = f"train.py {claim.models[name]} --directory {runs} --name {own} --seed {seed}{tiny}"
        command(words.split(), file.with_name(f"{own}.json"))

    wanted = list(product(range(seeds), claim.models))
    with ThreadPoolExecutor(1 if small else len(wanted)) as pool:
        list(pool.map(lambda run: one(*run), wanted))
    return compared(list(claim.models), runs, seeds)


def compared(models: list[str], runs: Path, seeds: int) -> dict[str, Any]:
    """Each model's scores by task, and Delta_m over the dense model of the same seed, in per cent.

    Lists have one entry for each seed. Raises UserError where the dense model was not trained.
    """
    found: dict[str, Any] = {}
    for name in models:
        scores = [headlines(runs / f"{name}_{seed}") for seed in range(seeds)]
        base = BASES.get(name, DENSE)
        bases = [headlines(runs / f"{base}_{seed}") for seed in range(seeds)]
        lower = lower_is_better(runs / f"{name}_0")
        gains = [100 * delta_m(own, dense, lower) for own, dense in zip(scores, bases, strict=True)]
        columns = {task: [one[task] for one in scores] for task in lower}
        found[name] = {
            "scores": {task: summary(values) for task, values in columns.items()},
            "delta_m_percent": summary(gains),
        }
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, None for one seed, beside the numbers."""
    return {"mean": fmean(values), "std": stdev(values) if values[1:] else None, "seeds": values}


def headlines(run: Path) -> dict[str, float]:
    """The one score per task of a run's last evaluation on the test split."""
    file = run / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"There is no run in {run}: run the stage {COMPARISONS[0].name} first.")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    last = [row for row in rows if row["split"] == "test"][-1]
    return {task.name: last[f"{task.name}/{task.headline}"] for task in tasks(run)}


def lower_is_better(run: Path) -> dict[str, bool]:
    """By task, in the order of the run."""
    return {task.name: task.lower_is_better for task in tasks(run)}


def tasks(run: Path) -> tuple[Any, ...]:
    """A run's tasks."""
    config = read_config(run)
    return make_tasks(config, classes_of(run, config))


def keep_best(found: Mapping[str, Any], runs: Path, file: Path, by: str, command: RunWords) -> Path:
    """Save the weights of the seed with the largest gain, bfloat16 with configuration and scores.

    by: what it was trained on. Raises UserError where they are larger than `LARGEST`.
    """
    gains = found[SPARSE]["delta_m_percent"]["seeds"]
    best = max(range(len(gains)), key=gains.__getitem__)
    kept = file.parent / "kept" / SPARSE
    if not kept.exists():  # it is written whole, so what an earlier call left is good
        kept.parent.mkdir(exist_ok=True)
        words = ["-m", "moezoo", "save", str(runs / f"{SPARSE}_{best}"), "--out", str(kept)]
        command([*words, "--hardware", by], file.with_name("save.json"))
    size = (kept / zoo.WEIGHTS).stat().st_size
    if size > LARGEST:
        raise UserError(f"{kept / zoo.WEIGHTS} has {size:,} bytes, more than {LARGEST:,}.")
    return kept
