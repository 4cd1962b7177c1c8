"""Rendering in several processes.

Each worker is a fresh interpreter that runs this module and writes pickled records to its standard
output. The caller's main script need not be imported, so it works from scripts, notebooks and
tests.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moezoo.domains.images.data.rooms.render import render_record
from moezoo.errors import UserError


@dataclass(frozen=True)
class Job:
    """The examples start, start + stride, ... below `count` of one split."""

    seed: int
    split: str
    height: int
    width: int
    count: int
    start: int = 0
    stride: int = 1

    def run(self) -> Generator[dict[str, Any]]:
        """Render the examples of this job in order."""
        for index in range(self.start, self.count, self.stride):
            yield render_record(self.seed, self.split, index, self.height, self.width)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(job: Job) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[5])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable,
        "-m",
        "moezoo.domains.images.data.rooms.workers",
        json.dumps(asdict(job)),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=env)


def render_all(job: Job, processes: int | None = None) -> Generator[dict[str, Any]]:
    """Records of a whole split in order, rendered by `processes` workers (default: all cores).

    Raises UserError if a worker dies.
    """
    processes = min(processes or cores(), max(job.count // 8, 1))
    if processes == 1:
        yield from job.run()
        return
    shares = [replace(job, start=k, stride=processes) for k in range(processes)]
    workers = [_start(share) for share in shares]
    try:
        for index in range(job.count):
            worker = workers[index % processes]
            assert worker.stdout is not None
            try:
                yield pickle.load(worker.stdout)
            except (EOFError, pickle.UnpicklingError):
                code = worker.wait()
                raise UserError(
                    f"A rendering process ended with exit code {code} (out of memory?); run again."
                ) from None
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()


def main() -> None:
    """Run one job; only the parent reacts to Ctrl-C, and a closed pipe ends the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = sys.stdout.buffer
    try:
        for item in Job(**json.loads(sys.argv[1])).run():
            pickle.dump(item, out, pickle.HIGHEST_PROTOCOL)
            out.flush()
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
