"""Processes that belong together: all are started, watched, told of signals, and all end.

What each prints goes to a file of its own; what the first one prints is shown. When one fails the
others have a moment to end by themselves, with a sentence of their own, before they are made to.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from moezoo.errors import UserError
from moezoo.launch.job import Command
from moezoo.train import together

LOOK = 0.05  # seconds between two looks at the processes
# Seconds for the others after one has failed, then for those that were asked to end.
OTHERS, ASKED = 30.0, 10.0
LINES = 30  # of a log that are shown
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
NAMED = re.compile(together.HEARD_OF.format(r"(\d+)", ""))
PDEATHSIG = 1  # of Linux's prctl


class Stream:
    """Shows what is added to a file, from its beginning, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def skip(self) -> None:
        """Leave out what the file holds already."""
        with contextlib.suppress(OSError):
            self._at = self._path.stat().st_size

    def show(self) -> None:
        """Print what is new."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._at)
            new = file.read()
            self._at += len(new)
            if new:
                sys.stdout.write(new.decode(errors="replace"))
                sys.stdout.flush()


class Signals:
    """Ctrl-C and SIGTERM as numbers to be asked for, for the time of a block."""

    def __init__(self) -> None:
        self._new: list[int] = []
        self.seen = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._new.append(number)
        self.seen += 1

    def take(self) -> list[int]:
        """Those since the last question."""
        found, self._new = self._new, []
        return found


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Collect Ctrl-C and SIGTERM instead of ending the program."""
    held = Signals()
    before = {number: signal.signal(number, held) for number in PASSED_ON}
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def code_of(returned: int) -> int:
    """An exit code as shells give it: 128 and the signal's number for one that was killed."""
    return 128 - returned if returned < 0 else returned


def first_to_fail(order: Sequence[int], log: Callable[[int], Path]) -> int:
    """The process that failed first.

    order: those that failed, as they ended. One that ends because of another says which: the other
    may still be waiting until all have heard of it.
    """
    found = NAMED.search(tail(log(order[0])))
    named = int(found[1]) if found else order[0]
    return named if log(named).exists() else order[0]


def tail(path: Path, lines: int = LINES) -> str:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 400 * lines))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def report(index: int, code: int, log: Path) -> int:
    """Show how the process ended that failed first; its exit code."""
    print(f"Process {index} failed first, with exit code {code}. The end of {log}:")
    print(tail(log), flush=True)
    return code


def _with_parent(parent: int) -> None:
    """End this process when the launcher is killed, which could not tell it so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it is gone already
            os._exit(1)


class Group:
    """Processes that were started together; `logs` has a file for each, `0.log` and so on."""

    def __init__(self, commands: Sequence[Command], logs: Path) -> None:
        self.logs = logs
        self.order: list[int] = []  # of those that failed, as they ended
        self.members: list[subprocess.Popen[bytes]] = []
        parent = os.getpid()
        try:
            logs.mkdir(parents=True, exist_ok=True)
            for index, command in enumerate(commands):
                with self.log(index).open("wb") as file:
                    self.members.append(
                        subprocess.Popen(
                            command.words,
                            env=os.environ | dict(command.env),
                            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                            # Ctrl-C in a terminal would reach them twice otherwise.
                            start_new_session=True,
                            preexec_fn=lambda: _with_parent(parent),
                        )
                    )  # fmt: skip
        except OSError as error:
            self.send(signal.SIGKILL)
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise UserError(f"Could not start the processes ({what}); nothing runs.") from error

    def log(self, index: int) -> Path:
        """The file with what a process prints."""
        return self.logs / f"{index}.log"

    def alive(self) -> list[int]:
        """Those that run; those that have failed since are noted."""
        running = []
        for index, member in enumerate(self.members):
            if member.poll() is None:
                running.append(index)
            elif member.returncode != 0 and index not in self.order:
                self.order.append(index)
        return running

    def send(self, number: int) -> None:
        """A signal to all that run, and to whatever they started."""
        for member in self.members:
            if member.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if number == signal.SIGKILL:
                        os.killpg(member.pid, number)
                    else:
                        member.send_signal(number)

    def wait(self, held: Signals) -> int:
        """Show what the first prints until all have ended; the run's exit code."""
        stream, until, asked = Stream(self.log(0)), None, False
        while self.alive():
            stream.show()
            for number in held.take():
                # Who insists for the third time does not want to wait.
                self.send(number if held.seen < 3 else signal.SIGKILL)
            now = time.monotonic()
            if self.order and until is None:
                until = now + OTHERS
            elif until is not None and now > until:
                self.send(signal.SIGKILL if asked else signal.SIGTERM)
                until, asked = now + ASKED, True
            time.sleep(LOOK)
        stream.show()
        if not self.order:
            return 0
        if held.seen:  # not a failure: they were asked to end
            return code_of(self.members[self.order[0]].returncode)
        first = first_to_fail(self.order, self.log)
        # Named by another one, it may itself have ended well.
        code = code_of(self.members[first].returncode if first < len(self.members) else 1)
        return report(first, code or 1, self.log(first))


def run_all(commands: Sequence[Command], logs: Path) -> int:
    """Run commands side by side until all have ended; the exit code of the first that failed."""
    with signals() as held:
        group = Group(commands, logs)
        try:
            return group.wait(held)
        finally:
            group.send(signal.SIGKILL)
            for member in group.members:
                member.wait()
