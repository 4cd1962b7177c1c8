"""The first moments of a command, before anything heavy is imported.

Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the program at once and without a traceback for the time of the block.

    For imports at the head of a command, where nothing catches it yet. Nothing happens where
    Ctrl-C is handled in another way than Python's own, and in other threads.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def restart_with_huge_pages() -> None:
    """Replace this process by the same program with glibc asking for huge pages.

    XLA on a CPU takes and returns large buffers in every step; faulting them in page by page was a
    quarter of the time of a training step. glibc reads the setting when a process starts. Nothing
    happens off Linux and where GLIBC_TUNABLES is set, by the user or by this.

    Ctrl-C waits until the new program answers it (`take_interrupts`), so that it does not meet
    Python half started.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def take_interrupts() -> None:
    """Answer a Ctrl-C that came before a restart was over, by KeyboardInterrupt."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
