"""Compile a configuration's training step for a TPU pod, on a machine that has no TPU.

Example: python tools/plan.py rooms/m3vit_tiny --topology v5e:2x4 --mesh.expert 4
"""

from __future__ import annotations

import os
import sys

from moezoo.errors import run_command


def main() -> int:
    """Compile the step; print what a chip holds, computes and sends, and whether it fits."""
    # Before JAX is imported: with libtpu installed it would look for a TPU on this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from moezoo.planning.command import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
