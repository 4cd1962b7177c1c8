"""What a run on pairs leaves for people: captions and finds beside images, usage, confusions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moezoo.backbones.generate import Settings
from moezoo.data.pairs.captions import longest
from moezoo.data.pairs.config import words_of
from moezoo.data.pairs.words import END, PAD, START
from moezoo.data.rooms.names import SCENES
from moezoo.models.conditional_caption import caption
from moezoo.nn import module
from moezoo.tasks import similar
from moezoo.tasks.scene import CONFUSION
from moezoo.train import mesh as meshes
from moezoo.train import pairs_pictures, pictures, report
from moezoo.train.evaluate import to_host
from moezoo.train.loop import Finished, rows_of
from moezoo.train.scoring import size_of

SHOWN = ("caption", "scene", "retrieval", "counts")


class Seen(NamedTuple):
    """The first test batch, its logits by task, and generated captions int32 [B, T] if any."""

    batch: dict[str, Any]
    logits: dict[str, Any]
    captions: np.ndarray | None


def predicted(finished: Finished) -> Seen:
    """What the model makes of the first test batch; all processes take part."""
    setup = finished.setup
    config, mesh = setup.config, setup.mesh
    size = size_of(config, meshes.batch_shards(mesh), len(setup.test))
    names = [name for name in setup.names if name in SHOWN]
    batches = setup.domain.evaluation(setup.test, size, size, names, rows_of(mesh, size))
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
    return Seen(to_host(batch), to_host(logits), to_host(made))


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
        pairs_pictures.captions(folder / "captions.png", _told(finished, seen, count))
    if count:
        for name in ("counts", "retrieval"):
            if name in seen.logits:
                finds = _finds(finished, seen, name, count, real)
                pairs_pictures.finds(folder / f"{name}.png", finds)
    tables = {t.name: evaluation.totals[t.name][CONFUSION] for t in setup.tasks if _chooses(t)}
    if tables:
        pictures.confusions(folder / "confusion.png", tables, setup.classes.names)
    shares = report.shares(evaluation)
    if shares:
        pictures.usage_grid(folder / "usage.png", shares, setup.groups)


def _chooses(task: Any) -> bool:
    return isinstance(task.metric, similar.Chosen)


def _told(finished: Finished, seen: Seen, count: int) -> list[pairs_pictures.Told]:
    words = words_of(finished.setup.config.data)  # type: ignore[arg-type]
    part = seen.batch["caption"]
    assert seen.captions is not None
    made = []
    for row in range(count):
        asked = part["targets"][row]
        kind = SCENES[int(seen.logits["scene"][row].argmax())] if "scene" in seen.logits else None
        made.append(
            pairs_pictures.Told(
                report.shown_image(part["image"][row]),
                words.decode(asked[asked >= 0]),
                words.decode(seen.captions[row]),
                kind,
            )
        )
    return made


def _finds(
    finished: Finished, seen: Seen, name: str, count: int, real: int
) -> list[pairs_pictures.Find]:
    """For the first texts, the images that are most similar to each."""
    words = words_of(finished.setup.config.data)  # type: ignore[arg-type]
    part, logits_BC = seen.batch[name], seen.logits[name][:real, :real]
    fits_BC = np.asarray(_fits(name)(part))
    made = []
    for text in range(count):
        best = np.argsort(-logits_BC[:, text], kind="stable")[: pairs_pictures.BEST]
        shown = [(report.shown_image(part["image"][i]), bool(fits_BC[i, text])) for i in best]
        made.append(pairs_pictures.Find(words.decode(part["text"][text]), shown))
    return made


def _fits(name: str) -> similar.Fits:
    return {"retrieval": similar.same_text, "counts": similar.has_all}[name]
