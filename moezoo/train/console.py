"""What a run shows while it works: a progress bar, tables, and plain lines where no one watches."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

WINDOW = 20.0  # seconds over which the rate is measured
QUIET = 15.0  # seconds between plain lines where the output is no terminal


class Rate:
    """Steps per second over the last seconds, pauses left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._ticks: deque[tuple[float, int]] = deque()

    def tick(self, step: int) -> None:
        """Note that `step` is done."""
        now = self._clock()
        self._ticks.append((now, step))
        while len(self._ticks) > 2 and now - self._ticks[0][0] > WINDOW:
            self._ticks.popleft()

    def restart(self) -> None:
        """Forget what was measured, because something else has taken time."""
        self._ticks.clear()

    @property
    def per_second(self) -> float:
        """Steps per second; 0 as long as nothing is known."""
        if len(self._ticks) < 2:
            return 0.0
        (start, first), (end, last) = self._ticks[0], self._ticks[-1]
        return (last - first) / max(end - start, 1e-9)


class Console:
    """The console of a run; silent on processes other than the first.

    Args:
      output: a rich console; default standard output.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        output: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._output = output or rich.console.Console(highlight=False)
        # Who has not imported JAX is alone; importing it would cost every command a second.
        other = "jax" in sys.modules and sys.modules["jax"].process_index() != 0
        self._output.quiet = self._output.quiet or other
        self._clock = clock

    def say(self, text: str) -> None:
        """One line of text."""
        self._output.print(Text(text), soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; numbers stand on the right, floats with four digits after the point."""
        table = Table(title=Text(title), title_justify="left")
        for i, name in enumerate(header):
            numbers = all(isinstance(row[i], int | float) for row in rows)
            justify = "right" if rows and numbers else "left"
            table.add_column(Text(name), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(Text(f"{x:.4f}" if isinstance(x, float) else str(x)) for x in row))
        self._output.print(table)

    @contextmanager
    def progress(
        self,
        title: str,
        total: int,
        start: int = 0,
        unit: str = "steps",
        things: Mapping[str, int] | None = None,
    ) -> Iterator[Bar]:
        """A bar for `total` steps of which `start` are done.

        `unit` names a step; with `things={"images": 16}` per step their rate is shown as well.
        Where the output is no terminal a plain line appears now and then.
        """
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            TextColumn("{task.fields[values]}", markup=False),
        )
        live = Progress(
            *columns,
            console=self._output,
            refresh_per_second=4,
            disable=not self._output.is_terminal or self._output.quiet,
        )
        with live:
            bar = Bar(self, live, title, total, start, unit, things or {})
            yield bar
            bar.end()


class Bar:
    """A running progress bar; made by `Console.progress`. `done` steps are finished."""

    def __init__(
        self,
        console: Console,
        live: Progress,
        title: str,
        total: int,
        start: int,
        unit: str,
        things: Mapping[str, int],
    ):
        self._console, self._live, self._title = console, live, title
        self._total, self._unit, self._things = total, unit, things
        self._row = live.add_task(title, total=total, completed=start, speed="", values="")
        self.done, self._values, self._doing = start, "", ""
        self.rate = Rate(console._clock)
        self.rate.tick(start)
        self._spoke = console._clock()
        self._said = start

    def doing(self, words: str) -> None:
        """Say what holds up the next step, such as "compiling"; the next `update` ends it."""
        self._doing = words
        self._live.update(self._row, speed=words)
        if self._live.disable:
            self._line()

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Show that `done` steps are finished, with a few values measured lately."""
        self.rate.tick(done)
        self.done, self._doing = done, ""
        if values is not None:
            self._values = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._live.update(self._row, completed=done, speed=self._speed(), values=self._values)
        if self._live.disable and self._console._clock() - self._spoke > QUIET:
            self._line()

    def advance(self, steps: int) -> None:
        """`update` by a number of steps."""
        self.update(self.done + steps)

    def end(self) -> None:
        """The last plain line, where plain lines stand for the bar."""
        if self._live.disable and self.done != self._said:
            self._line()

    def _line(self) -> None:
        parts = (self._title, f"{self.done}/{self._total}", self._speed(), self._values)
        self._console.say("  ".join(part for part in parts if part))
        self._spoke, self._said = self._console._clock(), self.done

    def _speed(self) -> str:
        rate = self.rate.per_second
        if self._doing or not rate:
            return self._doing
        things = "".join(f"  {rate * n:.0f} {name}/s" for name, n in self._things.items())
        left = max(self._total - self.done, 0) / rate
        return f"{rate:.3g} {self._unit}/s{things}  {_clock(left)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
