"""A sweep or a certificate as one page: a file that any browser opens, without server or network.

The file page.html holds the program of the page; here its data are put together. Names and
sentences of users reach the page as JSON that its program never reads as HTML, and pictures as
bytes of PNG.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo import regular
from moezoo.deploy import novices, sweep
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.path import TaskPath
from moezoo.deploy.produce import TrainedRun
from moezoo.deploy.sweep import Curve, Method, Point
from moezoo.deploy.trial import Trial
from moezoo.files import write_atomically
from moezoo.json_text import json_text
from moezoo.ops.routing import Routing
from moezoo.schema_check import FormatFault, parse
from moezoo.tasks.base import Task

TEMPLATE, PLACE = Path(__file__).with_name("page.html"), "/*DATA*/"
EXAMPLES = 12
LARGEST = 256 * regular.MB  # of a page that is read again
DIGITS = 6  # of numbers on the page: more say nothing, and make the file longer


def write(file: Path, title: str, words: str, sections: Sequence[Mapping[str, Any]]) -> None:
    """Write a page of one section per task, `sweep_section`s or `certificate_section`s."""
    data = {"title": title, "words": words, "sections": list(sections)}
    text = json_text(_rounded(data), sort_keys=True).rstrip()
    # Nothing in the data may end the script element that holds it.
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    write_atomically(file, TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text))


def is_own(file: Path) -> bool:
    """Whether a page is this version's program around plain data, so that a browser may open it.

    Its data can say anything; they cannot do anything.
    """
    if file.stat().st_size > LARGEST:
        return False
    before, after = (part.encode() for part in TEMPLATE.read_text(encoding="utf-8").split(PLACE))
    content = file.read_bytes()
    if not (content.startswith(before) and content.endswith(after)):
        return False
    data = content[len(before) : len(content) - len(after)]
    if any(sign in data for sign in b"<>&"):
        return False  # they could end the element that holds them
    try:
        parse(data)
    except FormatFault:
        return False
    return True


def sweep_section(
    trained: TrainedRun, whole: TaskPath, found: Calibration, curve: Curve
) -> dict[str, Any]:
    """One task of a sweep: curve, examples at every budget, usage, first choices of tokens."""
    task = trained.subject.tasks[curve.task]
    given = next(trained.parts.test.batches(EXAMPLES, task.truth))[whole.input.name]
    method, points = next(iter(curve.points.items()))
    routing = jax.device_get(jax.jit(whole.run)(whole.weights, given).routing)
    shape = trained.exporter.picture(given[0]).shape[:2]
    return {
        "kind": "sweep",
        "task": curve.task,
        "metric": curve.metric,
        "lower_is_better": curve.lower_is_better,
        "full": curve.full,
        "methods": [
            {"label": m.label, "points": [_point(p, curve) for p in ps]}
            for m, ps in curve.points.items()
        ],
        "examples": _examples(trained, whole, found, task, given, method, points),
        "usage": [_usage(name, found) for name in whole.layers],
        "patches": [
            {name: _patches(routing[name], i, len(given), shape) for name in whole.layers}
            for i in range(len(given))
        ],
    }


def _point(point: Point, curve: Curve) -> dict[str, Any]:
    loss = point.test["relative_loss"]
    return {
        "keep": point.keep,
        "value": point.test["path"][curve.metric],
        "loss": loss["value"],
        "loss_at_most": loss["at_most"],
        "differ": sweep.differing(point.test)["rate"],
        "coverage": point.test["coverage"],
        "bytes": point.cost["bytes"],
        "flops": point.cost["flops"],
        "ms": point.latency["median_ms"],
        "ms95": point.latency["p95_ms"],
        "batch": point.latency["batch"],
    }


def _examples(
    trained: TrainedRun,
    whole: TaskPath,
    found: Calibration,
    task: Task,
    given: np.ndarray,
    method: Method,
    points: Sequence[Point],
) -> dict[str, Any]:
    """Pictures of the examples, of all experts' predictions, and of those at every budget."""
    cut, kind = method.router == "cut", novices.by_name(method.novice)
    widths = {name: usage.output_ED.shape[1] for name, usage in found.layers.items()}
    trial = Trial(whole, widths, sweep.rank_of(method), cut=cut)
    full = task.postprocess(whole(given).logits)
    at = {}
    for point in points:
        tally = trial.of(point.kept, found, kind)(given)
        prediction = task.postprocess(tally.logits)
        apart = np.asarray(task.prediction.difference(full, prediction))
        lost = np.asarray(tally.violations_BL).sum(axis=1)
        at[str(point.keep)] = [
            {
                "picture": _painted(task, np.asarray(prediction)[i]),
                "differ": float(apart[i]),
                "violations": int(lost[i]),
            }
            for i in range(len(given))
        ]
    return {
        "input": [_png(trained.exporter.picture(example)) for example in given],
        "full": [_painted(task, one) for one in np.asarray(full)],
        "at": at,
    }


def _usage(name: str, found: Calibration) -> dict[str, Any]:
    count_E = np.asarray(found.layers[name].count_E, np.float64)
    return {"layer": name, "share": list(count_E / max(count_E.sum(), 1.0))}


def _patches(routing: Routing, row: int, rows: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """First choices of one example's tokens in the form of its picture."""
    first_T = np.reshape(np.asarray(routing.experts_NK)[:, 0], (rows, -1))[row]
    height, width = grid_of(len(first_T), shape)
    # Tokens before the patches, such as a class token, have no place in the picture.
    shown = first_T[len(first_T) - height * width :]
    return {"grid": [height, width], "first": [int(e) for e in shown]}


def grid_of(tokens: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of patches for a picture of `shape` (height, width); a strip if none fit.

    Up to one token in eight may stand before the patches.
    """
    height, width = shape[:2]
    part = math.gcd(height, width)
    ratio = height // part, width // part
    for patches in range(tokens, tokens - tokens // 8 - 2, -1):
        times, rest = divmod(patches, ratio[0] * ratio[1])
        side = math.isqrt(times)
        if patches > 0 and rest == 0 and side * side == times:
            return ratio[0] * side, ratio[1] * side
    return 1, tokens


def certificate_section(
    certificate: Mapping[str, Any], rows: Sequence[tuple[str, str]], pictures: Mapping[str, Path]
) -> dict[str, Any]:
    """One certificate. rows: its numbers in words.   pictures: files of PNG by title."""
    layers = [
        [
            name,
            layer["kind"],
            layer["decision"],
            f"{len(layer['kept'])} of {layer['experts']}",
            _list(layer["kept"]),
            _widths(layer),
        ]
        for name, layer in certificate["layers"].items()
    ]
    shown = [
        {"title": title, "png": base64.b64encode(file.read_bytes()).decode()}
        for title, file in pictures.items()
    ]
    own = {"rows": [list(row) for row in rows], "layers": layers, "pictures": shown}
    return {"kind": "certificate", "task": certificate["task"], **own}


def _widths(layer: Mapping[str, Any]) -> str:
    """Features inside a layer's experts, before and after."""
    if layer.get("width") is None:
        return "-"
    return f"{layer['hidden'] * layer['experts']:,} to {layer['width']:,}"


def _list(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def _painted(task: Task, prediction: np.ndarray) -> str:
    return _png(task.picture(prediction))


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _rounded(value: Any) -> Any:
    """The same with shorter numbers; what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
