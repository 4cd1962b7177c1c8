"""Print a script that completes `moezoo ...` with the tab key, for bash, zsh or tcsh.

Example: moezoo completion bash > ~/.local/share/bash-completion/completions/moezoo
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

from moezoo.cli.entry import COMMANDS
from moezoo.command import Positional, parse


@dataclass(frozen=True)
class CompletionCommand:
    """Print a script that completes `moezoo ...` with the tab key.

    Example: moezoo completion bash > ~/.local/share/bash-completion/completions/moezoo
    """

    shell: Annotated[Literal["bash", "zsh", "tcsh"], Positional]
    """The shell that will read it."""


def main(words: list[str], prog: str) -> None:
    """Print the script."""
    given = parse(CompletionCommand, words, prog=prog)
    import tyro

    kinds = {name: kind for name in COMMANDS if (kind := _arguments(name)) is not None}
    asked = ["--tyro-print-completion", given.shell]
    tyro.extras.subcommand_cli_from_dict(kinds, args=asked, prog="moezoo", use_underscores=True)


def _arguments(command: str) -> Any:
    """What a command takes, as a dataclass; None for one whose options its words decide."""
    if command == "train":
        from moezoo.cli.train import DEFAULT
        from moezoo.train.config_file import load

        return type(load(DEFAULT))
    module = import_module(f"moezoo.cli.{COMMANDS[command]}")
    return getattr(module, f"{COMMANDS[command].capitalize()}Command", None)
