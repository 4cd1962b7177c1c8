"""What is to be started, what a back end makes of it, and how that is shown before it happens.

A back end turns a `LaunchJob` into a `LaunchPlan`: files and commands, known before anything runs.
`--dry-run` prints the plan; otherwise the back end writes those files and runs those commands.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from moezoo import storage
from moezoo.errors import UserError
from moezoo.files import write_atomically
from moezoo.train.config import Config, validate

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # of a host in the domain name system, RFC 1035
COMPILED = "JAX_COMPILATION_CACHE_DIR"  # where JAX keeps compiled programs
COORDINATOR_PORT = 8476  # where JAX listens on Cloud TPU and GKE


class LaunchJob(NamedTuple):
    """A run to be started.

    config: as the user named it.   words: the options behind it.   settings: what both mean.
    """

    config: str
    words: tuple[str, ...]
    settings: Config

    @property
    def name(self) -> str:
        """The run's."""
        return self.settings.name

    @property
    def logs(self) -> Path:
        """The folder of what launching leaves: scripts, and what each process printed.

        It lies on a disk, in `runs`, where the run itself lies in an object store.
        """
        stored = storage.is_stored(self.settings.directory)
        return Path("runs" if stored else self.settings.directory) / self.name / "launch"

    def heads(self) -> set[str]:
        """The names of all options that were given."""
        return {word.partition("=")[0] for word in self.words}

    def train(self, python: str, *more: str) -> tuple[str, ...]:
        """The words of the command that every process runs."""
        return (python, "-m", "moezoo", "train", self.config, *self.words, *more)


class File(NamedTuple):
    """A file that is written before anything runs."""

    path: Path
    text: str


class Command(NamedTuple):
    """Words of one command, what its environment has besides, and whether others run beside it."""

    words: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    beside: str = ""  # " &" where the next command does not wait for this one

    def shown(self) -> str:
        """As it can be typed into a shell."""
        settings = [f"{name}={value}" for name, value in self.env]
        words = ["env", *settings, *self.words] if settings else self.words
        return shlex.join(words) + self.beside


class LaunchPlan(NamedTuple):
    """Everything that a back end writes and runs, in this order, and what else may be of use.

    instead: other commands that would do the same, by what they are.
    """

    files: tuple[File, ...]
    commands: tuple[Command, ...]
    instead: tuple[tuple[str, Command], ...] = ()

    def write(self) -> None:
        """Write the files; UserError where that fails."""
        for file in self.files:
            write_atomically(file.path, file.text)

    def lines(self) -> Iterator[str]:
        """The plan for people, which a shell could run, too."""
        for file in self.files:
            yield f"# {file.path}:"
            yield from (f"    {line}".rstrip() for line in file.text.splitlines())
        if self.files:
            yield ""
        yield from (command.shown() for command in self.commands)
        for what, command in self.instead:
            yield f"# {what}:"
            yield f"#   {command.shown()}"


class BackEnd(Protocol):
    """A way to start a job. Every one is a frozen dataclass of its own options."""

    def total_devices(self, job: LaunchJob) -> int:
        """How many devices the run will have; UserError for options that do not fit together."""
        ...

    def plan(self, job: LaunchJob) -> LaunchPlan:
        """What will be written and run."""
        ...

    def check(self, job: LaunchJob) -> None:
        """UserError where this machine cannot do it: a program is missing, a port is taken."""
        ...

    def run(self, job: LaunchJob, plan: LaunchPlan) -> int:
        """Do it, show what process 0 prints, and return the run's exit code."""
        ...


def check_fits(job: LaunchJob, back_end: BackEnd) -> None:
    """UserError where the configuration and the devices of the back end do not fit."""
    count = back_end.total_devices(job)
    hosts = job.settings.hosts
    for name in ("coordinator", "count", "index"):
        if getattr(hosts, name) is not None:
            raise UserError(f"hosts.{name} is what the launcher finds itself: leave it out.")
    validate(job.settings, count)


def check_label(value: str, what: str, longest: int = 63) -> None:
    """UserError for a name that clouds and Kubernetes would refuse."""
    if not LABEL.fullmatch(value) or len(value) > longest:
        raise UserError(
            f"{what} is '{value}'; it must have lower-case letters, digits and dashes only, begin "
            f"with a letter, not end with a dash, and be at most {longest} long."
        )


def label_of(name: str, longest: int = 40) -> str:
    """A run's name as a label: `sixteen_Experts/a` becomes `sixteen-experts-a`."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}"
    return plain[:longest].strip("-")


def check_plain(value: str | None, what: str) -> None:
    """UserError for a value that would be more than one line of a script, or another option."""
    if value is None:
        return
    if not value or not value.isprintable() or value.startswith("-"):
        raise UserError(
            f"{what} is {value!r}; it must be one line that is not empty and does not begin with "
            "a dash."
        )


def check_positive(value: int | None, what: str) -> None:
    """UserError for a number below 1."""
    if value is not None and value < 1:
        raise UserError(f"{what} is {value}; it must be at least 1.")


def check_installed(program: str, install: str) -> None:
    """UserError where a program is not on this machine."""
    if shutil.which(program) is None:
        raise UserError(
            f"{program} is not installed on this machine: {install}, or add --dry-run to only see "
            "what would run."
        )


def here() -> Path:
    """The folder in which processes on shared disks start."""
    return Path(os.getcwd())


def set_up(line: str | None) -> str:
    """The user's own line of a script, which may read files that are not on this machine."""
    return f"# shellcheck disable=SC1091\n{line} || exit 2\n" if line else ""


def quoted(words: Sequence[str]) -> str:
    """Words as a shell reads them, one option a line."""
    lines = [""]
    for word in words:
        new = word.startswith("--") and lines[-1]
        if new:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + shlex.quote(word)
    return " \\\n    ".join(lines)
