"""Train a system, or go on with a run: CONFIG [--section.option VALUE ...], --resume FOLDER.

Without arguments it trains configs/rooms/m3vit_tiny.py. `moezoo train CONFIG --help` lists every
option of that configuration. `moezoo train --resume FOLDER [--section.option VALUE ...]` resumes a
run as it was configured; options given there change from that point on.
"""

from __future__ import annotations

DEFAULT = "rooms/m3vit_tiny"
START = ("--start-from", "--start_from")


def configured(arguments: list[str], prog: str = "moezoo train") -> tuple:
    """The configuration, the settings of a resumed run that the arguments change, and its file."""
    from moezoo.train import config_file, resume, start

    name, folder, words = resume.split(arguments)
    if folder is not None:
        return *resume.continued(folder, words), None
    config = config_file.load(name or DEFAULT, words, prog=prog)
    if any(word.partition("=")[0] in START for word in words):
        start.check_named(config)
    return config, frozenset(), config_file.find(name or DEFAULT, config_file.FOLDERS)


def main(words: list[str], prog: str) -> int:
    """Read the configuration, train, write the report and the pictures."""
    from moezoo.train import agree, together
    from moezoo.train.console import Console
    from moezoo.train.join import initialise_distributed
    from moezoo.train.loop import Interrupted, train
    from moezoo.train.report import write_report

    config, explicit, file = configured(words, prog)
    with together.ending():
        initialise_distributed(config.hosts, settings=agree.settings(config))
        console = Console()
        try:
            finished = train(config, console, explicit, file)
        except Interrupted as stopped:
            console.say(str(stopped))
            return 130
        write_report(finished, console)
    return 0
