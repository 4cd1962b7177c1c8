"""A run that does not move says so, with what every thread of every process is doing.

Each process watches itself: where one of them hangs, the others come to a stand in the next
exchange between devices, and all of them speak up within the same time.
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType


def stacks() -> str:
    """What every thread of this process is doing, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:  # a place with a number, which this needs
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def to_stderr(text: str) -> None:
    """Where errors go."""
    print(text, file=sys.stderr, flush=True)


class HangWatch:
    """Tells where nothing was done for `seconds`, once each time; a context manager.

    name: how this process calls itself.   seconds: 0 for never.
    """

    def __init__(
        self, name: str, seconds: float, say: Callable[[str], None] = to_stderr, look: float = 5.0
    ):
        self._name, self._seconds, self._say, self._look = name, seconds, say, look
        self._beat, self._doing, self._told = time.monotonic(), "starting", False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hang watch")

    def beat(self, doing: str) -> None:
        """Something is done; `doing` is what comes next, as in "doing step 7"."""
        self._beat, self._doing, self._told = time.monotonic(), doing, False

    def __enter__(self) -> HangWatch:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(self._look, self._seconds / 4)):
            quiet = time.monotonic() - self._beat
            if quiet > self._seconds and not self._told:
                self._told = True
                self._say(
                    f"{self._name} has been {self._doing} for {quiet:.0f} s (log.hang is "
                    f"{self._seconds:g}); it goes on waiting. What its threads do:\n{stacks()}"
                )
