"""What a run on sounds leaves for people: spectrograms with predictions, confusions, usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moezoo.models.soft_moa import slot_maps
from moezoo.nn import module
from moezoo.tasks.scene import CONFUSION
from moezoo.train import audio_pictures, pictures, report, slot_pictures
from moezoo.train import mesh as meshes
from moezoo.train.audio_pictures import Answer
from moezoo.train.evaluate import to_host
from moezoo.train.loop import Finished, rows_of


class Seen(NamedTuple):
    """Probabilities [B, C] by task for the first test clips, their batch, and the weights of soft
    mixtures in the first of them by layer, if any: [1, ...], or [J, ...] of tasks with their own
    (`soft_moa.slot_maps`)."""

    shares: dict[str, Any]
    batch: dict[str, Any]
    maps: dict[str, Any]


def predicted(finished: Finished, count: int) -> Seen:
    """What the model makes of the first test clips."""
    setup = finished.setup
    shards = meshes.batch_shards(setup.mesh)
    size = -(-count // shards) * shards
    rows = rows_of(setup.mesh, size)
    batches = setup.domain.evaluation(setup.test, size, size, setup.names, rows)
    batch = meshes.place(setup.mesh, next(iter(batches)), size)

    def forward(params: Any, stats: Any, batch: Any) -> tuple[dict[str, jax.Array], Any]:
        model = module.merge(finished.definition, params, stats)
        output = setup.domain.read(model, batch, train=False)
        shares = {t: jax.nn.softmax(logits, axis=-1) for t, logits in output.predictions.items()}
        maps = slot_maps(output, model.config, batch["audio"].shape[1])
        return shares, jax.tree.map(lambda m: m[::size], maps)

    with jax.set_mesh(setup.mesh):
        shares, maps = jax.jit(forward)(finished.state["params"], finished.state["stats"], batch)
    return Seen(to_host(shares), to_host(batch), to_host(maps))


def answers(
    shares: dict[str, np.ndarray], batch: dict[str, Any], names: Any, row: int
) -> list[Answer]:
    """What was asked about a clip, what is right, and what the model says, how surely."""
    made = []
    for task, shares_BC in shares.items():
        truth, likeliest = int(batch[task][row]), int(shares_BC[row].argmax())
        right = names[task][truth] if truth < len(names[task]) else "unknown"
        sure = float(shares_BC[row, likeliest])
        made.append(Answer(task, right, names[task][likeliest], sure))
    return made


def draw(finished: Finished, folder: Path, count: int) -> None:
    """Write `predictions.png`, `confusion.png`, `usage.png` and `slots.png`.

    All processes take part.
    """
    setup, evaluation = finished.setup, finished.evaluation
    names: Any = setup.classes.names
    count = min(count, len(setup.test))
    shares, batch, maps = predicted(finished, max(count, 1))
    if jax.process_index() != 0:
        return
    if count:
        data: Any = setup.config.data
        clips = [
            audio_pictures.Clip(
                np.asarray(batch["audio"][row][: batch["frames"][row]]),
                answers(shares, batch, names, row),
            )
            for row in range(count)
        ]
        audio_pictures.predictions(folder / "predictions.png", clips, data.rate)
    tables = {t.name: evaluation.totals[t.name][CONFUSION] for t in setup.tasks}
    pictures.confusions(folder / "confusion.png", tables, names)
    used = report.shares(evaluation)
    pictures.usage(folder / "usage.png", used, setup.names)
    shown = slot_pictures.chosen(maps, setup.names)
    slot_pictures.slots(folder / "slots.png", np.asarray(batch["audio"][0]), shown)
