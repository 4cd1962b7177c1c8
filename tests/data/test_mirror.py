"""Data directories in an object store: made on one machine, fetched by the next."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from moezoo import storage
from moezoo.data import mirror, store
from tests.object_store import bucket, door

__all__ = ["bucket", "door"]


class Made(NamedTuple):
    data_dir: Path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Goes to a machine of this name, whose disk is its own."""

    def go(name: str) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / name))

    monkeypatch.delenv("MOEZOO_DATA", raising=False)
    go("first")
    return go


def prepare(data_dir: str, text: str, written: list[str]) -> Path:
    folder = store.directory(data_dir) / "set" / "1.0.0"

    def write(made: Made) -> None:
        written.append(text)
        made.data_dir.mkdir()
        (made.data_dir / "records").write_text(text)
        (made.data_dir / "sums.json").write_text("{}")

    return store.prepare(lambda: Made(folder), write, "waiting").data_dir


def test_local_directories_are_what_they_were(machine, monkeypatch) -> None:
    assert store.directory("data") == Path("data")
    assert store.directory(None) == Path.home() / ".cache" / "moezoo"
    assert mirror.far(Path("data")) is None and not mirror.fetched(Path("data"))
    assert mirror.far(mirror.cache() / "stores" / "gs") is None


def test_the_second_machine_fetches(machine, bucket: str, monkeypatch) -> None:
    written: list[str] = []
    prepare(f"{bucket}/data", "one", written)
    there = storage.place(f"{bucket}/data/set/1.0.0")
    assert sorted(path.name for path in there.iterdir()) == ["records", "sums.json"]
    machine("second")
    monkeypatch.setenv("MOEZOO_DATA", f"{bucket}/data")
    assert store.default_dir() == mirror.cache() / "stores" / "gs" / bucket[5:] / "data"
    folder = prepare(f"{bucket}/data", "two", written)
    assert (folder / "records").read_text() == "one" and written == ["one"]
    assert not list(folder.parent.glob("incomplete.*"))


def test_what_was_not_brought_to_its_end_is_made_again(machine, bucket: str) -> None:
    there = storage.place(f"{bucket}/data/set/1.0.0")
    (there / storage.UNFINISHED).write_text("")
    (there / "records").write_text("ha")
    written: list[str] = []
    prepare(f"{bucket}/data", "one", written)
    assert written == ["one"] and (there / "records").read_text() == "one"
    assert not (there / storage.UNFINISHED).exists()


def test_what_cannot_be_brought_there_is_said(machine, bucket: str, monkeypatch, capsys) -> None:
    def away(self: object, source: Path) -> None:
        raise OSError("the store answers no")

    monkeypatch.setattr("moezoo.object_path.StorePath.put", away)
    folder = prepare(f"{bucket}/data", "one", [])
    assert (folder / "records").read_text() == "one"
    assert "the data are on this disk only" in capsys.readouterr().err
