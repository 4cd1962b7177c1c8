"""The roll call of the processes of a run, with threads in the place of most processes."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from moezoo.errors import UserError
from moezoo.train import roll_call
from moezoo.train.roll_call import Meeting


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def said(place: Meeting) -> str | None:
    """What a process is told: nothing, or its one sentence."""
    try:
        roll_call.hold(place)
        return None
    except UserError as error:
        return str(error)


def all_say(places: list[Meeting]) -> list[str | None]:
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(said, places))


def places(port: int, *indices: int, count: int = 3, seconds: float = 20.0) -> list[Meeting]:
    return [Meeting("127.0.0.1", port, index, count, seconds) for index in indices]


def test_all_are_there(port: int) -> None:
    assert all_say(places(port, 2, 0, 1)) == [None] * 3
    assert all_say(places(port, 0, 1, 2)) == [None] * 3, "the port is free again"


def test_a_process_that_does_not_come_is_named_on_all(port: int) -> None:
    began = time.monotonic()
    found = all_say(places(port, 0, 1, seconds=1.5))
    assert time.monotonic() - began < 5
    assert found[0] == found[1] is not None
    assert f"Expected 3 processes, found 2 within 1.5 s (process 0 on {socket.gethostname()}" in (
        found[0] or ""
    )
    assert "missing: 2. Either start the same command on every host" in (found[0] or "")


def test_nobody_but_one_worker(port: int) -> None:
    (first,) = all_say(places(port, 0, seconds=0.5))
    assert first is not None and "found 1" in first and "missing: 1, 2" in first
    (other,) = all_say(places(port, 1, seconds=0.5))
    assert other is not None and f"did not find process 0 at 127.0.0.1:{port} within 0.5 s" in other


def test_the_same_number_twice(port: int) -> None:
    found = all_say(places(port, 0, 1, 1))
    assert len(set(found)) == 1, found
    assert "Two processes say that they are process 1 of this run" in (found[0] or "")


def test_another_number_of_processes(port: int) -> None:
    found = all_say([*places(port, 0), *places(port, 1, count=4)])
    assert len(set(found)) == 1, found
    assert "expects 4 processes, but process 0 expects 3" in (found[0] or "")


def test_another_configuration(port: int) -> None:
    settings = {"seed": "0", "train.batch": "8"}
    mine = [place._replace(settings=settings) for place in places(port, 0, 1)]
    other = places(port, 2)[0]._replace(settings=settings | {"train.batch": "4"})
    found = all_say([*mine, other])
    assert len(set(found)) == 1, found
    assert "train.batch is 4 in process 2 (" in (found[0] or "")
    assert "but 8 in process 0 (" in (found[0] or "")


@pytest.mark.parametrize("name", roll_call.SAME)
def test_other_versions(name: str) -> None:
    place = Meeting("here", 1, 0, 2, 1.0)
    first = roll_call.record(place)
    other = first | {"index": 1, "host": "there", name: "0.0.7"}
    sentence = roll_call.judge([first, other], place)
    assert sentence is not None
    assert sentence.startswith("Process 1 (there, pid ") and "0.0.7, but process 0" in sentence
    assert sentence.endswith("install the same on every host.")
    assert roll_call.judge([first, first | {"index": 1}], place) is None


def test_a_host_that_is_not_there(port: int) -> None:
    sentence = said(Meeting("nobody.invalid", port, 1, 2, 0.5))
    assert sentence is not None and "there is no host 'nobody.invalid'" in sentence


def test_a_port_that_another_program_has(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "FREE", 0.3)
    with socket.create_server(("127.0.0.1", port)):
        sentence = said(*places(port, 0))
    assert sentence is not None
    assert f"Process 0 cannot listen at port {port}" in sentence and "JAX_COORDINATOR_PORT" in (
        sentence
    )


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9\r\n", b'{"other": 1}\n', b"[1]\n", b""])
def test_what_answers_is_something_else(port: int, answer: bytes) -> None:
    def serve(server: socket.socket) -> None:
        while True:
            try:
                wire, _ = server.accept()
            except OSError:
                return
            with wire:
                wire.sendall(answer)

    server = socket.create_server(("127.0.0.1", port))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve, server)
        sentence = said(*places(port, 1, seconds=0.6))
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    assert sentence is not None and "what answers there is no run" in sentence


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 20_000,
        b"[]\n",
        json.dumps({roll_call.CALL: {"index": -1, "count": 3, "host": "x", "pid": 1}}).encode(),
        json.dumps({roll_call.CALL: {"index": "1", "count": 3, "host": "x", "pid": 1}}).encode(),
        b"[" * 16_000 + b"\n",
    ],
)
def test_strangers_are_not_counted(port: int, noise: bytes) -> None:
    def disturb() -> None:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", port), 1.0) as wire:
                    wire.sendall(noise + b"\n")
                    return
            except OSError:
                time.sleep(0.02)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(said, *places(port, 0))
        pool.submit(disturb).result()
        others = [pool.submit(said, place) for place in places(port, 1, 2)]
        assert [first.result(), *(one.result() for one in others)] == [None] * 3


@pytest.mark.parametrize(
    "address", ["host", "host:", ":80", "host:0", "host:65536", "a b:80", "h:x"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match=r"hosts.coordinator is .* give HOST:PORT"):
        roll_call.parted(address)


def test_addresses() -> None:
    assert roll_call.parted("10.0.0.2:8476") == ("10.0.0.2", 8476)
    assert roll_call.parted("[::1]:80") == ("::1", 80)


def test_a_number_beyond_the_last() -> None:
    sentence = said(Meeting("localhost", 1, 2, 2, 1.0))
    assert sentence is not None and "hosts.index is 2, but there are 2 processes" in sentence
