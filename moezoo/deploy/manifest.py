"""The manifest of an export: everything a user or a server has to know, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import flax
import jax
import jaxlib
import numpy as np
from jax import export

import moezoo
from moezoo.deploy.path import TaskPath
from moezoo.deploy.runtime.load import SCHEMA
from moezoo.domains.audio.data import fbank
from moezoo.tasks import output
from moezoo.tasks.base import Task

# Differences to expect from the stored outputs, relative to the largest one. Accelerators round the
# inputs of float32 products by default, and a token near a tie may then go to another expert.
TOLERANCE = {"cpu": 1e-5, "other": 5e-2}
POSTPROCESS = {
    "image": "already applied in `prediction`; resize it to the photo to show it",
    "audio": "already applied in `prediction`",
}


class Sound(NamedTuple):
    """Samples per second, and what becomes of several channels: their `average` or the `first`."""

    rate: int
    mono: str


class Facts(NamedTuple):
    """What the path does not know about itself.

    mean, std: of the normalisation, per channel, for pixels scaled to 0..1.
    labels: class names in order, () for tasks without classes.
    sound: of a path that reads spectrograms.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...] = ()
    source: str = ""
    training_data: str = ""
    licence: str = "the licence of the weights is that of their training; moezoo is Apache-2.0"
    sound: Sound | None = None


def describe(
    path: TaskPath,
    task: Task,
    facts: Facts,
    exported: export.Exported,
    golden: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest without certificate and checksums."""
    return {
        "schema": SCHEMA,
        "task": _task(task, facts),
        "inputs": {input_name(path): _input(path)},
        "preprocess": _preprocess(path, facts),
        "outputs": {name: _output(name, value, task) for name, value in golden.items()},
        "postprocess": POSTPROCESS[input_name(path)],
        "picture": output.painting(task),
        "path": {
            "kind": "exact" if path.exact else "pruned",
            "layers": {name: layer._asdict() for name, layer in path.layers.items()},
            "plan": path.plan.digest(),
            "parameters": sum(int(np.prod(w.shape)) for w in path.weights.values()),
        },
        "golden": TOLERANCE,
        "versions": versions(exported),
        "source": facts.source,
        "training_data": facts.training_data,
        "licence": facts.licence,
    }


def _task(task: Task, facts: Facts) -> dict[str, Any]:
    described: dict[str, Any] = {"name": task.name, "unit": output.of(task).unit}
    if facts.labels:
        described |= {"labels": list(facts.labels), "ignore_label": 255}
    return described


def input_name(path: TaskPath) -> str:
    """What an export calls its input."""
    return "image" if path.channels else "audio"


def _input(path: TaskPath) -> dict[str, Any]:
    if not path.channels:
        layout = "frames of 10 ms, mel bands"
        shape = ["b", *path.image_size]
        return {"dtype": "float32", "shape": shape, "layout": layout, "range": "after `preprocess`"}
    return {
        "dtype": "float32",
        "shape": ["b", *path.image_size, 3],
        "layout": "NHWC",
        "colour": "RGB",
        "range": "after `preprocess`",
    }


def _preprocess(path: TaskPath, facts: Facts) -> list[dict[str, Any]]:
    if facts.sound is not None:
        return _hear(path, facts.sound)
    return see(path.image_size, facts.mean, facts.std)


def see(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> list[dict[str, Any]]:
    """What becomes of a photo: its size, and numbers that the network reads."""
    height, width = size
    return [
        {"step": "resize", "height": height, "width": width, "mode": "bilinear", "antialias": True},
        {"step": "scale", "factor": 1 / 255},
        {"step": "normalise", "mean": list(mean), "std": list(std)},
    ]


def _hear(path: TaskPath, sound: Sound) -> list[dict[str, Any]]:
    frames, bands = path.image_size
    filters = {"window_seconds": fbank.WINDOW, "hop_seconds": fbank.HOP, "window": "hann"}
    filters |= {"lowest_hertz": fbank.LOWEST, "preemphasis": fbank.PREEMPHASIS}
    return [
        {"step": "mono", "how": sound.mono},
        {"step": "resample", "rate": sound.rate},
        {"step": "log_mel", "bands": bands, **filters, "by": "fbank.py"},
        {"step": "pad", "frames": frames, "value": 0.0, "longer": "cut"},
        {"step": "normalise", "mean": fbank.MEAN, "std": 2 * fbank.STD},
    ]


def _output(name: str, value: Any, task: Task) -> dict[str, Any]:
    meaning = {
        "logits": "raw network output",
        "prediction": output.of(task).unit,
        "violations": "tokens, over all layers, that asked for a removed expert; 0 = exactly the "
        "full model's output",
    }
    return {
        "dtype": str(value.dtype),
        "shape": ["b", *value.shape[1:]],
        "meaning": meaning[name],
    }


def versions(exported: export.Exported) -> dict[str, Any]:
    """What wrote a program, and what can read it."""
    return {
        "moezoo": moezoo.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "calling_convention": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "readable_by": f"jax {jax.__version__} and every jax released up to six months later",
    }
