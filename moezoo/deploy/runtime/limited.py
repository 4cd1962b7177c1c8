"""Another process reads what a stranger wrote, with limits of memory and time, and answers in JSON.

Readers of programs are native code: a damaged file can crash them, fill the memory, or keep them
busy for ever. None of that reaches the process that asks. A copy travels in every export.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 120.0  # for one answer
# The process that reads has this one's path of modules, and nothing else of it.
CHILD = "import sys; sys.path[:] = {path!r}; {imported}; {module}.answer()"


class ChildAnswer(NamedTuple):
    """What another process said, and what became of it where it said nothing.

    said: any JSON, None where there is none.   ended: a clause that follows the name of what it
    read ("ends the process that reads it ..."), "" where it said something.
    """

    said: Any
    ended: str = ""


def asked(module: str, given: bytes, seconds: float | None = None) -> ChildAnswer:
    """What `answer()` of a module that lies beside this one prints last, given some bytes.

    seconds: after which it is ended; None: `SECONDS`.
    """
    package = __package__
    imported = f"from {package} import {module}" if package else f"import {module}"
    code = CHILD.format(path=sys.path, imported=imported, module=module)
    seconds = SECONDS if seconds is None else seconds
    # Deterministic and without the accelerator, which this process may already hold.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", code],
            input=given,
            capture_output=True,
            timeout=seconds,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ChildAnswer(None, f"is not read within {seconds:g} s")
    words = done.stdout.decode(errors="replace").strip().splitlines()
    try:
        if done.returncode == 0 and words:
            return ChildAnswer(json.loads(words[-1]))
    except ValueError:  # cut off, or the reader's own words
        pass
    return ChildAnswer(None, f"ends the process that reads it ({_how(done.returncode)})")


def _how(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit {code}"


def hold(more: int, seconds: float = SECONDS) -> None:
    """From now on this process takes at most `more` bytes more, and some seconds of a processor.

    And it writes no file. Memory is address space, as Linux counts it, mapped files included; other
    systems do not say how much there is, and it is not bounded there. The seconds count also when
    nobody is left who would end this process.
    """
    try:
        import resource
    except ImportError:  # Windows, which has other means
        return
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * os.sysconf("SC_PAGE_SIZE") + more
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with suppress(OSError, ValueError):  # a system that has no such limit
            resource.setrlimit(kind, (wanted, wanted))
