"""Folders on a disk and in an emulated object store: the same operations, the same answers."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from moezoo import plain_path, regular, storage
from moezoo.errors import UserError
from moezoo.files import check_file, check_writable, write_atomically
from moezoo.train import manifest
from tests.object_store import Door, bucket, door, refuses

__all__ = ["bucket", "door"]


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "disk":
        return tmp_path / "folder"
    return storage.place(request.getfixturevalue("bucket")) / "folder"


def test_local_paths_stay_what_they_are(tmp_path: Path) -> None:
    assert storage.place(tmp_path) is tmp_path
    assert storage.place("runs/a") == Path("runs/a")
    assert not storage.is_stored("runs/gs:/a") and storage.local(tmp_path) is tmp_path


def test_what_pathlib_made_of_a_url_is_one_again(bucket: str) -> None:
    broken = Path(bucket) / "runs"
    assert str(broken).startswith("gs:/tests")
    assert str(storage.place(broken) / "a") == f"{bucket}/runs/a"
    assert storage.place(storage.place(broken)) == storage.place(f"{bucket}/runs")
    assert not (Path.cwd() / "gs:").exists()


@pytest.mark.parametrize("url", ["gs://", "gs://Upper/runs", "gs:/b"])
def test_a_url_without_bucket_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="names no bucket: write gs://BUCKET/FOLDER"):
        storage.place(url)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from moezoo import object_path

    def none(name: str) -> None:
        raise ImportError(f"{name} needs gcsfs")

    object_path.system.cache_clear()
    monkeypatch.setattr("fsspec.filesystem", none)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[gcs\]', or name a local folder"):
        storage.place("gs://some-bucket/runs")
    with pytest.raises(UserError, match="pip install s3fs"):
        storage.place("s3://some-bucket/runs")


def test_files_are_written_whole_read_listed_and_removed(folder: Path) -> None:
    assert not folder.exists()
    write_atomically(folder / "a.txt", "one")
    write_atomically(folder / "a.txt", "two")
    write_atomically(folder / "deep" / "b.bin", b"\0\1")
    assert (folder / "a.txt").read_text() == "two"
    assert (folder / "deep" / "b.bin").read_bytes() == b"\0\1"
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "deep"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    assert names == ["a.txt", "deep/b.bin"]
    assert [path.name for path in folder.glob("*.txt")] == ["a.txt"]
    assert folder.is_dir() and not folder.is_file() and (folder / "a.txt").is_file()
    assert (folder / "a.txt").stat().st_size == 3
    (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    assert not (folder / "a.txt").exists()
    storage.remove_tree(folder)
    assert not folder.exists()


def test_a_name_that_begins_alike_is_another_folder(folder: Path) -> None:
    write_atomically(folder / "run10" / "a", "x")
    assert not (folder / "run1").exists() and not (folder / "run1").is_dir()
    storage.remove_tree(folder / "run1")
    assert (folder / "run10" / "a").exists()


def test_missing_files_are_missing(folder: Path) -> None:
    write_atomically(folder / "a.txt", "x")
    with pytest.raises(FileNotFoundError):
        (folder / "b.txt").read_bytes()
    with pytest.raises(FileNotFoundError):
        (folder / "b.txt").stat()
    with pytest.raises(FileNotFoundError):
        (folder / "b.txt").unlink()


def test_files_are_read_up_to_a_size(folder: Path) -> None:
    write_atomically(folder / "a.txt", "x" * 100)
    assert regular.read(folder / "a.txt", 100, ValueError) == b"x" * 100
    assert regular.check(folder / "a.txt", 100, ValueError) == 100
    assert regular.trouble(folder / "a.txt", 100) is None
    with pytest.raises(ValueError, match="at most"):
        regular.read(folder / "a.txt", 99, ValueError)
    with pytest.raises(ValueError, match="is missing"):
        regular.read(folder / "b.txt", 99, ValueError)
    with pytest.raises(ValueError, match="is a folder, not a file"):
        regular.check(folder, 99, ValueError)


def test_where_files_can_go_is_tried_first(folder: Path) -> None:
    check_writable(folder)
    check_file(folder / "a.txt")
    assert list(folder.iterdir()) == []
    write_atomically(folder / "a" / "b", "x")
    with pytest.raises(UserError, match="it is a folder; name a file in it"):
        check_file(folder / "a")


def test_checksums_are_the_same_everywhere(folder: Path) -> None:
    content = os.urandom(9 * 2**20)  # more than one block
    write_atomically(folder / "a.bin", content)
    assert manifest.checksum(folder / "a.bin") == hashlib.sha256(content).hexdigest()


def test_an_order_is_kept(folder: Path) -> None:
    assert storage.each(lambda x: x * x, range(20), folder) == [x * x for x in range(20)]


def test_no_bucket_is_one_sentence(door: Door) -> None:
    place = storage.place("gs://no-such-bucket/runs")
    with pytest.raises(UserError, match="no such bucket; check the bucket's name"):
        check_writable(place)
    assert not place.exists()
    plain_path.check(place / "a", "--name")
    with pytest.raises(UserError, match="has the character"):
        plain_path.check(place / "a[b]", "--name")


def test_nothing_is_renamed_or_appended(bucket: str) -> None:
    place = storage.place(bucket) / "a"
    place.write_text("x")
    refuses(lambda: place.rename(place), "renames nothing")
    refuses(lambda: place.open("a"), "only be opened to read bytes")


def test_a_folder_comes_there_and_back(bucket: str) -> None:
    folder = storage.place(bucket) / "export"
    for text in ("one", "two"):
        with storage.written(folder) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / text).write_text(text)
            (temporary / "manifest.json").write_text(text)
    copy = storage.local(folder)
    found = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    assert found == ["manifest.json", "sub/two"]  # nothing of the first
    assert storage.local(folder) == copy  # is not fetched twice
    (folder / "manifest.json").write_text("other")
    assert (storage.local(folder) / "manifest.json").read_text() == "other"
    assert storage.local(folder / "sub" / "two").read_text() == "two"
    assert storage.local(folder / "none") == folder / "none"


def test_what_fails_on_the_way_leaves_the_old_folder(bucket: str) -> None:
    folder = storage.place(bucket) / "export"
    (folder / "manifest.json").write_text("old")
    with pytest.raises(RuntimeError), storage.written(folder) as temporary:
        (temporary / "manifest.json").write_text("new")
        raise RuntimeError
    assert (folder / "manifest.json").read_text() == "old"


def test_a_folder_that_was_not_finished_is_none(bucket: str, monkeypatch) -> None:
    from moezoo.object_path import StorePath

    folder, put = storage.place(bucket) / "export", StorePath.put

    def broken(self: StorePath, source: Path) -> None:
        if self.name == "manifest.json":
            raise OSError(errno.EIO, "away")
        put(self, source)

    monkeypatch.setattr(StorePath, "put", broken)
    with pytest.raises(OSError), storage.written(folder) as temporary:
        (temporary / "weights").write_text("new")
        (temporary / "manifest.json").write_text("new")
    with pytest.raises(UserError, match="was not written to its end: write it again"):
        storage.local(folder)
    assert storage.free(folder)  # and may be written again
    monkeypatch.undo()
    with storage.written(folder) as temporary:
        (temporary / "manifest.json").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_a_store_that_is_away_for_a_while_is_asked_again(bucket: str, door: Door) -> None:
    folder = storage.place(bucket) / "run"
    (folder / "a").write_text("here")
    door.shut(3)
    began = time.monotonic()
    assert (folder / "a").exists()  # a question without answer is no "no"
    assert time.monotonic() - began > 2 and door.refused
    door.shut(3)
    write_atomically(folder / "b", "too")
    door.shut(3)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert (folder / "b").read_text() == "too"


def test_a_store_that_stays_away_is_an_error_and_no_answer(
    bucket: str, door: Door, monkeypatch
) -> None:
    async def no_pause(seconds: float) -> None:
        return None

    folder = storage.place(bucket) / "run"
    (folder / "a").write_text("here")
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", no_pause)
    door.shut(60)
    try:
        refuses(folder.exists, "the store answers")
        refuses(lambda: list(folder.iterdir()), "the store answers")
        with pytest.raises(UserError, match="your permissions and the network"):
            write_atomically(folder / "b", "x")
    finally:
        door.shut(0)
    assert not (folder / "b").exists()
