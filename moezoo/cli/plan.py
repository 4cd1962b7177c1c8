"""Compile a configuration's training step for a TPU pod, on a machine that has no TPU.

Example: moezoo plan rooms/m3vit_tiny --topology v5e:2x4 --mesh.expert 4
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moezoo.command import CONFIGURATIONS, Positional


@dataclass(frozen=True)
class PlanOptions:
    """What there is besides the options of `train`; `planning.command` takes them from the rest."""

    config: Annotated[str, Positional, CONFIGURATIONS]
    """A configuration, for example rooms/m3vit_tiny."""
    topology: str
    """The pod, for example v5p:8x8x8 or v6e:16x16."""
    json: Path | None = None
    """Also write the numbers to this file."""


def main(words: list[str], prog: str) -> int:
    """Compile the step; print what a chip holds, computes and sends, and whether it fits."""
    # Before JAX is imported: with libtpu installed it would look for a TPU on this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from moezoo.planning.command import run

    return run(words)
