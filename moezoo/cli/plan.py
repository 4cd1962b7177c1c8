"""Compile a configuration's training step for a TPU pod, on a machine that has no TPU.

Example: moezoo plan rooms/m3vit_tiny --topology v5e:2x4 --mesh.expert 4
"""

from __future__ import annotations

import os


def main(words: list[str], prog: str) -> int:
    """Compile the step; print what a chip holds, computes and sends, and whether it fits."""
    # Before JAX is imported: with libtpu installed it would look for a TPU on this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from moezoo.planning.command import run

    return run(words)
