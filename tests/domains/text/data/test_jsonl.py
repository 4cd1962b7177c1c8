"""Instruction files: three forms, random access, and what is wrong with a line."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moezoo.domains.text.data import jsonl
from moezoo.domains.text.data.example import Chat, Instruction, Turn
from moezoo.domains.text.data.jsonl import InstructionFile
from moezoo.errors import UserError


def write(path: Path, *values: Any) -> Path:
    """One line of JSON per value; text stays as it is."""
    lines = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return path


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Never answered."},
]


def test_the_three_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        {"instruction": "Say é", "input": "", "output": "é", "task": "b", "other": [1]},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"messages": CHAT, "task": "a"},
        "",
        {"inputs": "Question", "targets": "Answer", "task": "b", "domain": "x"},
        "  ",
    )
    file = InstructionFile(path)
    assert [file[i] for i in range(len(file))] == [
        Instruction("Say é", "", "é", "b"),
        Instruction("Add", "1 2", "3", "mixed"),
        Chat(tuple(Turn(m["role"], m["content"]) for m in CHAT[:5]), "a"),
        Instruction("Question", "", "Answer", "b"),
    ]
    assert file.tasks == ("a", "b", "mixed")
    np.testing.assert_array_equal(file.task_N, [1, 2, 0, 1])
    assert file[-1] == file[3]
    with pytest.raises(IndexError):
        file[4]


LINES = st.lists(
    st.builds(
        lambda i, o, t: {"instruction": "x" + i, "output": "y" + o, "task": "t" + t},
        *[st.text(st.characters(exclude_categories=("Cs",)), max_size=20)] * 3,
    ),
    min_size=1,
    max_size=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=LINES, end=st.sampled_from(["\n", "\r\n"]), last=st.booleans(), mark=st.booleans())
def test_every_line_is_found(
    tmp_path: Path, values: list[dict], end: str, last: bool, mark: bool
) -> None:
    path = tmp_path / "f.jsonl"
    text = end.join(json.dumps(v, ensure_ascii=False) for v in values) + end * last
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    file = InstructionFile(path)
    expected = [Instruction(v["instruction"], "", v["output"], v["task"]) for v in values]
    assert [file[i] for i in range(len(file))] == expected
    assert [file.tasks[j] for j in file.task_N] == [v["task"] for v in values]
    assert list(file.tasks) == sorted({v["task"] for v in values})


def test_lines_may_cross_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"instruction": "a" * n, "output": str(n)} for n in range(1, 40)]
    path = write(tmp_path / "f.jsonl", *values)
    monkeypatch.setattr(jsonl, "_BLOCK", 16)
    file = InstructionFile(path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(file.__getitem__, range(39)))
    assert [e.turns[0].content for e in found] == ["a" * n for n in range(1, 40)]


GOOD = {"instruction": "a", "output": "b"}
ASKED = {"role": "user", "content": "a"}
WRONG = [
    ('{"instruction": "a"', "not JSON \\(Expecting ',' delimiter at column 20\\)"),
    ("7", "a JSON object is expected"),
    ("[" * 100_000, "not readable as JSON"),
    ('"\udcff"', "not UTF-8 text"),
    ({"output": "b"}, "it has none of the fields instruction, messages, inputs"),
    ({"instruction": "a"}, "the field 'output' is missing"),
    ({"instruction": "a", "output": 3}, "the field 'output' is not a text"),
    ({"instruction": "a", "output": " \n"}, "the field 'output' is empty"),
    ({"instruction": "", "output": "b"}, "the field 'instruction' is empty"),
    ({"instruction": "a", "input": None, "output": "b"}, "the field 'input' is not a text"),
    ({"instruction": "a", "output": "b", "task": 1}, "the field 'task' is not a text"),
    ('{"instruction": "a", "output": "\\ud800"}', "'output' contains half a surrogate pair"),
    ({"inputs": "a"}, "the field 'targets' is missing"),
    ({"inputs": "a", "targets": ""}, "the field 'targets' is empty"),
    ({"messages": "a"}, "the field 'messages' is not a list"),
    ({"messages": ["a"]}, "message 1 is not a JSON object"),
    ({"messages": []}, "no turn is by the assistant"),
    ({"messages": [ASKED]}, "no turn is by the assistant"),
    (
        {"messages": [ASKED, {"role": "bot", "content": "b"}]},
        "in message 2 the role 'bot' is none of system, user, assistant",
    ),
    (
        {"messages": [ASKED, {"role": "assistant", "content": ""}]},
        "in message 2 the field 'content' is empty",
    ),
    ({"messages": [{"role": "user"}]}, "in message 1 the field 'content' is missing"),
    ({"messages": [{"content": "a"}]}, "in message 1 the field 'role' is missing"),
    (
        {"messages": [{"role": "assistant", "content": "a"}]},
        "the assistant's turn comes first, with nothing to answer",
    ),
]


@pytest.mark.parametrize(("line", "sentence"), WRONG)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, line: Any, sentence: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(UserError, match=rf"bad\.jsonl, line 3: .*{sentence}\.$"):
        InstructionFile(path)


def test_a_test_file_takes_the_numbers_of_its_training_file(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", GOOD | {"task": "c"}, GOOD | {"task": "a"})
    file = InstructionFile(path, ("a", "b", "c"))
    assert file.tasks == ("a", "b", "c") and file.task_N.tolist() == [2, 0]
    with pytest.raises(UserError, match=r"line 1: the task 'c' is none of \['a', 'b'\]\.$"):
        InstructionFile(path, ("a", "b"))


def test_files_without_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.jsonl' is missing: name a file of JSON lines"):
        InstructionFile(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is empty"):
        InstructionFile(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="contains no examples"):
        InstructionFile(write(tmp_path / "blank.jsonl", "", " ", ""))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.mkdir(), "is a folder"),
    ],
)
def test_what_is_no_regular_file_is_refused(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=says):
        InstructionFile(tmp_path / "a.jsonl")


@pytest.mark.parametrize("blank", [b"\n", b" \t\n", b"\r\n"])
def test_millions_of_blank_lines_cost_nothing(tmp_path: Path, blank: bytes) -> None:
    """10 MB of newlines took 1.7 GB. The numbers of lines are still right."""
    path, count = tmp_path / "a.jsonl", 6_000_000 // len(blank)
    path.write_bytes(blank * count + json.dumps(GOOD).encode() + b"\n" + blank * count + b"{")
    begun = time.process_time()
    tracemalloc.start()
    with pytest.raises(UserError, match=f"line {2 * count + 2}: not JSON"):
        InstructionFile(path)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("line", [b'"' + b"a" * (1 << 22) + b'"', b" " * ((1 << 22) + 1)])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_endless_lines_are_refused(tmp_path: Path, line: bytes, end: bytes) -> None:
    """A line of 200 MB took 6.8 GB."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + end)
    with pytest.raises(UserError, match=r"line 2: it has 4,194,30. bytes, but at most 4,194,304"):
        InstructionFile(path)


def test_a_file_that_is_cut_meanwhile(tmp_path: Path) -> None:
    """Through a memory map it would end the process with a signal."""
    path = write(tmp_path / "a.jsonl", *[GOOD] * 3000)
    file = InstructionFile(path)
    with open(path, "r+b") as opened:
        opened.truncate(10)
    with pytest.raises(UserError, match="line 3000: it is gone since the file was opened"):
        file[2999]


def test_long_names_are_not_repeated(tmp_path: Path) -> None:
    chat = {"messages": [ASKED, {"role": "b\n" * 10_000, "content": "b"}]}
    for value, tasks in ((chat, None), (GOOD | {"task": "t\n" * 10_000}, ["a"] * 10_000)):
        with pytest.raises(UserError, match="is none of") as told:
            InstructionFile(write(tmp_path / "a.jsonl", value), tasks)
        assert len(str(told.value)) < 500 and "\n" not in str(told.value)
