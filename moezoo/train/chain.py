"""Runs that begin with what another configuration learns, which is trained first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezoo.data.text.config import TextDataConfig
from moezoo.errors import UserError
from moezoo.train import config_file
from moezoo.train.schema import Config
from moezoo.train.console import Console
from moezoo.train.resume import finished

Train = Callable[..., Any]  # of a configuration, a console and `file`


def with_start(config: Config, console: Console, train: Train) -> Config:
    """The configuration with a run's folder where `start_from` named a configuration.

    That one is trained first, under its own name in the same directory and with data in the same
    place, unless it was before.
    """
    name = config.start_from
    if name is None or Path(name).exists() or not config_file.exists(name):
        return config
    first = config_file.load(name)
    data, here = first.data, getattr(config.data, "data_dir", None)
    if not isinstance(data, TextDataConfig):  # which keeps nothing
        data = replace(data, data_dir=here)
    first = replace(first, directory=config.directory, mesh=config.mesh, data=data)
    folder = Path(first.directory) / first.name
    if not finished(folder, first.train.steps):
        console.say(f"{config.name} starts from {name}, which is trained first, to {folder}.")
        try:
            train(first, console, file=config_file.find(name, config_file.FOLDERS))
        except UserError as error:
            raise UserError(
                f"{config.name} starts from {name}, which cannot be trained: {error} A run that is "
                "there already can be named with --start-from FOLDER."
            ) from error
    return replace(config, start_from=str(folder))
