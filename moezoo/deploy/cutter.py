"""Who cuts one task out of what lies in a folder: whoever the folder is of, which is asked.

A domain may have a way of its own, for its runs and for models that are no runs
(`registry.CUTTERS`); what is left are runs that become exports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moezoo import registry
from moezoo.deploy import deliver
from moezoo.deploy.produce import Request
from moezoo.deploy.sweep import Limits
from moezoo.errors import UserError


class Cutter(Protocol):
    """What `moezoo prune` does with a folder.

    Raises UserError for anything that stands in the way, before long work where it can.
    """

    def instead(self, task: str | None) -> str | None:
        """What to do instead of `moezoo export`, a sentence; None where that command works.

        task: the one that was asked for, for the command to name.
        """
        ...

    def check(self, options: Mapping[str, Any], replace: bool, formats: Sequence[str]) -> None:
        """Refuse options that have no place. options: those of models that are no runs."""
        ...

    def export(self, task: str, request: Request, out: Path) -> object:
        """Write the path of a task with the experts that the request has room for."""
        ...

    def within(self, task: str, request: Request, limits: Limits, out: Path) -> object:
        """The same with the fewest experts per layer that keep the limits."""
        ...

    def sweep(self, task: str | None, request: Request, out: Path) -> object:
        """Write the trade-off curve of a task, or of all of them."""
        ...


class RunCutter:
    """A run whose paths become exports (`deploy.deliver`)."""

    def __init__(self, run: Path):
        self.run, self.replace, self.formats = run, False, ()

    def instead(self, task: str | None) -> None:
        return None

    def check(self, options: Mapping[str, Any], replace: bool, formats: Sequence[str]) -> None:
        if options:
            name = next(iter(options)).replace("_", "-")
            raise UserError(
                f"--{name} is for a Hugging Face decoder, and {self.run} is a run: leave it out."
            )
        self.replace, self.formats = replace, tuple(formats)

    def export(self, task: str, request: Request, out: Path) -> Path:
        options = {"replace": self.replace, "formats": self.formats}
        return deliver.export_run(self.run, task, request, out, **options)

    def within(self, task: str, request: Request, limits: Limits, out: Path) -> Path:
        options = {"replace": self.replace, "formats": self.formats}
        return deliver.export_within(self.run, task, request, limits, out, **options)

    def sweep(self, task: str | None, request: Request, out: Path) -> object:
        return deliver.sweep_run(self.run, task, request, out, replace=self.replace)


def cutter_of(run: Path, folder: Path) -> Cutter:
    """Who cuts what lies in `folder`, which the user called `run`.

    Raises UserError where it is neither a model that a domain cuts nor a run.
    """
    return registry.cutter(folder) or RunCutter(run)
