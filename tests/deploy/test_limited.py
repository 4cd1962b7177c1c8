"""Another process answers for a stranger's file; what it may take is limited."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moezoo.deploy.runtime import limited

HELD = "from moezoo.deploy.runtime import limited\nlimited.hold({memory}, {seconds})\n"


def child(code: str, memory: int = 1 << 28, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    """Python that does something after `hold`."""
    words = HELD.format(memory=memory, seconds=seconds) + code
    return subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much there is")
def test_memory_is_what_was_allowed_and_no_more() -> None:
    assert child("x = bytearray(100 << 20); print(len(x))").stdout == f"{100 << 20}\n"
    assert "MemoryError" in child("bytearray(300 << 20)").stderr


def test_nothing_is_written_and_a_processor_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "x"
    assert "File too large" in child(f"open({str(file)!r}, 'w').write('x' * 100_000)").stderr
    assert not file.exists() or file.stat().st_size == 0
    start = time.monotonic()
    assert child("while True: pass", seconds=0).returncode < 0
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print('noise'); print('[1, null]')", limited.ChildAnswer([1, None])),
        ("import os; os.abort()", limited.ChildAnswer(None, "SIGABRT")),
        ("raise SystemExit(3)", limited.ChildAnswer(None, "exit 3")),
        ("pass", limited.ChildAnswer(None, "exit 0")),
        ("print('[1')", limited.ChildAnswer(None, "exit 0")),
        ("import time; time.sleep(9)", limited.ChildAnswer(None, "is not read within 0.5 s")),
    ],
)
def test_every_end_of_a_process_is_an_answer(
    code: str, answer: limited.ChildAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "CHILD", code)
    found = limited.asked("programs", b"", 0.5 if "sleep" in code else 30.0)
    assert found.said == answer.said and answer.ended in found.ended
    assert bool(found.ended) == bool(answer.ended)


def test_what_is_given_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, json; print(json.dumps(len(sys.stdin.buffer.read())))"
    monkeypatch.setattr(limited, "CHILD", code)
    assert json.dumps(limited.asked("programs", bytes(10**6)).said) == "1000000"
