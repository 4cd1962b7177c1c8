"""Whether all processes of a run are there and are alike, asked before JAX connects them.

JAX waits for processes that never come, and ends those that it cannot join with a stack trace of
C++. So process 0 first listens itself at the address where JAX will: every other process says who
it is and with what it runs, and all are told the same sentence about what is wrong, or that nothing
is. Then the port is free again, for JAX.

One line of JSON goes each way. Whoever is no process of a run is not answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import moezoo
from moezoo.errors import UserError

CALL = "moezoo roll call"  # by which a process of a run is told from whatever else knocks
LONGEST_LINE = 65_536  # bytes: a configuration has a few hundred short settings
AGAIN = 0.25  # seconds between two attempts to reach process 0
FREE = 10.0  # seconds for whoever had the port before to leave it
VERDICT = 10.0  # seconds beyond the time to wait, in which process 0 says what it has found
LATER = 5.0  # seconds in which those who come later hear what is wrong with others
SAME = ("moezoo", "code", "jax", "jaxlib")  # what has to be alike
TOLD = {
    "moezoo": "moezoo {}",
    "code": "a moezoo whose files have the checksum {}",
    "jax": "jax {}",
    "jaxlib": "jaxlib {}",
}
START = "start the same command on every host"


class Meeting(NamedTuple):
    """Where process 0 listens, which process this is, of how many, and how long it waits.

    settings: those of the run that have to be alike, as short texts by name.
    """

    host: str
    port: int
    index: int
    count: int
    seconds: float
    settings: Mapping[str, str] = MappingProxyType({})

    @property
    def address(self) -> str:
        """As JAX takes it."""
        return f"{self.host}:{self.port}"


CallRecord = dict[str, Any]  # what a process says of itself


def parted(address: str, name: str = "hosts.coordinator") -> tuple[str, int]:
    """Host and port of an address; UserError for one that is none."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    fits = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    if not (colon and host and fits) or any(letter.isspace() for letter in address):
        raise UserError(
            f"{name} is '{address}', which is no address: give HOST:PORT of process 0, for example "
            "10.0.0.2:8476."
        )
    return host, int(port)


@cache
def checksum() -> str:
    """A short checksum of the package's own files, which its version does not tell apart."""
    sums, top = hashlib.sha256(), Path(moezoo.__file__).parent
    for folder, below, files in os.walk(top):
        below.sort()
        for name in sorted(file for file in files if file.endswith(".py")):
            path = Path(folder, name)
            sums.update(path.relative_to(top).as_posix().encode() + b"\0" + path.read_bytes())
    return sums.hexdigest()[:12]


def record(place: Meeting) -> CallRecord:
    """What this process says of itself."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    own = {"index": place.index, "count": place.count, "host": socket.gethostname()}
    own |= {"pid": os.getpid(), "moezoo": moezoo.__version__, "code": checksum()}
    own |= {"settings": dict(place.settings)}
    return own | versions


def hold(place: Meeting) -> None:
    """Return on every process once all are there and alike.

    Raises UserError, with the same sentence on all that can be reached, where they are not.
    """
    if place.index >= place.count:
        raise UserError(
            f"hosts.index is {place.index}, but there are {place.count} processes (hosts.count), "
            "numbered from 0."
        )
    said = _call(place) if place.index == 0 else _answer(place)
    if said is not None:
        raise UserError(said)


def judge(records: Sequence[CallRecord], place: Meeting) -> str | None:
    """What is wrong with the processes that are there so far, None where nothing is."""
    seen: dict[int, CallRecord] = {}
    for one in records:
        index, count = one["index"], one["count"]
        if count != place.count:
            return (
                f"Process {index} ({_at(one)}) expects {count} processes, but process 0 expects "
                f"{place.count}: {START}, with the same hosts.count."
            )
        if index in seen:
            return (
                f"Two processes say that they are process {index} of this run ({_at(seen[index])} "
                f"and {_at(one)}): start each number (hosts.index) once."
            )
        seen[index] = one
    for index in sorted(seen):
        for name in SAME:
            here, first = seen[index].get(name), records[0].get(name)
            if here != first:
                return (
                    f"Process {index} ({_at(seen[index])}) runs {TOLD[name].format(here)}, but "
                    f"process 0 ({_at(records[0])}) runs {TOLD[name].format(first)}: install the "
                    "same on every host."
                )
        if (other := _other_setting(seen[index], records[0])) is not None:
            return other
    return None


def _other_setting(one: CallRecord, first: CallRecord) -> str | None:
    """The first setting in which a process differs from process 0."""
    here, there = one.get("settings", {}), first.get("settings", {})
    for name in [*there, *(n for n in here if n not in there)]:
        if here.get(name) != there.get(name):
            return (
                f"{name} is {here.get(name, 'not there')} in process {one['index']} ({_at(one)}), "
                f"but {there.get(name, 'not there')} in process 0 ({_at(first)}): {START}."
            )
    return None


def absent(records: Sequence[CallRecord], place: Meeting) -> str:
    """The sentence for processes that did not come in time."""
    here = {one["index"]: one["host"] for one in records}
    gone = [str(index) for index in range(place.count) if index not in here]
    few = ", ".join(gone[:6]) + (", ..." if gone[6:] else "")
    found = ", ".join(f"{index} on {here[index]}" for index in sorted(here)[:6])
    return (
        f"Expected {place.count} processes, found {len(here)} within {place.seconds:g} s (process "
        f"{found}{', ...' if len(here) > 6 else ''}); missing: {few}. Either {START}, or raise "
        "--hosts.timeout where hosts come late."
    )


def _at(one: CallRecord) -> str:
    return f"{one['host']}, pid {one['pid']}"


# Process 0: listening.


def _call(place: Meeting) -> str | None:
    """Listen until everybody was here or something is wrong; tell them, and return it."""
    with _listening(place) as listener, selectors.DefaultSelector() as ears:
        ears.register(listener, selectors.EVENT_READ)
        guests: dict[socket.socket, _Guest] = {}
        until, verdict = time.monotonic() + place.seconds, None
        try:
            while True:
                known = [record(place)] + [g.said for g in guests.values() if g.said is not None]
                if verdict is None and (verdict := judge(known, place)) is not None:
                    until = min(until, time.monotonic() + LATER)  # others shall hear it, too
                left = until - time.monotonic()
                if len(known) < place.count and left > 0:
                    _hear(ears, listener, guests, left)
                    continue
                if verdict is None and len(known) < place.count:
                    verdict = absent(known, place)
                _tell(guests, verdict)
                return verdict
        finally:
            for guest in guests:
                guest.close()


class _Guest:
    """A connection, what came through it so far, and the record that this was, once complete."""

    def __init__(self) -> None:
        self.heard, self.said = b"", None

    said: CallRecord | None

    def add(self, part: bytes) -> bool:
        """Take what came; whether this may still be a process of a run."""
        self.heard += part
        if self.said is None and b"\n" in self.heard:
            self.said = _read(self.heard)
            return self.said is not None
        return bool(part) and len(self.heard) < LONGEST_LINE


def _read(line: bytes) -> CallRecord | None:
    """The record in a line, None for anything else."""
    try:
        held = json.loads(line.partition(b"\n")[0])[CALL]
        kinds = {"index": int, "count": int, "host": str, "pid": int}
        fits = all(type(held[name]) is kind for name, kind in kinds.items())
        fits = fits and isinstance(held.get("settings", {}), dict)
        return held if fits and held["index"] >= 0 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _hear(
    ears: selectors.BaseSelector,
    listener: socket.socket,
    guests: dict[socket.socket, _Guest],
    seconds: float,
) -> None:
    """Take in what arrives next: somebody, or what somebody says; those who leave are forgotten."""
    for key, _ in ears.select(min(seconds, 1.0)):
        if key.fileobj is listener:
            with contextlib.suppress(OSError):
                guest, _ = listener.accept()
                guest.setblocking(False)
                guests[guest] = _Guest()
                ears.register(guest, selectors.EVENT_READ)
            continue
        guest = key.fileobj
        assert isinstance(guest, socket.socket)
        try:
            stays = guests[guest].add(guest.recv(LONGEST_LINE))
        except OSError:
            stays = False
        if not stays:
            ears.unregister(guest)
            guests.pop(guest)
            guest.close()


def _tell(guests: Mapping[socket.socket, _Guest], verdict: str | None) -> None:
    line = json.dumps({CALL: verdict}).encode() + b"\n"
    for guest, held in guests.items():
        if held.said is not None:
            with contextlib.suppress(OSError):  # it has left
                guest.sendall(line)


def _listening(place: Meeting) -> socket.socket:
    """A socket that listens at the port; UserError where somebody else has it."""
    until, reason = time.monotonic() + min(FREE, place.seconds), "it is in use"
    while True:
        # JAX's own server shares a port with another one of its kind and would not notice.
        if not _is_answered(place.port):
            try:
                return _bound(place.port)
            except OSError as error:
                reason = error.strerror or str(error)
        if time.monotonic() > until:
            raise UserError(
                f"Process 0 cannot listen at port {place.port} of {socket.gethostname()} "
                f"({reason}): another run may be there; choose another port (--hosts.coordinator "
                "HOST:PORT, or JAX_COORDINATOR_PORT where hosts are found by themselves)."
            )
        time.sleep(AGAIN)


def _bound(port: int) -> socket.socket:
    """Over IPv6 and IPv4 where the host has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, reuse_port=True
            )
    return socket.create_server(("", port), reuse_port=True)


def _is_answered(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1.0):
        return True
    return False


# The other processes: saying who they are.


def _answer(place: Meeting) -> str | None:
    """Reach process 0 and return what it says; UserError where it is not to be reached."""
    line = json.dumps({CALL: record(place)}).encode() + b"\n"
    until, reason = time.monotonic() + place.seconds, "nobody answers"
    while time.monotonic() < until:
        try:
            with socket.create_connection((place.host, place.port), 5.0) as wire:
                heard = _exchanged(wire, line, place.seconds + VERDICT)
            if heard is not None:
                return heard[CALL]
            # Perhaps whoever had the port before, who leaves.
            reason = "what answers there is no run that is being started"
        except socket.gaierror:
            reason = f"there is no host '{place.host}' on this network"
        except OSError as error:
            reason = f"nobody answers: {error.strerror or error}"
        time.sleep(AGAIN)
    raise UserError(
        f"Process {place.index} of {place.count} did not find process 0 at {place.address} within "
        f"{place.seconds:g} s ({reason}): check the address (hosts.coordinator, the same on all), "
        f"and {START}."
    )


def _exchanged(wire: socket.socket, line: bytes, seconds: float) -> dict[str, Any] | None:
    """The verdict that comes for a line, None where something else does, or nothing."""
    heard = b""
    try:
        wire.settimeout(seconds)
        wire.sendall(line)
        while b"\n" not in heard and len(heard) < LONGEST_LINE:
            part = wire.recv(LONGEST_LINE)
            if not part:
                return None
            heard += part
        held = json.loads(heard.partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return None
    fits = isinstance(held, dict) and isinstance(held.get(CALL, 0), str | None)
    return held if fits else None
