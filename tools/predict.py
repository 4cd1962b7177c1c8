"""Predict one photo or recording with an exported folder; no model is built.

Example: python tools/predict.py exports/depth photo.jpg --out picture.png
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moezoo.command import Positional, parse
from moezoo.errors import UserError, run_command


@dataclass(frozen=True)
class Arguments:
    """Predict one photo or recording with an exported folder; no model is built.

    Example: python tools/predict.py exports/depth photo.jpg --out picture.png
    """

    export: Annotated[Path, Positional]
    """Folder that tools/export.py or tools/prune.py wrote."""
    image: Annotated[Path, Positional]
    """A PNG or JPEG file of any size, or a recording, depending on the export."""
    out: Path = Path("picture.png")
    """The picture to write, as large as the image."""
    arrays: Path | None = None
    """Also write the numbers behind the picture to this npz file."""
    seconds: float = 600.0
    """Give up after this many seconds; nothing else stops the program of an export."""


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an npz file without pickles, whole or not at all."""
    import numpy as np

    from moezoo.train.files import write_atomically

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def main() -> int:
    """Load the export, predict, write the picture."""
    from moezoo.deploy.runtime import load, programs
    from moezoo.train.files import check_file

    a = parse(Arguments, sys.argv[1:], prog="tools/predict.py")
    if a.arrays is not None and a.arrays.resolve() == a.out.resolve():
        raise UserError(f"--out and --arrays are both {a.out}: name two files.")
    for option, file in (("--out", a.out), ("--arrays", a.arrays)):
        if file is None:
            continue
        if file.resolve() == a.image.resolve():
            raise UserError(f"{option} is {file}, which is to be predicted: name another file.")
        inside = a.export.resolve() in file.resolve().parents
        if inside and (a.export / "manifest.json").is_file():
            raise UserError(f"{option} is {file}, a file of the export: name one elsewhere.")
    for file in (a.out, a.arrays):
        check_file(file)
    try:
        with programs.at_most(a.seconds):
            predictor = load.load_export(a.export)
            outputs = load.predict_file(predictor, a.image, a.out)
    except load.ExportError as error:
        raise UserError(str(error)) from error
    if a.arrays is not None:
        write_arrays(a.arrays, outputs)
    kind = predictor.manifest["task"]
    missing = int(outputs["violations"][0])
    said = load.words(predictor.manifest, outputs["prediction"][0])
    note = f"{missing} violations (tokens that asked for a removed expert)"
    print(f"{a.out}: {kind['name']} of {a.image}: {said}; {note}")
    return 0


if __name__ == "__main__":
    run_command(main)
