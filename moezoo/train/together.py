"""What the processes of one run tell each other without their devices: waiting, sharing, failing.

Collectives of the devices are no place to wait for someone: on CPUs they give up after 30 seconds,
and a process that has failed leaves the others inside one for minutes. Everything here goes through
the coordination service that JAX keeps between the processes, and is nothing in a run of one.

Every process calls the same functions in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import jax

from moezoo.errors import UserError

T = TypeVar("T")
LONGEST = 7 * 24 * 3600 * 1000  # ms to wait for others; one that has failed says so before
LISTEN = 500  # ms of one question to the service
PARTING = 10.0  # seconds that a failing process waits for the others to hear of it
ALIKE = 2.0  # seconds within which processes fail that fail for the same reason
HEARD = 1.0  # seconds within which the reason of a broken connection arrives
FAILED, LEFT = "moezoo/failed", "moezoo/left"
# How a collective reports that the other side is gone.
BROKEN = ("gloo", "nccl", "rccl", "mpi", "connection", "unavailable", "coordination", "heartbeat")

# What a process says that ends because of another one; `moezoo.launch` looks for it in logs.
HEARD_OF = "error: process {} of this run has failed: {}"

_numbers = itertools.count()
_over = threading.Event()  # this process is about to end by itself
_told: list[Failure] = []  # what this process has to say about its own failure


class Agreed(Exception):
    """An end that all processes come to together; nobody has failed."""


class Failure(NamedTuple):
    """Which process failed first, what it said, and its exit code."""

    process: int
    said: str
    code: int


def _client() -> Any:
    # JAX offers no public way to its coordination service.
    from jax._src import distributed

    return distributed.global_state.client


def alone() -> bool:
    """Whether this is a run of one process."""
    return _client() is None or jax.process_count() == 1


def wait(name: str) -> None:
    """Return once every process of the run is here; raises UserError where that cannot be."""
    if alone():
        return
    found: list[BaseException] = []
    place = f"moezoo/{next(_numbers)}/{name}"

    def meet() -> None:
        try:
            _client().wait_at_barrier(place, LONGEST)
        except BaseException as error:
            found.append(error)

    # In a thread, so that this one still hears Ctrl-C.
    thread = threading.Thread(target=meet, daemon=True, name="barrier")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if found:
        raise UserError(f"Lost another process of this run ({_line(found[0])}).") from found[0]


def from_first(make: Callable[[], str]) -> str:
    """What `make` says on process 0, on every process."""
    if alone():
        return make()
    key = f"moezoo/{next(_numbers)}/shared"
    if jax.process_index() == 0:
        # A mark in front, because the service takes no empty text for an answer.
        _client().key_value_set(key, "=" + make())
    wait("shared")
    return _client().blocking_key_value_get(key, 60_000)[1:]


def gathered(said: str) -> list[str]:
    """What every process says, in the order of the processes, on every process."""
    if alone():
        return [said]
    key = f"moezoo/{next(_numbers)}/gathered"
    _client().key_value_set(f"{key}/{jax.process_index()}", "=" + said)
    wait("gathered")
    found = _client().key_value_dir_get(key)
    by_index = {int(name.rpartition("/")[2]): text[1:] for name, text in found}
    return [by_index[index] for index in range(jax.process_count())]


def first_alone(work: Callable[[], T]) -> T:
    """`work()` of every process, process 0's before the others'.

    So that what is made once on a disk that all share is made by one.
    """
    if alone():
        return work()
    if jax.process_index() == 0:
        made = work()
        wait("first")
        return made
    wait("first")
    return work()


def listen() -> None:
    """End this process as soon as another one of the run tells that it has failed."""
    if alone():
        return
    thread = threading.Thread(target=_listen, daemon=True, name="others")
    thread.start()

    def stop() -> None:
        _over.set()
        thread.join()

    atexit.register(stop)  # a thread that still listens while Python ends would crash it


def _listen() -> None:
    while not _over.is_set():
        try:
            text = _client().blocking_key_value_get(FAILED, LISTEN)
        except Exception as error:  # nothing was said so far, or the service is gone
            if "DEADLINE_EXCEEDED" not in str(error):
                return
            continue
        if not _over.is_set():
            told = Failure(*json.loads(text))
            # Where all fail for the same reason each of them ends by itself.
            if not _over.wait(ALIKE):
                _over.set()
                _leave(HEARD_OF.format(told.process, told.said), told.code)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """The work of a command: its end, good or bad, is that of all processes of the run.

    What is raised inside ends every process within seconds, with one sentence each and the same
    exit code. Without other processes this does nothing.
    """
    try:
        yield
        wait("end")
        _over.set()
    except BaseException as error:
        if alone() or isinstance(error, Agreed):
            raise
        tell(error)
        told = _told[0]
        if told.code == 1 and not _is_broken(error):
            traceback.print_exception(error)
        mark = "" if told.process == 0 else f"process {told.process}: "
        _leave(f"error: {mark}{told.said}", told.code)


def tell(error: BaseException) -> None:
    """Let the other processes know that this one fails, before it tidies up.

    They end within seconds, unless they fail for the same reason. `Agreed` is no failure.
    """
    if alone() or _told or isinstance(error, Agreed):
        return
    broken, index = _is_broken(error), jax.process_index()
    if broken and _over.wait(HEARD + ALIKE):  # the other process was saying why
        time.sleep(2 * PARTING)  # `_listen` ends this one
    _over.set()
    if broken:
        _told.append(Failure(index, f"Lost another process of this run ({_line(error)}).", 1))
    elif isinstance(error, UserError):
        _told.append(Failure(index, str(error), 2))
    elif isinstance(error, KeyboardInterrupt):
        _told.append(Failure(index, "interrupted", 130))
    else:
        _told.append(Failure(index, f"{type(error).__name__}: {_line(error)}", 1))
    with contextlib.suppress(Exception):  # another one was first, or the service is gone
        _client().key_value_set(FAILED, json.dumps(_told[0]))


def result(future: Future[T]) -> T:
    """The result of work that all processes do; UserError where this one fails without them."""
    while not (future.done() or alone() or _without_others()):
        futures.wait([future], 0.2)
    if _told and not future.done():
        raise UserError("Another process of this run failed; its own message says why.")
    return future.result()


def _without_others() -> bool:
    """Whether this process fails and the others cannot finish what they began together."""
    if not _told:
        return False
    try:
        return _told[0].said.startswith("Lost ") or bool(_client().key_value_dir_get(LEFT))
    except Exception:
        return True


def _is_broken(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in BROKEN)


def _leave(said: str, code: int) -> None:
    """End the process; the first one, which holds the service, once the others have heard."""
    print(said, file=sys.stderr, flush=True)
    sys.stdout.flush()
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{LEFT}/{jax.process_index()}", "heard")
        until = time.monotonic() + PARTING
        # A connection that closes before its cause is known would look like the cause.
        while len(_client().key_value_dir_get(LEFT)) < jax.process_count():
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        if jax.process_index() == 0:
            time.sleep(0.5)  # the last answers are on their way
    # JAX's own way out waits five minutes for processes that are gone.
    os._exit(code)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
