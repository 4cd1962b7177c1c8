"""Preparing tfds data sets: archives by hand, downloads from a server, and what fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import requests
from tensorflow_datasets.core.download import checksums

from moezoo.data import tfds_store
from moezoo.domains.images.data import oxford_pets_builder
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.errors import UserError
from tests.data import toy
from tests.domains.images.data import pets


@pytest.fixture
def packed(pets_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two archives, whose checksums are the expected ones."""
    folder = pets.pack(pets_place, tmp_path / "packed")
    infos = {
        url: checksums.compute_url_info(folder / f"{name}.tar.gz")
        for name, url in oxford_pets_builder.URLS.items()
    }
    monkeypatch.setattr(oxford_pets_builder.Pets, "url_infos", infos)
    return folder


def test_archives_as_downloaded_by_hand(
    packed: Path, pets_config: DataConfig, tmp_path: Path
) -> None:
    given = replace(pets_config, archive=str(packed), data_dir=str(tmp_path / "data"))
    source = open_source(given, "train")
    for k in range(len(source)):
        for key, value in open_source(pets_config, "train")[k].items():
            np.testing.assert_array_equal(source[k][key], value)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["oxford_pets"]
    (packed / "images.tar.gz").write_bytes(b"")  # it is not read again
    assert len(open_source(given, "test")) == 3


def test_a_damaged_archive(packed: Path, pets_config: DataConfig, tmp_path: Path) -> None:
    given = replace(pets_config, archive=str(packed), data_dir=str(tmp_path / "data"))
    path = packed / "images.tar.gz"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="checksum is not the one that tfds knows"):
        open_source(given, "train")
    infos = oxford_pets_builder.Pets.url_infos
    infos[oxford_pets_builder.URLS["images"]] = checksums.compute_url_info(path)  # type: ignore
    with pytest.raises(UserError, match=r"unpacked \((truncated|unexpected end).*\): download"):
        open_source(given, "train")
    path.unlink()
    with pytest.raises(UserError, match="has no images.tar.gz: put both archives"):
        open_source(given, "train")
    assert pets.nothing_left(tmp_path / "data")


@pytest.fixture
def server(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The archives under addresses of this machine; the list of what was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(f"{self.command} {self.path}")

    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(packed)))
    Thread(target=serving.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{serving.server_port}"
    urls = {name: f"{base}/{name}.tar.gz" for name in oxford_pets_builder.URLS}
    infos = {url: checksums.compute_url_info(packed / Path(url).name) for url in urls.values()}
    monkeypatch.setattr(oxford_pets_builder, "URLS", urls)
    monkeypatch.setattr(oxford_pets_builder.Pets, "url_infos", infos)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    serving.shutdown()
    serving.server_close()


def test_downloading(server: list[str], pets_config: DataConfig, tmp_path: Path) -> None:
    given = replace(pets_config, archive=None, data_dir=str(tmp_path / "data"))
    source = open_source(given, "test")
    np.testing.assert_array_equal(source[1]["image"], open_source(pets_config, "test")[1]["image"])
    assert {line for line in server if line.startswith("GET")} == {
        "GET /images.tar.gz",
        "GET /annotations.tar.gz",
    }
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["oxford_pets"]


def test_finished_downloads_survive_a_failure(
    server: list[str], packed: Path, pets_config: DataConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    given = replace(pets_config, archive=None, data_dir=str(tmp_path / "data"))
    failing = pytest.MonkeyPatch()
    failing.setattr(oxford_pets_builder, "trimap", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_source(given, "train")
    failing.undo()
    assert not (tmp_path / "data/downloads/oxford_pets/extracted").exists()
    first = len(server)
    assert len(open_source(given, "train")) == 4 and len(server) == first == 3


def test_a_server_without_the_archive(
    server: list[str], packed: Path, pets_config: DataConfig, tmp_path: Path
) -> None:
    (packed / "images.tar.gz").unlink()
    given = replace(pets_config, archive=None, data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"Cannot download oxford_iiit_pet \(.*404"):
        open_source(given, "train")
    assert not list((tmp_path / "data").glob("**/*.tmp.*"))


def test_no_network(
    pets_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(url: str, **_: Any) -> None:
        asked.append(url)
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", refuse)
    given = replace(pets_config, archive=None, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"Cannot download oxford_iiit_pet \(no route\): try again"):
        open_source(given, "train")
    assert asked == [oxford_pets_builder.URLS["annotations"]] and pets.nothing_left(tmp_path)


def test_no_room(pets_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(requests, "head", lambda *_, **__: pytest.fail("asked the server"))
    given = replace(pets_config, archive=None, data_dir=str(tmp_path))
    with pytest.raises(
        UserError, match="needs 3244 MB meanwhile, but only 3000 MB are free; choose"
    ):
        open_source(given, "train")
    assert pets.nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'tensorflow'"), "a package that is not installed"),
        (requests.Timeout("too slow"), r"Cannot download toy \(too slow"),
        (OSError(28, "No space left on device"), "Cannot prepare toy in .*: No space left"),
    ],
)
def test_preparation_that_fails(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.MappedToy, "fails", error)
    with pytest.raises(UserError, match=words):
        tfds_store.prepare(toy.MAPPING, None, tmp_path)
    assert pets.nothing_left(tmp_path) and not list(tmp_path.glob("**/*incomplete*"))


def test_a_data_set_that_tfds_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no data set 'no_such_data'"):
        tfds_store.prepare(replace(toy.MAPPING, dataset="no_such_data"), None, tmp_path)
