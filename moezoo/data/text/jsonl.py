"""Instruction files, one JSON object per line, in three forms:

    {"instruction": "...", "input": "...", "output": "..."}         input may be absent
    {"messages": [{"role": "user", "content": "..."}, ...]}         roles system, user, assistant
    {"inputs": "...", "targets": "..."}                             as FLAN's mixtures are written

each with an optional "task" (otherwise the file's name is the task) and any other fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data.text.example import ROLES, Chat, Instruction, Turn
from moezoo.errors import UserError

_BLOCK = 1 << 24


class _Wrong(Exception):
    """What is wrong with a line."""


class InstructionFile:
    """Examples of a file by index; only where lines begin and their tasks stay in memory.

    Opening reads the file once and checks every line; empty lines are passed over. `tasks` are the
    sorted names that occur, unless they are given (a test file needs the numbers of its training
    file); `task_N` int32 [N] is each example's number among them. Texts are read when they are
    asked for, by several threads if need be.

    Raises UserError, with file and line, for a line that is not UTF-8 or no JSON object, lacks a
    field or has one of a wrong type, has an empty question or answer, an unknown role, no answer of
    the assistant, or a task that is not among those given; and for a file without examples.
    """

    def __init__(self, path: str | Path, tasks: Sequence[str] | None = None):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file: name an instruction file of JSON lines.")
        if not self.path.stat().st_size:
            raise UserError(f"{self.path} is empty.")
        self._bytes = np.memmap(self.path, np.uint8, "r")
        known = None if tasks is None else set(tasks)
        spans, names = [], []
        for number, (start, stop) in enumerate(_lines(self._bytes), 1):
            line = self._bytes[start:stop].tobytes()
            if line.strip():
                task = self._parse(number, line).task
                if known is not None and task not in known:
                    raise self._error(number, f"the task '{task}' is none of {sorted(known)}")
                names.append(task)
                spans.append((start, stop, number))
        if not spans:
            raise UserError(f"{self.path} holds no examples.")
        self._spans_N3 = np.array(spans, np.int64)
        self.tasks = tuple(sorted(set(names)) if tasks is None else tasks)
        number_of = {name: j for j, name in enumerate(self.tasks)}
        self.task_N = np.array([number_of[name] for name in names], np.int32)

    def __len__(self) -> int:
        return len(self._spans_N3)

    def __getitem__(self, index: int) -> Instruction | Chat:
        start, stop, number = (int(x) for x in self._spans_N3[index])
        return self._parse(number, self._bytes[start:stop].tobytes())

    def _parse(self, number: int, line: bytes) -> Instruction | Chat:
        try:
            return parse(line, self.path.stem)
        except _Wrong as wrong:
            raise self._error(number, str(wrong)) from None

    def _error(self, number: int, wrong: str) -> UserError:
        return UserError(f"{self.path}, line {number}: {wrong}.")


def _lines(content: np.ndarray) -> list[tuple[int, int]]:
    """Where each line begins and ends, found a block at a time."""
    blocks = range(0, len(content), _BLOCK)
    ends = np.concatenate([np.flatnonzero(content[b : b + _BLOCK] == 10) + b for b in blocks])
    starts = np.concatenate([[0], ends + 1])
    return list(zip(starts.tolist(), [*ends.tolist(), len(content)], strict=True))


def parse(line: bytes, task: str) -> Instruction | Chat:
    """The example of one line; `task` is its task where the line names none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Wrong("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _Wrong(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, endless nesting
        raise _Wrong("not JSON that can be read") from None
    if not isinstance(value, dict):
        raise _Wrong("a JSON object is expected")
    task = _text(value, "task") if "task" in value else task
    for field, read in _FORMS.items():
        if field in value:
            return read(value, task)
    raise _Wrong(f"none of the fields {', '.join(_FORMS)} is there")


def _text(value: dict[str, Any], field: str, may_be_empty: bool = False) -> str:
    if field not in value:
        raise _Wrong(f"the field '{field}' is missing")
    text = value[field]
    if not isinstance(text, str):
        raise _Wrong(f"the field '{field}' is no text")
    if not (text.strip() or may_be_empty):
        raise _Wrong(f"the field '{field}' is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"the field '{field}' holds half a surrogate pair") from None
    return text


def _instruction(value: dict[str, Any], task: str) -> Instruction:
    given = _text(value, "input", may_be_empty=True) if "input" in value else ""
    return Instruction(_text(value, "instruction"), given, _text(value, "output"), task)


def _flan(value: dict[str, Any], task: str) -> Instruction:
    return Instruction(_text(value, "inputs"), "", _text(value, "targets"), task)


def _chat(value: dict[str, Any], task: str) -> Chat:
    """Turns behind the assistant's last answer are left out: nothing is learned from them."""
    messages = value["messages"]
    if not isinstance(messages, list):
        raise _Wrong("the field 'messages' is no list")
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise _Wrong("no turn is the assistant's")
    if answers[0] == 0:
        raise _Wrong("the assistant's turn comes first, with nothing to answer")
    return Chat(tuple(turns[: answers[-1] + 1]), task)


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict):
        raise _Wrong(f"message {number} is no JSON object")
    try:
        role = _text(message, "role")
        if role not in ROLES:
            raise _Wrong(f"the role '{role}' is none of {', '.join(ROLES)}")
        return Turn(role, _text(message, "content"))
    except _Wrong as wrong:
        raise _Wrong(f"in message {number} {wrong}") from None


_FORMS: dict[str, Callable[[dict[str, Any], str], Instruction | Chat]] = {
    "instruction": _instruction,
    "messages": _chat,
    "inputs": _flan,
}
