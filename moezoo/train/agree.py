"""Whether the processes of a run were started alike: one configuration, one folder for all."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import jax

from moezoo.errors import UserError
from moezoo.files import write_atomically
from moezoo.json_text import json_text
from moezoo.train import together
from moezoo.train.config import Config, HostsConfig, to_json
from moezoo.train.resume import differences, flattened

# What may differ between the processes of a run: who they are, and where each finds its data.
OWN = ("hosts", "data.data_dir", "data.archive")
LONGEST = 60  # letters of a value that the roll call repeats


def settings(config: Config) -> dict[str, str]:
    """What has to be alike on all processes, as short texts by name, for the roll call.

    A value whose text is long is told by its checksum.
    """
    told = {}
    for name, value in flattened(json.loads(to_json(replace(config, hosts=HostsConfig())))).items():
        if not any(name == one or name.startswith(f"{one}.") for one in OWN):
            text = json_text(value).strip()
            told[name] = (
                text if len(text) <= LONGEST else f"#{sha256(text.encode()).hexdigest()[:12]}"
            )
    return told


def check_same_command(config: Config) -> None:
    """UserError where this process was started with another configuration than process 0."""
    text = to_json(replace(config, hosts=HostsConfig()))
    found = differences(text, together.from_first(lambda: text), OWN)
    for name, (here, first) in found.items():
        raise UserError(
            f"{name} is {here} in process {jax.process_index()}, but {first} in process 0: start "
            "the same command on every host."
        )
    together.wait("agreed")  # before anything is made


def check_shared(directory: Path) -> None:
    """UserError where `directory`, which process 0 can write to, is another folder here."""
    # A name that no host has asked for before: network disks remember what was not there.
    mark = together.from_first(lambda: f".shared.{uuid.uuid4().hex[:8]}.tmp")
    if together.alone():
        return
    first = jax.process_index() == 0
    if first:
        write_atomically(directory / mark, "moezoo")
    together.wait("marked")
    seen = first or (directory / mark).exists()
    if not seen:
        raise UserError(
            f"'{directory}' is not the folder that process 0 writes to: a run on several hosts "
            "needs a --directory on a disk that all of them share."
        )
    together.wait("seen")
    if first:
        (directory / mark).unlink(missing_ok=True)
