"""The stored data set: written once, whole or not at all, and readable without TensorFlow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moezoo.data import store as stored
from moezoo.data.source import ArraySource, Decoded, Source
from moezoo.domains.images import domain as data_config
from moezoo.domains.images.data.rooms import builder, names
from moezoo.domains.images.data.rooms import reader as store
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.domains.images.data.rooms.render import render_example
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.errors import UserError
from tests.robustness import fuzz

ROOT = Path(__file__).resolve().parents[4]


def python(code: str, **more) -> subprocess.Popen[str]:
    """A fresh interpreter that runs `code` with the project importable."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **more,
    )


def opening(config: DataConfig, more: str = "") -> str:
    return (
        "from moezoo.errors import run_command\n"
        "from moezoo.domains.images.domain import DataConfig, open_source\n"
        f"def main():\n    source = open_source({config!r}, 'train')\n"
        f"    print(len(source)); {more}\n"
        "run_command(main)"
    )


@pytest.mark.slow
def test_records_are_the_rendered_views(tiny: DataConfig) -> None:
    for split, count in (("train", 18), ("test", 7)):
        source = open_source(tiny, split)
        assert isinstance(source, Source) and len(source) == count
        for index in (0, count - 1):
            view, example = render_example(0, split, index, 16, 24), source[index]
            np.testing.assert_array_equal(example["image"], view.image_HW3)
            np.testing.assert_array_equal(example["semseg"], view.labels.semseg_HW)
            np.testing.assert_array_equal(example["parts"], view.labels.parts_HW)
            np.testing.assert_array_equal(example["edge"], view.labels.edge_HW)
            np.testing.assert_array_equal(example["saliency"], view.saliency_HW)
            np.testing.assert_array_equal(example["depth"], view.labels.depth_HW)
            np.testing.assert_array_equal(example["normals"], view.labels.normals_HW3)
            np.testing.assert_array_equal(example["intrinsics"], view.intrinsics)
            assert example["scene"] == view.kind
            assert isinstance(source, ArraySource) and source.captions[index] == view.caption


def test_types_and_meaning(tiny: DataConfig) -> None:
    source = open_source(tiny, "test")
    example, info = source[0], source.info
    assert info.tasks == tuple(KINDS) and info.maps == tuple(KINDS)[:-1]
    assert info.labels["scene"].names == names.SCENES and example["scene"].dtype == np.uint8
    assert info.resolution == (16, 24) and info.split == "test"
    assert info.labels["semseg"].names == names.CLASSES and info.labels["semseg"].classes >= 12
    for task in ("semseg", "parts"):
        assert info.labels[task].palette.shape == (info.labels[task].classes, 3)
        assert len(np.unique(info.labels[task].palette, axis=0)) == info.labels[task].classes
        assert example[task].dtype == np.uint8 and example[task].shape == (16, 24)
    assert example["depth"].dtype == example["normals"].dtype == np.float32
    assert example["normals"].shape == (16, 24, 3)


def test_reopening_renders_nothing(tiny: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    open_source(tiny, "train")

    def refuse(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(builder, "render_all", refuse)
    open_source(tiny, "train")
    with pytest.raises(AssertionError, match="rendered again"):
        open_source(replace(tiny, seed=9), "train")


def test_a_changed_generator_is_another_data_set(
    tiny: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = builder.RoomsConfig(height=16, width=24, train=18, test=7).name
    assert builder.fingerprint() in name and "16x24_train18_test7_seed0" in name
    monkeypatch.setattr(builder, "fingerprint", lambda: "0" * 8)
    assert builder.RoomsConfig(height=16, width=24, train=18, test=7).name != name


def test_large_sources_are_read_from_disk(
    tiny: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_source(tiny, "test")
    monkeypatch.setattr(data_config, "MEMORY", 0)
    lazy = open_source(tiny, "test")
    assert isinstance(lazy, Decoded)
    for index in range(len(whole)):
        for name, value in whole[index].items():
            np.testing.assert_array_equal(lazy[index][name], value)


def damages(folder: Path) -> Iterator[Path]:
    """Damages a stored data set in one way after the other."""
    [records] = folder.glob("rooms-train.array_record*")
    whole, info = records.read_bytes(), folder / "dataset_info.json"
    for broken in (whole[: len(whole) // 2], bytes(len(whole))):
        records.write_bytes(broken)
        yield records
    records.unlink()
    yield records
    for text in ('{"name": [', info.read_text().replace('"3"', '"2"'), "\0"):
        info.write_text(text)
        yield info
    info.unlink()
    yield info
    info.unlink()
    os.mkfifo(info)
    yield info
    (folder / stored.SUMS).write_text("[[1]]")
    yield folder / stored.SUMS


def test_damaged_rooms_are_made_again(
    tiny: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    small = replace(tiny, resolution=(8, 8), train=3, test=2, data_dir=str(tmp_path))
    sound = open_source(small, "train")
    [folder] = tmp_path.glob("rooms/*/1.0.0")
    told, made = "1.0.0 is damaged; it is made again", 0
    for damaged in damages(folder):
        capfd.readouterr()
        with fuzz.limit(20):
            again = open_source(small, "train")
        assert told in capfd.readouterr().err, damaged
        np.testing.assert_array_equal(again[2]["depth"], sound[2]["depth"])
        assert [p.name for p in folder.parent.iterdir() if p.name != ".lock"] == ["1.0.0"]
        made += 1
    assert made == 9


def test_rooms_that_another_process_made_again_are_kept(tiny: DataConfig, tmp_path: Path) -> None:
    small = replace(tiny, resolution=(8, 8), train=2, test=2, data_dir=str(tmp_path))
    open_source(small, "train")
    [folder] = tmp_path.glob("rooms/*/1.0.0")
    late = stored.DamagedStore(folder)
    folder.rename(folder.with_name("old"))
    open_source(small, "train")  # by the other one
    tries = iter([late, None])

    def opened() -> str:
        if (error := next(tries)) is not None:
            raise error
        return "read"

    before = folder.stat().st_ino
    assert stored.renewed(opened, "rooms") == "read" and folder.stat().st_ino == before


def test_a_directory_that_cannot_be_used(tiny: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="MOEZOO_DATA"):
        open_source(replace(tiny, data_dir=str(file)), "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only directories")
def test_a_read_only_directory(tiny: DataConfig, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        open_source(replace(tiny, data_dir=str(tmp_path)), "train")


def test_a_disk_without_room(
    tiny: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, data_dir=str(tmp_path))
    monkeypatch.setattr(store, "BYTES_PER_PIXEL", 10**15)
    with pytest.raises(UserError, match="only .* MB are free"):
        open_source(config, "train")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 15_000])
def test_a_disk_that_fills_up(tiny: DataConfig, tmp_path: Path, limit: int) -> None:
    """A limit on the size of files makes writes fail half way, as a full disk does."""
    config = replace(tiny, data_dir=str(tmp_path))
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    process = python(code + opening(config))
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert "error: Cannot store the rooms data set" in told and "Traceback" not in told
    assert not list(tmp_path.rglob("*array_record*")) and not list(tmp_path.rglob("incomplete*"))


def test_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    config = DataConfig(train=3000, test=10, data_dir=str(tmp_path))
    process = python(opening(config))
    deadline = time.time() + 60
    while not list(tmp_path.rglob("incomplete*")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    assert process.poll() is None and list(tmp_path.rglob("incomplete*"))
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told, told
    assert "interrupted" in told
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]


def test_two_processes_at_once(tiny: DataConfig, tmp_path: Path) -> None:
    config = replace(tiny, data_dir=str(tmp_path))
    checksum = "print(sum(int(source[i]['image'].sum()) for i in range(len(source))))"
    both = [python(opening(config, checksum)) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    expected = open_source(tiny, "train")
    total = sum(int(expected[i]["image"].sum()) for i in range(18))
    assert [out.split() for out, _ in told] == [["18", str(total)]] * 2
    assert len(list(tmp_path.rglob("rooms-train.array_record*"))) == 1


def test_no_tensorflow_and_an_abandoned_folder_is_removed(tiny: DataConfig, tmp_path: Path) -> None:
    config = replace(tiny, train=2, test=2, data_dir=str(tmp_path))
    name = builder.RoomsConfig(height=16, width=24, train=2, test=2).name
    left = tmp_path / "rooms" / name / "incomplete.ABC_1.0.0"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    check = "import sys; print([m for m in sys.modules if m.split('.')[0] == 'tensorflow'])"
    process = python(opening(config, check))
    out, told = process.communicate(timeout=120)
    assert process.returncode == 0 and out.split() == ["2", "[]"], told
    assert not left.exists()
