"""Files appear whole or not at all, and failures are one sentence."""

from __future__ import annotations

import os
import pathlib

import pytest

from moezoo.errors import UserError
from moezoo.files import check_file, check_writable, write_atomically


def test_text_and_bytes_are_written_with_their_folder(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "été")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "été"
    write_atomically(tmp_path / "a" / "b.txt", b"\x00")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\x00"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_folder_that_cannot_be_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(UserError, match="Could not write"):
            check_writable(folder)
        with pytest.raises(UserError, match="Could not write"):
            write_atomically(folder / "x", "")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "folder", "folder/"])
def test_a_folder_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for refuse in (check_file, lambda path: write_atomically(path, "new")):
        with pytest.raises(UserError, match="it is a folder; name a file in it"):
            refuse(name)
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == []


def test_read_only_folder_is_a_user_error(tmp_path, monkeypatch):
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write everywhere, so the disk refuses instead
        folder = "/proc/self/moezoo"
    with pytest.raises(UserError, match=f"Could not write to {folder}"):
        check_writable(folder)


def test_writable_folder_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path / "new" / "run") == []


def test_a_full_disk_keeps_no_probe(tmp_path, monkeypatch):
    """It takes the name of a file and not its content."""

    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        check_writable(tmp_path)
    assert os.listdir(tmp_path) == []
