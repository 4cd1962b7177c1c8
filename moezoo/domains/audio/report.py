"""Reports on a run on sounds: spectrograms with predictions, confusions, usage, slots.

Slots are the slots of soft mixtures: where in a spectrogram each one looks, and where its output
goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moezoo.domains.audio.data import fbank
from moezoo.models.soft_moa.model import slot_maps
from moezoo.nn import module
from moezoo.tasks.classification import CONFUSION
from moezoo.train import mesh as meshes
from moezoo.train import pictures, report
from moezoo.train.evaluate import to_host
from moezoo.train.loop import Finished
from moezoo.train.pictures import RIGHT, WRONG, figure_of, save

COLUMNS = 4
TICKS = (100, 300, 1000, 3000)  # Hz


class Answer(NamedTuple):
    """The right class of a task, the likeliest one, and its probability."""

    task: str
    right: str
    given: str
    sure: float


class DrawnClip(NamedTuple):
    """Normalised features [T, F] without padding, and the answers about them."""

    audio_TF: np.ndarray
    answers: Sequence[Answer]


def predictions(path: Path, clips: Sequence[DrawnClip], rate: int) -> None:
    """Spectrograms; above each, truth and prediction of every task, in green if right."""
    columns = min(COLUMNS, len(clips))
    rows = -(-len(clips) // columns)
    lines = len(clips[0].answers)
    size = (3.4 * columns, (1.9 + 0.2 * lines) * rows + 0.3)
    figure, axes = figure_of(rows, columns, size)
    for axis in axes.ravel()[len(clips) :]:
        axis.set_axis_off()
    for number, (axis, clip) in enumerate(zip(axes.ravel(), clips, strict=False)):
        _spectrogram(axis, clip.audio_TF, rate)
        axis.set_title("\n" * lines, fontsize=8)  # room for the answers
        for line, answer in enumerate(reversed(clip.answers)):
            said = f"{answer.task}: {answer.right} → {answer.given} ({100 * answer.sure:.0f} %)"
            colour = RIGHT if answer.right == answer.given else WRONG
            place = {"xy": (0.0, 1.0), "xytext": (0, 4 + 11 * line)}
            axis.annotate(
                said, xycoords="axes fraction", textcoords="offset points", color=colour,
                fontsize=8, **place,
            )  # fmt: skip
        if number % columns == 0:
            axis.set_ylabel("Hz", fontsize=7)
    figure.supxlabel("seconds; right answer → the model's, and how sure it is", fontsize=8)
    save(figure, path)


def _spectrogram(axis, audio_TF: np.ndarray, rate: int) -> None:
    logmel = fbank.denormalise(audio_TF)
    top = float(logmel.max())
    frames, bands = logmel.shape
    # An ear hears silence at 80 dB below the loudest.
    axis.imshow(
        logmel.T, origin="lower", aspect="auto", cmap="magma", vmin=top - 8 * np.log(10), vmax=top,
        extent=(0, frames * fbank.HOP, 0, bands),
    )  # fmt: skip
    places = np.interp(TICKS, fbank.centres(bands, rate), np.arange(bands) + 0.5)
    shown = [(place, hertz) for place, hertz in zip(places, TICKS, strict=True) if hertz < rate / 2]
    axis.set_yticks([place for place, _ in shown], [str(hertz) for _, hertz in shown])
    axis.tick_params(labelsize=6)


MOST_SLOTS, MOST_LAYERS = 16, 3
KINDS = ("dispatch", "combine")
Maps = Mapping[str, tuple[np.ndarray, np.ndarray]]


def chosen(maps: Maps, tasks: Sequence[str]) -> Maps:
    """What to show of `maps[layer]`, [1 or J, E, S, F, T] each: a few layers, or the last by task.

    The returned maps are [E, S, F, T].
    """
    paths = list(maps)
    if not paths:
        return {}
    if len(maps[paths[0]][0]) > 1:
        last = maps[paths[-1]]
        return {f"{paths[-1]}, {t}": (last[0][j], last[1][j]) for j, t in enumerate(tasks)}
    places = np.linspace(0, len(paths) - 1, min(len(paths), MOST_LAYERS)).round().astype(int)
    return {paths[i]: (maps[paths[i]][0][0], maps[paths[i]][1][0]) for i in places}


def slots(path: Path, audio_TF: np.ndarray, maps: Maps) -> None:
    """Per layer, one row of dispatch maps and one of combine maps, with a column per slot.

    `maps[layer]` holds both, [E, S, F, T]. Colours are logarithmic, in multiples of an even share
    of the patches (what a slot is made of) or of the slots (what a patch is made of): white means
    "as if nothing decided". Nothing is drawn without a map.
    """
    layers = list(maps)
    if not layers:
        return
    experts, per_expert = maps[layers[0]][0].shape[:2]
    count = min(experts * per_expert, MOST_SLOTS)
    size = (2.4 + 1.25 * count, 0.7 + 2.0 * len(layers))
    figure, axes = figure_of(2 * len(layers), 1 + count, size)
    drawn: Any = None
    for i, name in enumerate(layers):
        for k, weights_ESFT in enumerate(maps[name]):
            row = axes[2 * i + k]
            _seen_by_slots(row[0], audio_TF, f"{name.replace('/adapter', '')}\n{KINDS[k]}")
            for place, axis in enumerate(row[1:]):
                e, s = divmod(place, per_expert)
                drawn = axis.imshow(
                    _relative(weights_ESFT, k)[e, s],
                    origin="lower",
                    aspect="auto",
                    cmap="RdBu_r",
                    vmin=-3,
                    vmax=3,
                )
                axis.set_xticks([])
                axis.set_yticks([])
                if not i and not k:
                    slot = f", slot {s}" if per_expert > 1 else ""
                    axis.set_title(f"expert {e}{slot}", fontsize=8)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.02, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"], fontsize=7)
    bar.set_label("weight, in even shares", fontsize=8)
    save(figure, path)


def _seen_by_slots(axis: Any, audio_TF: np.ndarray, label: str) -> None:
    axis.imshow(audio_TF.T, origin="lower", aspect="auto", cmap="magma")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_ylabel(label, fontsize=7)


def _relative(weights_ESFT: np.ndarray, kind: int) -> np.ndarray:
    e, s, f, t = weights_ESFT.shape
    even = 1 / (f * t) if kind == 0 else 1 / (e * s)
    return np.log2(np.maximum(weights_ESFT / even, 1e-3))


class PredictedClips(NamedTuple):
    """Probabilities [B, C] by task for the first test clips, their batch, and the weights of soft
    mixtures in the first of them by layer, if any: [1, ...], or [J, ...] if tasks have their own
    (`models.soft_moa.model.slot_maps`)."""

    shares: dict[str, Any]
    batch: dict[str, Any]
    maps: dict[str, Any]


def predicted(finished: Finished, count: int) -> PredictedClips:
    """The model's output for the first test clips."""
    setup = finished.setup
    shards = meshes.batch_shards(setup.mesh)
    size = -(-count // shards) * shards
    rows = meshes.rows(setup.mesh, size)
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
    return PredictedClips(to_host(shares), to_host(batch), to_host(maps))


def answers(
    shares: dict[str, np.ndarray], batch: dict[str, Any], names: Any, row: int
) -> list[Answer]:
    """What was asked about a clip, the right answer, the model's answer, and how sure it is."""
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
            DrawnClip(
                np.asarray(batch["audio"][row][: batch["frames"][row]]),
                answers(shares, batch, names, row),
            )
            for row in range(count)
        ]
        predictions(folder / "predictions.png", clips, data.rate)
    tables = {t.name: evaluation.totals[t.name][CONFUSION] for t in setup.tasks}
    pictures.confusions(folder / "confusion.png", tables, names)
    used = report.shares(evaluation)
    pictures.usage(folder / "usage.png", used, setup.names)
    shown = chosen(maps, setup.names)
    slots(folder / "slots.png", np.asarray(batch["audio"][0]), shown)
