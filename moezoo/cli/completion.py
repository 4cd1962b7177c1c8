"""Print a script that completes `moezoo ...` with the tab key, for bash, zsh or tcsh.

Example: moezoo completion bash > ~/.local/share/bash-completion/completions/moezoo
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Union

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

    from moezoo.train.overrides import MARKERS

    kinds = [kind for name in COMMANDS if (kind := _shown(name)) is not None]
    asked = ["--tyro-print-completion", given.shell]
    every: Any = Union[tuple(kinds)]  # noqa: UP007 - of what is only known now
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(every, args=asked, prog="moezoo", use_underscores=True, config=MARKERS)
    # Where there is nothing to offer, files are completed as ever.
    print(
        re.sub(
            r"^complete -F", "complete -o bashdefault -o default -F", written.getvalue(), flags=re.M
        )
    )


def _shown(command: str) -> Any:
    """What a command takes, as one of tyro's subcommands; None where its first word decides."""
    import tyro

    if command == "train":
        # The options of the default configuration: others' differ in those of their own system.
        from moezoo.cli.train import DEFAULT
        from moezoo.train.config_file import load
        from moezoo.train.overrides import shown

        config = shown(load(DEFAULT))
        return Annotated[type(config), tyro.conf.subcommand(command, default=config)]
    module = import_module(f"moezoo.cli.{COMMANDS[command]}")
    kind = getattr(module, f"{COMMANDS[command].capitalize()}Command", None)
    return None if kind is None else Annotated[kind, tyro.conf.subcommand(command)]
