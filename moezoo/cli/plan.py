"""Say what a chip of a pod would hold, compute and send in a step, on a machine that has none.

Example: moezoo plan rooms/m3vit_tiny --topology v5e:2x4 --mesh.expert 4
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moezoo.command import CONFIGURATIONS, Positional


@dataclass(frozen=True)
class PlanOptions:
    """What there is besides the options of `train`; `planning.command` takes them from the rest."""

    config: Annotated[str, Positional, CONFIGURATIONS]
    """A configuration, for example rooms/m3vit_tiny."""
    topology: str
    """The pod, for example v5p:8x8x8 or v6e:16x16, or GPUs, for example h100:8."""
    step: Literal["train", "evaluation"] = "train"
    """Which step."""
    source: Literal["compiled", "shapes"] | None = None
    """compiled: the default for TPUs; shapes: in seconds, without a compiler."""
    search: bool = False
    """Rank all sizes of data, fsdp and expert."""
    json: Path | None = None
    """Also write the numbers to this file."""
    picture: Path | None = None
    """Also draw memory and times."""


def main(words: list[str], prog: str) -> int:
    """Print what a chip holds, computes and sends, how fast it can be, and whether it fits."""
    # Before JAX is imported: with libtpu installed it would look for a TPU on this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from moezoo.planning.command import run

    return run(words)
