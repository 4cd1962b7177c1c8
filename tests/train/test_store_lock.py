"""The lease that keeps a second process out of a run's folder in an object store."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from moezoo import storage
from moezoo.errors import UserError
from moezoo.train import store_lock
from moezoo.train.lock import locked
from tests.object_store import Door, bucket, door

__all__ = ["bucket", "door"]


@pytest.fixture
def run(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, where a lease lasts for a second."""
    for name, seconds in (("BEAT", 0.2), ("LEASE", 1.0), ("LOOK", 0.1)):
        monkeypatch.setattr(store_lock, name, seconds)
    return storage.place(bucket) / "run"


def write(run: Path, **changes: object) -> None:
    holder = {"process": 12, "host": "elsewhere", "space": "", "token": "other"}
    (run / store_lock.NAME).write_text(json.dumps(holder | changes))


def holder(run: Path) -> dict:
    return json.loads((run / store_lock.NAME).read_text())


def test_one_has_it_and_gives_it_back(run: Path) -> None:
    for _ in range(2):
        with locked(run):
            assert holder(run)["process"] == os.getpid()
        assert holder(run) == {}


def test_it_is_renewed(run: Path) -> None:
    with locked(run):
        before = (run / store_lock.NAME).stat()
        time.sleep(0.6)
        assert (run / store_lock.NAME).stat() != before


def test_a_second_process_is_refused(run: Path) -> None:
    said: list[str] = []
    with locked(run), pytest.raises(UserError, match="is in use by process") as raised:
        with locked(run, said.append):
            pass
    assert "choose another --name" in str(raised.value)
    assert "looking for 1 s" in said[0]


def test_what_nobody_renews_is_taken(run: Path) -> None:
    write(run)
    began = time.monotonic()
    with locked(run, lambda sentence: None):
        assert holder(run)["process"] == os.getpid()
    assert time.monotonic() - began > 1.0


def test_of_an_ended_process_of_this_machine_it_is_taken_at_once(run: Path) -> None:
    own = {"host": socket.gethostname(), "space": store_lock._space()}
    for number in (2**22 + 1, os.getpid()):  # nobody's, and ours in an earlier container
        write(run, process=number, **own)
        said: list[str] = []
        with locked(run, said.append):
            assert holder(run)["token"] != "other"
        assert not said


def test_damage_is_nobodys(run: Path) -> None:
    (run / store_lock.NAME).write_bytes(b"\xff{")
    with locked(run):
        pass


def test_of_two_that_want_it_one_gets_it(run: Path) -> None:
    first, second = store_lock.Lease(run), store_lock.Lease(run)
    seen = first.seen()
    assert first.write(first.me, seen.version)
    assert not second.write(second.me, seen.version)
    assert first.renew() and not second.renew()


def test_who_lost_it_ends(run: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), locked(run, said.append):
        write(run, token="stolen")
        time.sleep(10)
    assert "was taken by another process" in said[0]
    assert holder(run)["token"] == "stolen"  # and is not given back by the loser


def test_a_store_that_is_away_is_no_loss(run: Path, door: Door) -> None:
    with locked(run):
        door.shut(1.0)
        time.sleep(1.5)
        assert holder(run)["process"] == os.getpid()


def test_without_bucket_it_is_one_sentence(door: Door) -> None:
    with pytest.raises(UserError, match="no such bucket; check the bucket's name"):
        with locked(storage.place("gs://no-such-bucket/run")):
            pass
