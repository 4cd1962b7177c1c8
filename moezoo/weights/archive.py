"""Zip archives of arrays, from anyone: their directory is checked before a part is unpacked."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from moezoo import regular
from moezoo.schema_check import FormatFault

MOST_ARRAYS = 100_000
# Weights hardly deflate. An archive that says it grows more than this is none of weights, and
# could fill the memory.
GROWTH, ALWAYS = 8, 64 * regular.MB


def check_parts(infos: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """FormatFault for an archive that is none of weights: too many parts, too large ones."""
    if len(infos) > MOST_ARRAYS:
        raise FormatFault(f"it has {len(infos):,} parts")
    for info in infos:
        # Others are unpacked without bounds.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatFault(
                f"it is packed by method {info.compress_type}, which is not read here"
            )
    check_growth(sum(info.file_size for info in infos), path)


def check_growth(grown: int, path: Path) -> None:
    """FormatFault where a file says that it holds so many bytes, far more than its size."""
    size = path.stat().st_size
    if grown > max(ALWAYS, GROWTH * size):
        raise FormatFault(
            f"its {size / 1e6:.1f} MB would grow to {grown / 1e6:,.0f} MB, which no weights do"
        )
