"""The console on a terminal and where there is none."""

from __future__ import annotations

import io

import pytest
import rich.console

from moezoo.train.console import Console, Rate


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def output(terminal: bool, clock: Clock) -> tuple[io.StringIO, Console]:
    text = io.StringIO()
    made = rich.console.Console(file=text, force_terminal=terminal, width=160, highlight=False)
    return text, Console(made, clock)


def test_rate_is_measured_over_the_last_seconds():
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second == 0
    for step in range(100):
        clock.now += 10.0 if step < 3 else 0.5
        rate.tick(step)
    assert rate.per_second == pytest.approx(2.0)
    rate.restart()
    assert rate.per_second == 0


def test_without_terminal_lines_are_sparse():
    clock = Clock()
    text, console = output(False, clock)
    with console.progress("train", 1000, things={"images": 16}) as bar:
        for step in range(1, 501):
            clock.now += 0.1
            bar.update(step, {"loss": 2.0} if step % 20 == 0 else None)
    lines = text.getvalue().splitlines()
    assert len(lines) == 4  # every 15 of 50 seconds, and the end
    assert lines[-1] == "train  500/1000  10 steps/s  160 images/s  0:50 left  loss 2"


def test_short_work_without_terminal_says_only_its_end():
    text, console = output(False, Clock())
    with console.progress("evaluate", 4, unit="examples") as bar:
        bar.advance(2)
        bar.advance(2)
    assert [line.split("  ")[:2] for line in text.getvalue().splitlines()] == [["evaluate", "4/4"]]


def test_terminal_shows_a_bar_with_rate_and_values():
    clock = Clock()
    text, console = output(True, clock)
    with console.progress("train", 10, start=4, things={"images": 8}) as bar:
        for step in range(5, 9):
            clock.now += 0.5
            bar.update(step, {"loss": 0.25})
    shown = text.getvalue()
    for part in ("train", "8/10", "2 steps/s", "16 images/s", "0:01 left", "loss 0.25"):
        assert part in shown
    assert bar.done == 8


def test_failure_inside_a_bar_passes_through():
    text, console = output(True, Clock())
    with pytest.raises(KeyboardInterrupt), console.progress("train", 10):
        raise KeyboardInterrupt
    assert "\x1b[?25h" in text.getvalue()  # the cursor is back


def test_table_has_rows_and_rounded_numbers():
    text, console = output(False, Clock())
    console.table("Scores", ("task", "score"), [("depth", 0.123456), ("semseg", 1.0)])
    shown = text.getvalue()
    assert "Scores" in shown and "0.1235" in shown and "1.0000" in shown and "semseg" in shown


NAMES = ("mmlu[/easy]", "gsm8k[main]", "[/red]", "a|b", ":bug:", "\\[x]", "{x}", "\x1b[31mred")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name, terminal):
    shown = name.replace("\x1b", "")  # colours of a terminal are not let through
    text, console = output(terminal, Clock())
    console.say(name)
    console.table(f"Scores of {name}", ("task", name), [(name, 1.0)])
    with console.progress(name, 2) as bar:
        bar.update(1, {name: 1.0})
        bar.advance(1)
    assert text.getvalue().count(shown) >= 5


def test_compiling_is_said_until_a_step_is_done():
    clock = Clock()
    text, console = output(False, clock)
    with console.progress("train", 1800) as bar:
        bar.doing("compiling")
        assert text.getvalue() == "train  0/1800  compiling\n"
        clock.now += 40
        bar.update(1)
        bar.rate.restart()
        clock.now += 1
        bar.update(2)
        clock.now += 1
        bar.update(3)
    assert text.getvalue().splitlines()[-1] == "train  3/1800  1 steps/s  29:57 left"
    text, console = output(True, clock)
    with console.progress("train", 1800) as bar:
        bar.doing("compiling")
    assert "compiling" in text.getvalue()


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    text, console = output(False, Clock())
    console.say("hello")
    console.table("Scores", ("a",), [(1,)])
    with console.progress("train", 2) as bar:
        bar.advance(2)
    assert text.getvalue() == ""
