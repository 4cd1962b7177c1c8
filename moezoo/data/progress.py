"""The bar that is shown while a data set is made."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, things: str):
        super().__init__()
        self.things = things

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} {self.things}/s" if task.speed else "")


def progress(description: str, things: str) -> Progress:
    """A bar with count, rate (`things` per second) and remaining time, on stderr."""
    return Progress(
        TextColumn(description.replace("{", "{{").replace("}", "}}"), markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(things),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),  # tfds's own lines on stdout are silenced meanwhile
    )
