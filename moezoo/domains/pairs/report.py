"""Reports on a run on pairs: captions and finds beside images, usage, confusions.

Finds are the images that are most similar to a text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moezoo.backbones.generate import Settings
from moezoo.domains.images.data.rooms.names import SCENES
from moezoo.domains.images.report import shown_image
from moezoo.domains.pairs import tasks as similar
from moezoo.domains.pairs.data.captions import longest, vocabulary
from moezoo.domains.pairs.data.words import END, PAD, START
from moezoo.models.conditional_moe.caption import caption
from moezoo.nn import module
from moezoo.tasks.classification import CONFUSION
from moezoo.train import mesh as meshes
from moezoo.train import pictures, report
from moezoo.train.evaluate import to_host
from moezoo.train.loop import Finished
from moezoo.train.pictures import RIGHT, WRONG, empty_figure, figure_of, save
from moezoo.train.scoring import size_of

BEST = 5  # images shown per text, the most similar ones
LINE = 84  # letters


class CaptionedImage(NamedTuple):
    """An image uint8 [H, W, 3], its caption, the model's, and its kind of room, if given."""

    image: np.ndarray
    caption: str
    given: str
    scene: str | None


class Find(NamedTuple):
    """A text, and the images most similar to it, each with whether it fits."""

    text: str
    images: Sequence[tuple[np.ndarray, bool]]


def captions(path: Path, told: Sequence[CaptionedImage]) -> None:
    """One row per image: its caption, and the model's."""
    figure, axes = figure_of(len(told), 2, (8.0, 1.75 * len(told) + 0.2), (1.0, 3.4))
    for (left, right), one in zip(axes, told, strict=True):
        left.imshow(one.image, interpolation="nearest")
        lines = ["caption:", *textwrap.wrap(one.caption, LINE)]
        lines += ["", "the model:", *textwrap.wrap(one.given, LINE)]
        if one.scene is not None:
            lines += ["", f"kind of room: {one.scene}"]
        right.text(0, 1, "\n".join(lines), va="top", fontsize=8, family="monospace")
        for axis in (left, right):
            axis.set_axis_off()
    save(figure, path)


def finds(path: Path, found: Sequence[Find]) -> None:
    """One row per text: the most similar images, framed in green if they fit, else in red."""
    columns = max(len(one.images) for one in found)
    figure = empty_figure((1.6 * columns, 2.0 * len(found)))
    # One figure per text: as a title of the first image, the text would push the others away.
    for part, one in zip(figure.subfigures(len(found), squeeze=False)[:, 0], found, strict=True):
        row = part.subplots(1, columns, squeeze=False)[0]
        for axis in row[len(one.images) :]:
            axis.set_axis_off()
        for axis, (image, fits) in zip(row, one.images, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_edgecolor(RIGHT if fits else WRONG)
                side.set_linewidth(3)
        text = "\n".join(textwrap.wrap(one.text, 24 * columns))
        part.suptitle(text, fontsize=8, x=0.01, ha="left")
    save(figure, path)


SHOWN = ("caption", "scene", "retrieval", "counts")


class PredictedPairs(NamedTuple):
    """The first test batch, its logits by task, and generated captions int32 [B, T] if any."""

    batch: dict[str, Any]
    logits: dict[str, Any]
    captions: np.ndarray | None


def predicted(finished: Finished) -> PredictedPairs:
    """The model's output for the first test batch; all processes take part."""
    setup = finished.setup
    config, mesh = setup.config, setup.mesh
    size = size_of(config, meshes.batch_shards(mesh), len(setup.test))
    names = [name for name in setup.names if name in SHOWN]
    batches = setup.domain.evaluation(setup.test, size, size, names, meshes.rows(mesh, size))
    batch = meshes.place(mesh, next(iter(batches)), size)
    settings = Settings(min(longest() + 1, config.data.length), stop=(END,), pad=PAD)  # type: ignore[union-attr]

    def forward(params: Any, stats: Any, batch: Any) -> tuple[Any, Any]:
        model: Any = module.merge(finished.definition, params, stats)
        logits = setup.domain.read(model, batch, train=False).predictions
        if "caption" not in batch:
            return logits, None
        image, words_VD = batch["caption"]["image"], model.words("caption|target")
        made = caption(model, image, "caption|input", words_VD, settings, bos=START)
        return logits, made.tokens_BT

    with jax.set_mesh(mesh):
        logits, made = jax.jit(forward)(finished.state["params"], finished.state["stats"], batch)
    return PredictedPairs(to_host(batch), to_host(logits), to_host(made))


def draw(finished: Finished, folder: Path, count: int) -> None:
    """Write `captions.png`, `counts.png`, `retrieval.png`, `confusion.png` and `usage.png`.

    All processes take part.
    """
    setup, evaluation = finished.setup, finished.evaluation
    seen = predicted(finished)
    if jax.process_index() != 0:
        return
    real = int(np.sum(seen.batch["valid"]))
    count = min(count, real)
    if count and seen.captions is not None:
        captions(folder / "captions.png", _told(finished, seen, count))
    if count:
        for name in ("counts", "retrieval"):
            if name in seen.logits:
                found = _finds(finished, seen, name, count, real)
                finds(folder / f"{name}.png", found)
    tables = {t.name: evaluation.totals[t.name][CONFUSION] for t in setup.tasks if _chooses(t)}
    if tables:
        pictures.confusions(folder / "confusion.png", tables, setup.classes.names)
    shares = report.shares(evaluation)
    if shares:
        pictures.usage_grid(folder / "usage.png", shares, setup.groups)


def _chooses(task: Any) -> bool:
    return isinstance(task.metric, similar.Chosen)


def _told(finished: Finished, seen: PredictedPairs, count: int) -> list[CaptionedImage]:
    words = vocabulary()  # type: ignore[arg-type]
    part = seen.batch["caption"]
    assert seen.captions is not None
    made = []
    for row in range(count):
        asked = part["targets"][row]
        kind = SCENES[int(seen.logits["scene"][row].argmax())] if "scene" in seen.logits else None
        made.append(
            CaptionedImage(
                shown_image(part["image"][row]),
                words.decode(asked[asked >= 0]),
                words.decode(seen.captions[row]),
                kind,
            )
        )
    return made


def _finds(
    finished: Finished, seen: PredictedPairs, name: str, count: int, real: int
) -> list[Find]:
    """The images most similar to each of the first texts."""
    words = vocabulary()  # type: ignore[arg-type]
    part, logits_BC = seen.batch[name], seen.logits[name][:real, :real]
    fits_BC = np.asarray(_fits(name)(part))
    made = []
    for text in range(count):
        best = np.argsort(-logits_BC[:, text], kind="stable")[:BEST]
        shown = [(shown_image(part["image"][i]), bool(fits_BC[i, text])) for i in best]
        made.append(Find(words.decode(part["text"][text]), shown))
    return made


def _fits(name: str) -> similar.Fits:
    return {"retrieval": similar.same_text, "counts": similar.has_all}[name]
