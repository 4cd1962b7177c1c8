"""What all stored data sets share: one writer at a time, whole records or nothing."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from moezoo.data import store
from moezoo.data.records import records
from moezoo.errors import UserError
from tests.data import toy


class Builder:
    """As much of a tfds builder as the store uses; `held` are the records that can be read."""

    def __init__(self, folder: Path, held: list[Any]):
        self.data_dir, self.held = str(folder / "toy/1.0.0"), held
        self.info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=3)})
        self.running = ExitStack()

    def as_data_source(self, split: str) -> list[Any]:
        return self.held

    def download_and_prepare(self, file_format: str) -> None:
        assert file_format == "array_record"
        data = Path(self.data_dir).parents[1]
        (data / "downloads/extracted").mkdir(parents=True)
        write(self)


def write(builder: Any) -> None:
    Path(builder.data_dir).mkdir()
    (Path(builder.data_dir) / "records").write_text("x")


WHOLE = [{"a": 1}] * 3


def test_written_once_and_opened_anew(tmp_path: Path) -> None:
    built, written = [], []

    def build() -> Builder:
        built.append(Builder(tmp_path, WHOLE))
        return built[-1]

    def record(builder: Any) -> None:
        assert not list(Path(builder.data_dir).parent.glob("incomplete*"))
        written.append(builder)
        write(builder)

    left = tmp_path / "toy/incomplete.ABC_1.0.0"
    left.mkdir(parents=True)
    first = store.prepare(build, record, "waiting")
    assert written == built[:1] and first is built[1] and not left.exists()
    assert store.prepare(build, record, "waiting") is built[2] and len(written) == 1


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fail(builder: Any) -> None:
        write(builder)
        raise error

    with pytest.raises(type(error)):
        store.prepare(lambda: Builder(tmp_path, WHOLE), fail, "waiting")
    assert [p.name for p in (tmp_path / "toy").iterdir()] == [".lock"]


def test_the_second_waits_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    written = []

    def slow(builder: Any) -> None:
        written.append(builder)
        time.sleep(0.3)
        write(builder)

    def work() -> None:
        store.prepare(lambda: Builder(tmp_path, WHOLE), slow, "toy: waiting.")

    both = [Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(written) == 1 and capsys.readouterr().err == "toy: waiting.\n"


def test_generated_records_are_read_back(tmp_path: Path) -> None:
    ended = []
    builder = Builder(tmp_path, WHOLE)
    builder.running.callback(lambda: ended.append("reading"))
    (tmp_path / "toy").mkdir()
    store.generate(builder, tmp_path)
    assert ended == ["reading"] and not (tmp_path / "downloads").exists()
    shutil.rmtree(builder.data_dir)
    builder.held = WHOLE[:2]
    with pytest.raises(OSError, match="the train records are incomplete"):
        store.generate(builder, tmp_path)
    assert not (tmp_path / "downloads").exists()


class Broken(list):
    def __getitem__(self, index: Any) -> Any:
        raise ValueError("no such record")


@pytest.mark.parametrize("held", [[], WHOLE[:2], [*WHOLE[:2], {}], Broken(WHOLE)])
def test_records_that_are_not_whole(held: list, tmp_path: Path) -> None:
    builder = Builder(tmp_path, held)
    with pytest.raises(OSError, match="the train records are incomplete .is the disk full"):
        store.check_complete(builder)
    with pytest.raises(UserError, match="toy/1.0.0' is damaged.*; delete that folder"):
        records(builder, "train")


def test_whole_records(tmp_path: Path) -> None:
    builder = Builder(tmp_path, WHOLE)
    store.check_complete(builder)
    assert list(records(builder, "train").found) == WHOLE


def test_a_real_builder(tmp_path: Path) -> None:
    """Splits are expressions of tfds; a part of one is no less whole."""

    def make(builder: Any) -> None:
        builder.running = ExitStack()
        store.generate(builder, tmp_path)

    builder = store.prepare(lambda: toy.MappedToy(data_dir=str(tmp_path)), make, "waiting")
    assert len(records(builder, "train[:30%]")) == 3
    assert len(records(builder, "validation")) == 10
    with pytest.raises(UserError, match="is damaged"):
        records(builder, "test")


TROUBLE: list[tuple[Callable[[], BaseException], str]] = [
    (lambda: OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (lambda: OSError("it needs 5 MB"), "it needs 5 MB"),
    (lambda: RuntimeError("writer: File too large; closed"), "File too large"),
]


@pytest.mark.parametrize(("make", "words"), TROUBLE)
def test_what_the_system_refuses(make: Callable[[], BaseException], words: str) -> None:
    with pytest.raises(UserError, match=f"Cannot keep it in '/data': {words}; choose another"):
        with store.explained("keep it in", Path("/data")):
            raise make()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("No space left on device")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        with store.explained("keep it in", Path("/data")):
            raise error
    assert caught.value is error


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    store.check_space(3_000_000, tmp_path)
    with pytest.raises(OSError, match="it needs 4 MB meanwhile, but only 3 MB are free"):
        store.check_space(4_000_000, tmp_path)


def test_quiet_is_over_afterwards(capsys: Any) -> None:
    logger = logging.getLogger("absl")
    before = logger.level
    with pytest.raises(KeyError), store.quiet():
        print("from the builder")
        assert logger.level == logging.ERROR
        raise KeyError
    print("from the caller")
    assert logger.level == before and capsys.readouterr().out == "from the caller\n"


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEZOO_DATA", str(tmp_path))
    assert store.default_dir() == tmp_path
    monkeypatch.delenv("MOEZOO_DATA")
    assert store.default_dir() == Path.home() / ".cache" / "moezoo"
