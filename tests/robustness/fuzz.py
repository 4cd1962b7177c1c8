"""Trying many damaged inputs: each is accepted and right, or refused with one sentence.

@fuzz.counts(ci=10, full=200)
def test_damaged_manifests(count: int, tmp_path: Path) -> None:
    def case(chance: random.Random) -> fuzz.Case:
        name, value = fuzz.mutate_json(chance, SOUND)
        return name, lambda: read(value)  # an AssertionError: accepted, but wrong

    fuzz.run("manifests", case, count)
"""

from __future__ import annotations

import collections
import copy
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

from moezoo.errors import UserError

Case = tuple[str, Callable[[], object]]
SECONDS = 20.0
BYTES = 3 << 29  # of growth: with what a process needs by itself that is under 2 GiB


class Outcome(NamedTuple):
    """How one try ended; `kind` is one of `GOOD`, or what is wrong: `wrong`, `hang`, ..."""

    kind: str
    detail: str


GOOD = ("accepted", "refused")


class Hang(BaseException):
    """A try took longer than `SECONDS`; no `except Exception` keeps it back."""


def counts(ci: int, full: int) -> Any:
    """Parametrizes `count`: a handful of cases in CI, all of them behind the mark `fuzz`."""
    return pytest.mark.parametrize("count", [ci, pytest.param(full, marks=pytest.mark.fuzz)])


def run(
    title: str,
    case: Callable[[random.Random], Case],
    count: int,
    refusals: tuple[type[Exception], ...] = (UserError,),
    seed: int = 0,
) -> dict[str, int]:
    """Try `count` cases, print how they ended, and fail with a list of those that ended badly.

    Case number i is made from a generator of its own, so that one can be repeated alone.
    """
    found: collections.Counter[str] = collections.Counter()
    bad = []
    for number in range(count):
        name, attempt = case(random.Random(f"{seed}/{number}"))
        outcome = attempted(attempt, refusals)
        found[outcome.kind] += 1
        if outcome.kind not in GOOD:
            bad.append(f"case {number} ({name}): {outcome.kind}: {outcome.detail}")
    print(f"{title}: {count} cases, " + ", ".join(f"{n} {kind}" for kind, n in found.items()))
    assert not bad, f"{len(bad)} of {count}:\n" + "\n".join(bad[:20])
    return dict(found)


def attempted(
    attempt: Callable[[], object], refusals: tuple[type[Exception], ...] = (UserError,)
) -> Outcome:
    """How a try ends: accepted, refused, or wrong, traceback, hang, memory, sentence."""
    forget_peak()
    before = peak_bytes()  # a test process may hold the compiled programs of a thousand tests
    try:
        with limit(SECONDS):
            attempt()
        outcome = Outcome("accepted", "")
    except refusals as error:
        words = str(error).strip()
        whole = words and "\n" not in words and len(words) < 2000
        outcome = Outcome("refused" if whole else "sentence", repr(words[:300]))
    except AssertionError as error:
        outcome = Outcome("wrong", str(error)[:300])
    except Hang:
        outcome = Outcome("hang", f"over {SECONDS:.0f} s")
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {str(error)[:200]} ({at.filename}:{at.lineno})"
        outcome = Outcome("traceback", words)
    grown = peak_bytes() - before
    return outcome if grown <= BYTES else Outcome("memory", f"{grown >> 20} MiB more resident")


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget_peak() -> None:
    """Begin to measure the peak of resident memory anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that was resident since `forget_peak`; 0 where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def mutate_bytes(chance: random.Random, data: bytes) -> tuple[str, bytes]:
    """`data` damaged in one place, and what was done."""
    at = chance.randrange(len(data)) if data else 0
    length = chance.choice((1, 2, 8, 100))
    kind = chance.choice(
        ("bit", "cut", "zeros", "noise", "inserted", "removed", "repeated", "empty")
    )
    changed = bytearray(data)
    if kind == "bit" and data:
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "zeros":
        changed[at : at + length] = bytes(min(length, len(data) - at))
    elif kind == "noise":
        changed[at : at + length] = chance.randbytes(min(length, len(data) - at))
    elif kind == "inserted":
        changed[at:at] = chance.randbytes(length)
    elif kind == "removed":
        del changed[at : at + length]
    elif kind == "repeated":
        changed[at:at] = changed[at : at + length]
    else:
        changed.clear()
    return f"{kind} at {at}", bytes(changed)


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 2**70, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "nan", "..", "../../etc/passwd",
    "/etc/passwd", "[/red]", "a\\b", "a\x00b", "\ud800", "é" * 300, "x" * 100_000, "(a+)+$",
    [], [[]], [None], [0] * 1000, {}, {"": None}, {"a": {"b": []}},
)  # fmt: skip


def mutate_json(chance: random.Random, value: Any) -> tuple[str, Any]:
    """A deep copy of what JSON can hold with one place changed, and what was done.

    A value is replaced by one of another type or size, removed, doubled or nested deeply; a name is
    changed or added.
    """
    changed = [copy.deepcopy(value)]  # so that the whole has a place of its own, too
    holder, key = chance.choice(list(_places(changed)))
    where = f"{key!r}" if holder is not changed else "the whole"
    kinds = ["replaced", "replaced", "replaced", "nested"]
    kinds += [] if holder is changed else ["removed", "doubled"]
    kinds += ["renamed", "added"] if isinstance(holder, dict) else []
    kind = chance.choice(kinds)
    old = holder[key]
    if kind == "replaced":
        holder[key] = copy.deepcopy(chance.choice(STRANGE))
        return f"{where} replaced by {repr(holder[key])[:40]}", changed[0]
    if kind == "nested":
        for _ in range(chance.choice((1, 2, 400))):
            holder[key] = [holder[key]]
    elif kind == "doubled":
        holder[key] = [old, old] if isinstance(holder, dict) else old
        if isinstance(holder, list):
            holder.insert(key, old)
    else:
        if kind in ("removed", "renamed"):
            del holder[key]
        if kind in ("renamed", "added"):
            holder[f"{key}x"] = old
    return f"{where} {kind}", changed[0]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key or index) in a tree of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])
