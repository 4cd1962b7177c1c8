"""Predict photos or recordings with a model of the zoo, a run, or an exported folder.

Example: moezoo predict rooms/m3vit_tiny photo.jpg --out picture.png
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moezoo.command import WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class PredictCommand:
    """Predict photos or recordings with a model of the zoo, a run, or an exported folder.

    The picture has a row per file: the file, every task, and below them what the colours mean. An
    export, and --plain, give the painted prediction alone, as large as the file's picture.

    Example: moezoo predict rooms/m3vit_tiny photo.jpg --task depth

    Example: moezoo predict exports/depth photo.jpg --out picture.png

    Example: moezoo predict rooms/m3vit_tiny photo.jpg --stream
    """

    model: Annotated[Path, Positional, WITH_WEIGHTS]
    """Name of a model with weights (moezoo list --pretrained), or folder of a run, a saved model
    or an export."""
    files: Annotated[tuple[Path, ...], Positional]
    """PNG or JPEG files of any size, or recordings, depending on the model."""
    task: str | None = None
    """Only this task; default: all that the model has."""
    out: Path = Path("picture.png")
    """The picture to write."""
    plain: bool = False
    """Paint one task of one file alone, as large as the file's picture."""
    arrays: Path | None = None
    """Also write the predictions behind the picture to this npz file."""
    stream: bool = False
    """Leave the experts in the model's file and read them one by one: two are in memory at a time.
    A run's weights are first written to a temporary file."""
    verbose: bool = False
    """Also say how experts are computed on this machine."""
    seconds: float = 600.0
    """Give up after this many seconds; nothing else stops the program of an export."""


def main(words: list[str], prog: str) -> int:
    """Load the model, predict, write the picture."""
    from moezoo.deploy.runtime import programs
    from moezoo.deploy.runtime.forms import ExportError
    from moezoo.deploy.runtime.load import Predictor
    from moezoo.front.build import load, streamed
    from moezoo.ops.grouped import speak_of_choices

    a = parse(PredictCommand, words, prog=prog)
    _check(a)
    if a.verbose:
        speak_of_choices()
    try:
        with programs.at_most(a.seconds):
            model = (streamed if a.stream else load)(a.model)
            ask = _ask_export if isinstance(model, Predictor) else _ask_model
            arrays = ask(model, a)
    except ExportError as error:
        raise UserError(str(error)) from error
    if a.arrays is not None:
        write_arrays(a.arrays, arrays)
    return 0


def _check(a: PredictCommand) -> None:
    """UserError for files that would replace each other, what is predicted, or an export's own."""
    from moezoo.files import check_file
    from moezoo.train.zoo import located

    # Not Path.resolve(), to which a link that leads to itself is an error without a sentence.
    if a.arrays is not None and os.path.realpath(a.arrays) == os.path.realpath(a.out):
        raise UserError(f"--out and --arrays are both {a.out}: name two files.")
    model = Path(os.path.realpath(located(a.model)))
    for option, file in (("--out", a.out), ("--arrays", a.arrays)):
        if file is None:
            continue
        place = Path(os.path.realpath(file))
        if any(str(place) == os.path.realpath(given) for given in a.files):
            raise UserError(f"{option} is {file}, which is to be predicted: name another file.")
        # Of exports, saved models, runs and Hugging Face folders; another one is told as such.
        known = any((model / n).is_file() for n in ("manifest.json", "model.json", "config.json"))
        if model in place.parents and known:
            raise UserError(
                f"{option} is {file}, which lies in the folder of the model: name a file elsewhere."
            )
    for file in (a.out, a.arrays):
        check_file(file)


def _ask_export(predictor: Any, a: PredictCommand) -> Mapping[str, Any]:
    from moezoo.deploy.runtime import load

    kind = predictor.manifest["task"]
    if a.task not in (None, kind["name"]):
        raise UserError(f"--task is {a.task}, but {a.model} predicts {kind['name']}: leave it out.")
    if len(a.files) != 1:
        raise UserError(
            f"An export paints one file at a time: name one of the {len(a.files)}, or a run."
        )
    (file,) = a.files
    outputs = load.predict_file(predictor, file, a.out)
    missing = int(outputs["violations"][0])
    said = load.words(predictor.manifest, outputs["prediction"][0])
    note = f"{missing} violations (tokens that asked for a removed expert)"
    print(f"{a.out}: {kind['name']} of {file}: {said}; {note}")
    return outputs


def _ask_model(model: Any, a: PredictCommand) -> Mapping[str, Any]:
    from moezoo.front import sheet

    tasks = model.tasks if a.task is None else (a.task,)
    if a.plain and (len(a.files), len(tasks)) != (1, 1):
        raise UserError("--plain is for one file and one task: add --task, or leave it out.")
    shown = sheet.predicted(model, a.files, tasks)
    (sheet.draw_plain if a.plain else sheet.draw)(shown, a.out)
    for file, row in zip(a.files, shown.said, strict=True):
        for task, words in row.items():
            print(f"{a.out}: {task} of {file}: {words}")
    return shown.arrays


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an npz file without pickles, whole or not at all."""
    import numpy as np

    from moezoo.files import write_atomically

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())
