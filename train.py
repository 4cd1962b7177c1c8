"""Train a system: `python train.py [CONFIG] [--section.option VALUE ...]`.

Without arguments it trains configs/rooms/m3vit_tiny.py. `--help` lists every option.
"""

from __future__ import annotations

import sys

from moezoo.command import restart_with_huge_pages
from moezoo.errors import run_command

DEFAULT = "rooms/m3vit_tiny"


def main() -> int:
    """Read the configuration, train, write report and pictures."""
    from moezoo.train import config as configs
    from moezoo.train import together
    from moezoo.train.console import Console
    from moezoo.train.loop import Interrupted, train
    from moezoo.train.mesh import initialise_distributed
    from moezoo.train.outcome import write_outcome

    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT
    config = configs.load(name, arguments)
    with together.ending():
        initialise_distributed(config.hosts)
        console = Console()
        try:
            finished = train(config, console)
        except Interrupted as stopped:
            console.say(str(stopped))
            return 130
        write_outcome(finished, console)
    return 0


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(main)
