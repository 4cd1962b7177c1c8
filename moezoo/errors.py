"""The one exception that commands turn into a sentence and exit code 2."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NoReturn

from moezoo.early import answer_interrupts, leave_interrupts


class UserError(Exception):
    """Bad input from outside: says what is wrong, where, and what to do, in one sentence."""


def unknown(kind: str, name: str, known: list[str]) -> UserError:
    """The error for a name that is not in `known`, with the nearest names."""
    near = get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}."
    return UserError(f"Unknown {kind} '{name}': {hint}")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main`; a UserError becomes one line on stderr and exit code 2."""
    try:
        answer_interrupts()
        code = _flushed(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `... | head`: nobody reads on, which is no fault of the command's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    finally:
        leave_interrupts()
    # What is left are others' exit handlers, which know no Ctrl-C.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _flushed(main: Callable[[], int | None]) -> int | str:
    """The code of `main`, or of the exit it asks for (as `--help`), when all is written out."""
    try:
        code: int | str = main() or 0
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    return code
