"""The command `moezoo`: the first word says what to do, the rest belongs to that.

    moezoo list                                     models, and which have weights
    moezoo predict rooms/m3vit_tiny photo.jpg       pictures of all tasks, in seconds
    moezoo train rooms/m3vit_tiny --train.steps 200

`python -m moezoo`, `python train.py` and `python tools/<command>.py` are the same.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from moezoo.early import hold_interrupts, quiet_interrupts, restart_with_huge_pages

# By what one does with them, in this order; what each is for stands in its module's first line.
COMMANDS = {
    "list": "catalogue",
    "info": "describe",
    "predict": "predict",
    "generate": "generate",
    "check": "check",
    "train": "train",
    "launch": "launch",
    "evaluate": "evaluate",
    "prune": "prune",
    "export": "export",
    "verify": "verify",
    "adapter": "adapter",
    "library": "library",
    "encoders": "encoders",
    "save": "save",
    "interference": "interference",
    "plan": "plan",
    "bench": "bench",
    "completion": "completion",
}


def summary(command: str) -> str:
    """What a command is for, in one sentence."""
    module = import_module(f"moezoo.cli.{COMMANDS[command]}")
    return (module.__doc__ or "").splitlines()[0]


def usage() -> str:
    """The help of `moezoo` by itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary(name)}" for name in COMMANDS]
    return (
        "usage: moezoo COMMAND ...\n\nA mixture-of-experts model zoo for multi-task learning on "
        "JAX.\n\n" + "\n".join(lines) + "\n\nmoezoo COMMAND --help says more of one."
    )


def run(command: str, prog: str) -> NoReturn:
    """Run one command with the words of this process behind it, and end the program."""
    if command == "train":
        hold_interrupts()  # until `run_command` answers them
        restart_with_huge_pages()
    with quiet_interrupts():
        from moezoo.errors import run_command

        main_of = import_module(f"moezoo.cli.{COMMANDS[command]}").main
    words = sys.argv[1:]
    run_command(lambda: main_of(words, prog))


def main() -> NoReturn:
    """Run the command that the first word names."""
    from moezoo.errors import UserError, run_command, unknown

    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("", "-h", "--help"):
        print(usage())
        sys.exit(0 if command else 2)
    if command in ("-V", "--version"):
        from moezoo import __version__

        print(f"moezoo {__version__}")
        sys.exit(0)
    if command not in COMMANDS:

        def refuse() -> int:
            if command.startswith("-"):
                raise UserError(f"'{command}' is no command: moezoo --help lists them.")
            raise unknown("command", command, list(COMMANDS))

        run_command(refuse)
    del sys.argv[1]
    run(command, f"moezoo {command}")
