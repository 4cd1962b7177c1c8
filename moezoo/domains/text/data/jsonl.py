"""Instruction files, one JSON object per line, in three forms:

    {"instruction": "...", "input": "...", "output": "..."}         input may be absent
    {"messages": [{"role": "user", "content": "..."}, ...]}         roles system, user, assistant
    {"inputs": "...", "targets": "..."}                             as FLAN's mixtures are written

each with an optional "task" (otherwise the file's name is the task) and any other fields.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from moezoo import regular
from moezoo.domains.text.data.example import ROLES, Chat, Instruction, Turn
from moezoo.errors import UserError
from moezoo.schema_check import shown

LARGEST = 1 << 40  # bytes of a file, which is never in memory as a whole
LONGEST = 1 << 22  # bytes of a line; parsed JSON takes up to fifty times as many
_BLOCK = 1 << 20
_SPACES = np.isin(np.arange(256), list(b" \t\n\r\x0b\f"))


class _Wrong(Exception):
    """What is wrong with a line."""


class InstructionFile:
    """Examples of a file by index; only the starts of lines and their tasks stay in memory.

    Opening reads the file once and checks every line; empty lines are skipped. `tasks` are the
    sorted names that occur, unless they are given (a test file needs the numbers of its training
    file); `task_N` int32 [N] is each example's number among them. Texts are read on request, by
    several threads if need be.

    Raises UserError, with file and line, for a line that is not UTF-8 or not a JSON object, is
    longer than `LONGEST`, lacks a field or has one of a wrong type, has an empty question or
    answer, an unknown role, no answer by the assistant, or a task that is not among those given;
    and for a file that has no examples or is not a regular file.
    """

    def __init__(self, path: str | Path, tasks: Sequence[str] | None = None):
        self.path = Path(path).expanduser()
        size = regular.check(self.path, LARGEST, UserError, "name a file of JSON lines")
        if not size:
            raise UserError(f"{self.path} is empty.")
        # Not a memory map: if the file were truncated meanwhile, a signal would end the process.
        self._file, self._lock = open(self.path, "rb"), Lock()
        known = None if tasks is None else set(tasks)
        spans, numbers, seen = array("q"), array("i"), {}
        for number, start, stop in _lines(self._stored, size):
            task = self._read(number, start, stop).task
            if known is not None and task not in known:
                raise self._error(
                    number, f"the task {shown(task)} is none of {shown(sorted(known))}"
                )
            numbers.append(seen.setdefault(task, len(seen)))
            spans.extend((start, stop, number))
        if not spans:
            raise UserError(f"{self.path} contains no examples.")
        self._spans_N3 = np.frombuffer(spans, np.int64).reshape(-1, 3)
        self.tasks = tuple(sorted(seen) if tasks is None else tasks)
        place = {name: j for j, name in enumerate(self.tasks)}
        self.task_N = np.array([place[name] for name in seen], np.int32)[
            np.frombuffer(numbers, "i")
        ]

    def __len__(self) -> int:
        return len(self._spans_N3)

    def __getitem__(self, index: int) -> Instruction | Chat:
        start, stop, number = (int(x) for x in self._spans_N3[index])
        return self._read(number, start, stop)

    def _read(self, number: int, start: int, stop: int) -> Instruction | Chat:
        if stop - start > LONGEST:
            raise self._error(
                number, f"it has {stop - start:,} bytes, but at most {LONGEST:,} are read"
            )
        line = self._stored(start, stop)
        if len(line) < stop - start:
            raise self._error(number, "it is gone since the file was opened; start again")
        try:
            return parse(line, self.path.stem)
        except _Wrong as wrong:
            raise self._error(number, str(wrong)) from None

    def _stored(self, start: int, stop: int) -> bytes:
        """These bytes of the file, or as many of them as there are."""
        try:
            with self._lock:
                self._file.seek(start)
                return self._file.read(stop - start)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from error

    def _error(self, number: int, wrong: str) -> UserError:
        return UserError(f"{self.path}, line {number}: {wrong}.")


def _lines(stored: Callable[[int, int], bytes], size: int) -> Iterator[tuple[int, int, int]]:
    """Number, beginning and end of every line that is not blank, found a block at a time.

    stored(start, stop): bytes of a file of this size.
    """
    number, start = 0, 0  # lines that have ended, and where the next one begins
    for block in range(0, size, _BLOCK):
        part = np.frombuffer(stored(block, block + _BLOCK), np.uint8)
        ends = np.flatnonzero(part == 10) + block
        if not len(ends):
            continue
        starts = np.append(start, ends[:-1] + 1)
        # The text before every byte of the block: millions of blank lines cost nothing.
        text = np.append(0, np.cumsum(~_SPACES[part], dtype=np.int32))
        some = text[ends - block] > text[np.maximum(starts - block, 0)]
        some[0] |= start < block
        for place in np.flatnonzero(some):
            here = int(starts[place]), int(ends[place])
            if not _blank(stored, *here):
                yield number + 1 + int(place), *here
        number += len(ends)
        start = int(ends[-1]) + 1
    if not _blank(stored, start, size):
        yield number + 1, start, size


def _blank(stored: Callable[[int, int], bytes], start: int, stop: int) -> bool:
    return stop - start <= LONGEST and not stored(start, stop).strip()


def parse(line: bytes, task: str) -> Instruction | Chat:
    """The example on one line; `task` is its task if the line names none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Wrong("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _Wrong(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, endless nesting
        raise _Wrong("not readable as JSON") from None
    if not isinstance(value, dict):
        raise _Wrong("a JSON object is expected")
    task = _text(value, "task") if "task" in value else task
    for field, read in _FORMS.items():
        if field in value:
            return read(value, task)
    raise _Wrong(f"it has none of the fields {', '.join(_FORMS)}")


def _text(value: dict[str, Any], field: str, may_be_empty: bool = False) -> str:
    if field not in value:
        raise _Wrong(f"the field '{field}' is missing")
    text = value[field]
    if not isinstance(text, str):
        raise _Wrong(f"the field '{field}' is not a text")
    if not (text.strip() or may_be_empty):
        raise _Wrong(f"the field '{field}' is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"the field '{field}' contains half a surrogate pair") from None
    return text


def _instruction(value: dict[str, Any], task: str) -> Instruction:
    given = _text(value, "input", may_be_empty=True) if "input" in value else ""
    return Instruction(_text(value, "instruction"), given, _text(value, "output"), task)


def _flan(value: dict[str, Any], task: str) -> Instruction:
    return Instruction(_text(value, "inputs"), "", _text(value, "targets"), task)


def _chat(value: dict[str, Any], task: str) -> Chat:
    """Leaves out turns after the assistant's last answer: nothing is learned from them."""
    messages = value["messages"]
    if not isinstance(messages, list):
        raise _Wrong("the field 'messages' is not a list")
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise _Wrong("no turn is by the assistant")
    if answers[0] == 0:
        raise _Wrong("the assistant's turn comes first, with nothing to answer")
    return Chat(tuple(turns[: answers[-1] + 1]), task)


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict):
        raise _Wrong(f"message {number} is not a JSON object")
    try:
        role = _text(message, "role")
        if role not in ROLES:
            raise _Wrong(f"the role {shown(role)} is none of {', '.join(ROLES)}")
        return Turn(role, _text(message, "content"))
    except _Wrong as wrong:
        raise _Wrong(f"in message {number} {wrong}") from None


_FORMS: dict[str, Callable[[dict[str, Any], str], Instruction | Chat]] = {
    "instruction": _instruction,
    "messages": _chat,
    "inputs": _flan,
}
