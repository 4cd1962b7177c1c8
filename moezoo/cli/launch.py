"""Start a run as several processes: here, on a Slurm cluster, a TPU pod or Kubernetes.

Example: moezoo launch local rooms/m3vit_tiny --processes 2 --devices 4 --dry-run
"""

from __future__ import annotations


def main(words: list[str], prog: str) -> int:
    """Check everything, then print the plan (--dry-run) or carry it out."""
    from moezoo.launch.command import run

    return run(words, prog)
