"""A contact sheet of a source: pictures beside their labels.

python -m moezoo.domains.images.data.preview --out rooms.png --count 8
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from moezoo.data.fit import fit
from moezoo.data.source import Info, Source, SourceExample
from moezoo.domains.images.data.padding import pad
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.errors import UserError, run_command

_DEPTH = np.array(  # near to far: yellow, green, blue, violet
    [[253, 231, 37], [94, 201, 98], [33, 145, 140], [59, 82, 139], [68, 1, 84]], float
)


@dataclass(frozen=True)
class Preview:
    """Write a contact sheet of a data set as a PNG file."""

    out: Path
    """Picture to write."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    split: str = "test"
    """Split to show."""
    count: int = 8
    """Number of examples, one per row."""


def colours(name: str, values: np.ndarray, info: Info) -> np.ndarray:
    """One label map or image as uint8 [H,W,3]."""
    if name == "image":
        return values
    kind = info.kinds[name]
    if kind.form == "value":
        known = kind.known(values) & np.isfinite(values)
        low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 1.0)
        place = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * (len(_DEPTH) - 1)
        channels = [np.interp(place, np.arange(len(_DEPTH)), c) for c in _DEPTH.T]
        return np.where(known[..., None], np.stack(channels, -1), 0).astype(np.uint8)
    if kind.form == "vector":
        shown = values[..., :3] / max(1.0, float(np.abs(values).max()))
        shown = np.pad(shown, ((0, 0), (0, 0), (0, 3 - shown.shape[-1])))
        return np.round((shown + 1) * 127.5).astype(np.uint8)
    if name in info.labels:
        palette = np.zeros((np.iinfo(kind.type).max + 1, 3), np.uint8)
        palette[: info.labels[name].classes] = info.labels[name].palette
        return palette[values]
    return np.repeat((values == 1)[..., None] * np.uint8(255), 3, axis=-1)


def strip(example: SourceExample, info: Info) -> np.ndarray:
    """An example's image and label maps side by side, uint8 [H, W * (1 + tasks), 3].

    Examples from archives are centred in the size of batches, on black.
    """
    example, names = fit(example, info), ("image", *info.maps)
    shown = [pad(colours(name, example[name], info), info.resolution, 0) for name in names]
    return np.concatenate(shown, axis=1)


def contact_sheet(source: Source, indices: Sequence[int]) -> np.ndarray:
    """Strips of several examples, one below the other."""
    return np.concatenate([strip(source[i], source.info) for i in indices], axis=0)


def main(preview: Preview) -> None:
    """Write the sheet, enlarged to a readable size if the images are small.

    Raises UserError if the file cannot be written.
    """
    if not preview.out.name or preview.out.is_dir():
        raise UserError(f"Cannot write '{preview.out}': it is a folder; name a file in it.")
    source = open_source(preview.data, preview.split)
    sheet = contact_sheet(source, range(min(preview.count, len(source))))
    zoom = max(1, 128 // preview.data.resolution[1])
    picture = Image.fromarray(sheet).resize(
        (sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.Resampling.NEAREST
    )
    temporary = preview.out.with_name(preview.out.name + ".tmp")
    try:
        picture.save(temporary, "PNG")
        temporary.replace(preview.out)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"Cannot write '{preview.out}': {reason}.") from error
    finally:
        with contextlib.suppress(OSError):  # it would hide why the writing failed
            temporary.unlink()
    print(f"{preview.out}: image, {', '.join(source.info.maps)}")


if __name__ == "__main__":
    import tyro

    run_command(lambda: main(tyro.cli(Preview)))
