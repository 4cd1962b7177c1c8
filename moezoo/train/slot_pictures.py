"""Pictures of soft mixtures: where in a spectrogram every slot looks and what it gives to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.train.pictures import figure_of, save

MOST_SLOTS, MOST_LAYERS = 16, 3
KINDS = ("dispatch", "combine")
Maps = Mapping[str, tuple[np.ndarray, np.ndarray]]


def chosen(maps: Maps, tasks: Sequence[str]) -> Maps:
    """What to show of `maps[layer]`, [1 or J, E, S, F, T] each: a few layers, or the last by task.

    The answer's maps are [E, S, F, T].
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
    """Per layer one row of dispatch and one of combine maps, a column per slot.

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
