"""How often the parts of a compiled program run: its text has the body of a loop once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_OPENED = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_WHILE = re.compile(r" while\(.*?condition=%?(?P<condition>[\w.-]+), body=%?(?P<body>[\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|\S+)")
_KNOWN = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?(?P<name>[\w.-]+) = [su]\d+\[\]\S* constant\((?P<value>\d+)\)")
_LESS = re.compile(r"ROOT .* compare\((?P<operands>.*?)\), direction=LT")


def repeats(text: str) -> dict[str, int]:
    """How often each computation of `compiled.as_text()` runs in one run of the program.

    A loop whose number of rounds is not in the text (it depends on data) counts as one round, and a
    branch as taken.
    """
    bodies = _bodies(text)
    entry = next((name for name, own in bodies.items() if own.entry), None)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for called, rounds in bodies[name].calls(bodies):
            if called in bodies:
                visit(called, count * rounds)

    if entry is not None:
        visit(entry, 1)
    return dict(times)


class _Body:
    """The lines of one computation."""

    def __init__(self, entry: bool):
        self.entry = entry
        self.lines: list[str] = []

    def calls(self, bodies: dict[str, _Body]) -> Iterable[tuple[str, int]]:
        """The computations it calls, each with how often."""
        for line in self.lines:
            loop = _WHILE.search(line)
            if loop:
                rounds = _rounds(line, bodies.get(loop["condition"]))
                yield loop["body"], rounds
                yield loop["condition"], rounds + 1
            for called in _CALLED.findall(line):
                for name in re.findall(r"[\w.-]+", called):
                    yield name, 1


def _bodies(text: str) -> dict[str, _Body]:
    bodies: dict[str, _Body] = {}
    current = None
    for line in text.splitlines():
        opened = _OPENED.match(line)
        if opened:
            current = bodies[opened["name"]] = _Body(bool(opened["entry"]))
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.lines.append(line)
    return bodies


def _rounds(line: str, condition: _Body | None) -> int:
    """The compiler's note, or the constant that JAX's counter, beginning at 0, stays below."""
    known = _KNOWN.search(line)
    if known:
        return int(known[1])
    own = condition.lines if condition else []
    constants = {c["name"]: int(c["value"]) for c in map(_CONSTANT.search, own) if c}
    for less in filter(None, map(_LESS.search, own)):
        named = re.findall(r"[\w.-]+", less["operands"])
        limits = [value for name, value in constants.items() if name in named]
        if len(limits) == 1:
            return limits[0]
    return 1
