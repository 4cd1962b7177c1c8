"""Ctrl-C in the first moments of a command, and while modules are imported.

Imports next to nothing, so that a command can have it before anything else.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

AGAIN = 0.05  # seconds until an interrupt that came at a bad moment is tried again
# Where an exception is lost, or leaves compiled modules half made: imports, garbage collection.
IMPORTS, COLLECTIONS = "<frozen importlib", "_xla_gc_callback"


class quiet_interrupts:  # noqa: N801 - used like a function
    """Let Ctrl-C end the program at once and without a traceback for the time of a block.

    For imports at the head of a command, where nothing catches it yet. Nothing happens where
    Ctrl-C is handled in another way than Python's own, and in other threads.
    """

    def __enter__(self) -> None:
        self.ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            if self.ours:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        except ValueError:  # not the main thread
            self.ours = False

    def __exit__(self, *error: object) -> None:
        if self.ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def hold_interrupts() -> None:
    """Keep Ctrl-C back until `answer_interrupts`, also over a restart of the program."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def answer_interrupts() -> None:
    """From here on Ctrl-C is KeyboardInterrupt, at the next good moment.

    It waits for the end of an import. One that was kept back is answered now. Nothing happens in
    other threads than the main one, and where Ctrl-C was not Python's own.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, _interrupt)
        except ValueError:  # not the main thread
            return
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def leave_interrupts() -> None:
    """The end of what `answer_interrupts` began: Python's own handling, and nothing kept back."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _is_bad_moment(frame) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        return
    raise KeyboardInterrupt


def _is_bad_moment(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(IMPORTS) or code.co_name == COLLECTIONS:
            return True
        frame = frame.f_back
    return False


def restart_with_huge_pages() -> None:
    """Replace this process by the same program with glibc asking for huge pages.

    XLA on a CPU takes and returns large buffers in every step; faulting them in page by page was a
    quarter of the time of a training step. glibc reads the setting when a process starts. Nothing
    happens off Linux and where GLIBC_TUNABLES is set, by the user or by this.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
