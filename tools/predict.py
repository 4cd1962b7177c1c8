"""Predict one image with an exported folder; no model is built.

Example: python tools/predict.py exports/depth photo.jpg --out picture.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moezoo.command import parse
from moezoo.errors import UserError, run_command


@dataclass(frozen=True)
class Arguments:
    """Predict one image or sound with an exported folder; no model is built.

    Example: python tools/predict.py exports/depth photo.jpg --out picture.png
    """

    export: Annotated[Path, tyro.conf.Positional]
    """Folder that tools/export.py or tools/prune.py wrote."""
    image: Annotated[Path, tyro.conf.Positional]
    """A PNG or JPEG file of any size, or a sound, as the export reads."""
    out: Path = Path("picture.png")
    """The picture to write, as large as the image."""
    arrays: Path | None = None
    """Also write the numbers behind the picture to this npz file."""


def main() -> int:
    """Load, predict, paint."""
    import numpy as np

    from moezoo.deploy import load

    a = parse(Arguments, sys.argv[1:], prog="tools/predict.py")
    try:
        predictor = load.load_export(a.export)
        outputs = load.predict_file(predictor, a.image, a.out)
        if a.arrays is not None:
            np.savez(a.arrays, allow_pickle=False, **outputs)
    except load.ExportError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"Cannot write {a.arrays}: {error.strerror}.") from error
    kind = predictor.manifest["task"]
    missing = int(outputs["violations"][0])
    said = load.words(predictor.manifest, outputs["prediction"][0])
    print(f"{a.out}: {kind['name']} of {a.image}: {said}; {missing} violations")
    return 0


if __name__ == "__main__":
    run_command(main)
