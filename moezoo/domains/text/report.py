"""Reports on a run on text: samples of answers, pictures of usage and of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo.domains.text.data.tokenizer import Tokenizer, tokenizer_at
from moezoo.domains.text.tasks import LM
from moezoo.files import write_atomically
from moezoo.nn import module
from moezoo.tasks.language import likeliest
from moezoo.train import mesh as meshes
from moezoo.train import pictures, report
from moezoo.train.evaluate import to_host
from moezoo.train.loop import Finished
from moezoo.train.pictures import figure_of, save
from moezoo.train.report import code, escaped


def scores_by_task(path: Path, scores: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Bars of exact match and token accuracy for each task; NaN if it had no example."""
    names = ("exact_match", "accuracy")
    figure, axes = figure_of(1, 1, (4.6, 0.9 + 0.28 * len(tasks)))
    axis, places = axes[0, 0], np.arange(len(tasks))
    for k, (name, colour) in enumerate(zip(names, ("#1f4e8c", "#b8c4d6"), strict=True)):
        values = [scores.get(f"{task}/{name}", float("nan")) for task in tasks]
        axis.barh(places + 0.4 * k, values, height=0.38, color=colour, label=name)
    axis.set_yticks(places + 0.2, list(tasks), fontsize=8)
    axis.set_xlim(0, 1)
    axis.grid(axis="x", alpha=0.25)
    axis.set_ylim(len(tasks) - 0.4, -0.4)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    save(figure, path)


def predicted(finished: Finished, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The first test rows, and the likeliest next token at each of their places, [B, T]."""
    setup = finished.setup
    shards = meshes.batch_shards(setup.mesh)
    size = -(-rows // shards) * shards
    batches = setup.domain.evaluation(setup.test, size, size, (LM,), meshes.rows(setup.mesh, size))
    batch = meshes.place(setup.mesh, next(batches), size)

    def forward(params: Any, stats: Any, batch: Any) -> jax.Array:
        model = module.merge(finished.definition, params, stats)
        return likeliest(setup.domain.read(model, batch, train=False).predictions[LM])

    with jax.set_mesh(setup.mesh):
        found = jax.jit(forward)(finished.state["params"], finished.state["stats"], batch)
    return to_host(batch[LM]), to_host(found)


def samples(
    rows: dict[str, np.ndarray],
    likeliest_BT: np.ndarray,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    count: int,
) -> str:
    """A Markdown table of documents: prompt, wanted answer, and the model's answer.

    The model's answer is computed by teacher forcing: it equals the wanted answer exactly when
    greedy decoding would give that answer.
    """
    lines = ["| task | prompt | answer | model | |", "|---|---|---|---|---|"]
    for row in range(len(likeliest_BT)):
        segments = rows["segments"][row]
        for segment in range(1, segments.max(initial=0) + 1):
            if len(lines) - 2 >= count:
                return "\n".join(lines) + "\n"
            (here,) = np.nonzero(segments == segment)
            targets = rows["targets"][row, here]
            asked = targets >= 0
            if not asked.any():
                continue
            prompt = rows["tokens"][row, here][: int(asked.argmax()) + 1]
            answer, given = targets[asked], likeliest_BT[row, here][asked]
            right = "right" if (answer == given).all() else "wrong"
            texts = [code(tokenizer.decode(ids.tolist())) for ids in (prompt, answer, given)]
            task = escaped(tasks[rows["task"][row, here[0]]])
            lines.append(f"| {task} | {' | '.join(texts)} | {right} |")
    return "\n".join(lines) + "\n"


def draw(finished: Finished, folder: Path, count: int) -> None:
    """Write `samples.md`, `usage.png` and `scores.png`; all processes take part."""
    setup, evaluation = finished.setup, finished.evaluation
    rows, found = predicted(finished, max(count, 1))
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = samples(rows, found, tokenizer_at(setup.config.data.tokenizer), setup.groups, 4 * count)  # type: ignore[arg-type]
    write_atomically(folder / "samples.md", text)
    shares = report.shares(evaluation)
    if shares:
        pictures.usage_grid(folder / "usage.png", shares, setup.groups)
    scores_by_task(folder / "scores.png", evaluation.scores[LM], setup.groups)
