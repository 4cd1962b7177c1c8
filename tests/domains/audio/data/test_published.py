"""Published data sets from small imitations of their folders."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from moezoo.domains.audio.data import published, tfds_commands
from moezoo.domains.audio.data import published as names
from moezoo.domains.audio.data.published import PUBLISHED
from moezoo.domains.audio.domain import AudioDataConfig, open_audio
from moezoo.errors import UserError
from tests.domains.audio.data.waves import tone, write
from tests.robustness import fuzz

WAVE = tone(0.05)


def table(path: Path, columns: str, rows: Iterable[Iterable]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *rows])


def esc50(root: Path) -> None:
    rows = []
    for fold in range(1, 6):
        for number, name in enumerate(names.ESC50):
            file = f"{fold}-1000{number}-A-{number}.wav"
            rows.append((file, fold, number, name.replace(" ", "_"), "False", 1000, "A"))
            write(root / "audio" / file, WAVE)
    table(root / "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take", rows)


def urbansound8k(root: Path) -> None:
    rows = []
    for fold in range(1, 11):
        for number, name in enumerate(names.URBANSOUND8K):
            file = f"{fold}00-{number}-0-0.wav"
            rows.append((file, 1, 0, 4, 1, fold, number, name.replace(" ", "_")))
            stereo = np.stack([WAVE, np.zeros_like(WAVE)], 1)
            write(root / f"audio/fold{fold}" / file, stereo)
    columns = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    table(root / "metadata/UrbanSound8K.csv", columns, rows)


def speech_commands(root: Path) -> None:
    lists: dict[str, list[str]] = {"validation": [], "testing": []}
    for word in names.SPEECH_COMMANDS:
        for number in range(4):
            file = f"{word}/{number:08x}_nohash_0.wav"
            write(root / file, WAVE)
            if number < 2:
                lists[["validation", "testing"][number]].append(file)
    write(root / "_background_noise_/running_tap.wav", WAVE)
    for name, files in lists.items():
        (root / f"{name}_list.txt").write_text("\n".join(files) + "\n")


def fluent(root: Path) -> None:
    for split in ("train", "valid", "test"):
        rows = []
        for number, intent in enumerate(names.FLUENT["intent"]):
            file = f"wavs/speakers/{split}/{number}.wav"
            write(root / file, WAVE)
            rows.append((number, file, split, "words, with a comma", *intent.split(" / ")))
        columns = ",path,speakerId,transcription,action,object,location"
        table(root / f"data/{split}_data.csv", columns, rows)


MAKERS = {
    "esc50": esc50,
    "urbansound8k": urbansound8k,
    "speech_commands": speech_commands,
    "fluent_speech_commands": fluent,
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("archives")
    for name, make in MAKERS.items():
        make(base / PUBLISHED[name].folder)
    return base


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("esc50", (150, 50, 50)),
        ("urbansound8k", (80, 10, 10)),
        ("speech_commands", (70, 35, 35)),
        ("fluent_speech_commands", (31, 31, 31)),
    ],
)
def test_splits_are_disjoint_and_complete(archives: Path, name: str, counts) -> None:
    data = PUBLISHED[name]
    root = data.root(archives, Path("/nowhere"))
    assert root == archives / data.folder == data.root(root, Path("/nowhere"))
    assert data.root(None, archives) == root
    found = {split: data.split(root, split, 2) for split in ("train", "valid", "test")}
    assert tuple(len(f.paths) for f in found.values()) == counts
    paths = [path for f in found.values() for path in f.paths]
    assert len(set(paths)) == len(paths) == sum(counts)
    assert not any("_background_noise_" in str(path) for path in paths)


def test_folds() -> None:
    for folds in (5, 10):
        for fold in range(1, folds + 1):
            parts = [published.folds_of(s, fold, folds) for s in ("train", "valid", "test")]
            assert [len(p) for p in parts] == [folds - 2, 1, 1]
            assert set.union(*parts) == set(range(1, folds + 1)) and parts[2] == {fold}
    assert published.folds_of("valid", 5, 5) == {1}


@pytest.mark.parametrize("name", MAKERS)
def test_features_and_labels(archives: Path, tmp_path: Path, name: str) -> None:
    config = AudioDataConfig(
        name=name, frames=8, mel=12, archive=str(archives), data_dir=str(tmp_path)
    )
    source = open_audio(config, "test")
    for task, classes in PUBLISHED[name].names.items():
        assert source.info.labels[task].names == classes
        assert set(source.arrays[task]) == set(range(len(classes)))
    example = source[0]
    assert example["audio"].shape == (8, 12) and int(example["frames"]) == 3
    assert np.allclose(example["audio"][3:], 0.46703, atol=1e-5)
    if name == "urbansound8k":  # the first channel, not the mean with the silent second one
        mono = open_audio(
            AudioDataConfig("esc50", 8, 12, archive=str(archives), data_dir=str(tmp_path)), "test"
        )
        np.testing.assert_allclose(example["audio"][:3], mono[0]["audio"][:3], atol=1e-5)


ESC = PUBLISHED["esc50"]
COLUMNS = ("filename", "fold", "category")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("order", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_as_spreadsheets_write_them(tmp_path: Path, mark: str, order: str, end: str) -> None:
    lines = (("filename", "fold", "target", "category"), ("a, b; c.wav", "1", "0", "dog"), ())
    quoted = [mark.join(f'"{x}"' if "," in x or n == 0 else x for x in line)
              for n, line in enumerate(lines)]  # fmt: skip
    (tmp_path / "t.csv").write_bytes((order + end.join(quoted)).encode())
    wanted = [{"filename": "a, b; c.wav", "fold": "1", "category": "dog"}]
    assert published.table(ESC, tmp_path / "t.csv", COLUMNS) == wanted


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_tables_in_utf_16_with_empty_rows(tmp_path: Path, order: str) -> None:
    text = "\ufeff\r\nfilename\tfold\tcategory\r\n1.wav\t1\tdög\r\n\t\t\r\n\r\n"
    (tmp_path / "t.csv").write_bytes(text.encode(order))
    wanted = [{"filename": "1.wav", "fold": "1", "category": "dög"}]
    assert published.table(ESC, tmp_path / "t.csv", ("filename", "fold", "category")) == wanted


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"filename,fold,category\n", "has no rows"),
        (b"filename,fold,category\na,1\n", "lacks values in the column 'category'"),
        (b"name,fold,category\na,1,dog\n", "has no column 'filename', but \\['name'"),
        (b"", "has no column 'filename'"),
        (b"\n" * 5_000_000, "has no column 'filename'"),
        (b"filename,fold,category\n" + b"\n" * 5_000_000, "has no rows"),
        (b"filename,fold,category\n" + b"a,1,d\n" * 600_000, "has more than 500,000 rows"),
        (b'filename,fold,category\n"' + b"a" * 200_000, "cannot be read as a table"),
        (b"\0" * 33_000_000, "has 33.0 MB, and at most 32.0 MB are read"),
        (b"filename,fold,category\n\xff,1,dog", "cannot be read as a table"),
    ],
    ids=range(10),
)
def test_tables_without_sense_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with fuzz.limit(20), pytest.raises(UserError, match=f"t.csv' {says}.*unpack the ESC-50"):
        published.table(ESC, tmp_path / "t.csv", COLUMNS)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../a.wav", "a\nb.wav", "a" * 300, "", "a\0b"])
def test_lists_that_name_other_places(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    table(root / "meta/esc50.csv", "filename,fold,category", [(name, 1, "dog")])
    with pytest.raises(UserError, match="(not a file inside|is missing, but the lists)") as told:
        ESC.split(root, "test", 1)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [("esc50", "meta/esc50.csv"), ("speech_commands", "testing_list.txt")],
)
def test_lists_that_are_no_regular_files(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / "validation_list.txt").write_text("")
    os.mkfifo(tmp_path / file)
    with fuzz.limit(5), pytest.raises(UserError, match="is a named pipe"):
        PUBLISHED[name].split(tmp_path, "test", 1)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to("/dev/zero")
    with fuzz.limit(5), pytest.raises(UserError, match="is a device"):
        PUBLISHED[name].split(tmp_path, "test", 1)


def test_changed_files_get_new_features(tmp_path: Path) -> None:
    root = tmp_path / "fluent"
    fluent(root)
    config = AudioDataConfig(
        "fluent_speech_commands", 4, 8, archive=str(root), data_dir=str(tmp_path)
    )
    before = np.array(open_audio(config, "valid")[0]["audio"])
    write(root / "wavs/speakers/valid/0.wav", tone(0.06, 2000))
    after = np.array(open_audio(config, "valid")[0]["audio"])
    assert not np.allclose(before, after)


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("esc50", lambda r: (r / "meta/esc50.csv").unlink(), "esc50.csv' is missing"),
        ("esc50", lambda r: (r / "meta/esc50.csv").write_text("a,b\n"), "column 'filename'"),
        ("esc50", lambda r: (r / "meta/esc50.csv").write_bytes(b"\xff\xfe\x00"), "as a table"),
        ("esc50", lambda r: change(r / "meta/esc50.csv", ",2,0,dog", ",6,0,dog"), "fold '6'"),
        ("esc50", lambda r: change(r / "meta/esc50.csv", "1,0,dog", "1,0,wolf"), "event 'wolf'"),
        (
            "esc50",
            lambda r: change(r / "meta/esc50.csv", ",1,0,dog", ",2,0,dog"),
            "No clip of the event 'dog' is in the test split with data.fold 1 of ESC-50",
        ),
        ("esc50", lambda r: (r / "audio/1-10003-A-3.wav").unlink(), "1-10003-A-3.wav' is missing"),
        (
            "urbansound8k",
            lambda r: (r / "audio/fold1").rename(r / "audio/fold_1"),
            "fold1/100-0-0-0.wav' is missing",
        ),
        (
            "speech_commands",
            lambda r: (r / "testing_list.txt").unlink(),
            "testing_list.txt' is missing",
        ),
        (
            "speech_commands",
            lambda r: change(r / "testing_list.txt", "zero/00000001_nohash_0.wav\n", ""),
            "No clip of the word 'zero' is in the test split of Speech Commands",
        ),
        ("speech_commands", lambda r: (r / "testing_list.txt").write_text(""), "No clip of the"),
        (
            "fluent_speech_commands",
            lambda r: (r / "data/test_data.csv").unlink(),
            "test_data.csv' is missing",
        ),
        (
            "fluent_speech_commands",
            lambda r: change(r / "data/test_data.csv", "bring,juice", "bring,milk"),
            "intent 'bring / milk / none'",
        ),
        (
            "esc50",
            lambda r: (r / "audio/1-10003-A-3.wav").write_text("no sound"),
            "1-10003-A-3.wav' cannot be read as sound",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_sentence(tmp_path: Path, name, harm, says) -> None:
    root = tmp_path / "root"
    MAKERS[name](root)
    harm(root)
    config = AudioDataConfig(name, 4, 8, archive=str(root), data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=says) as told:
        open_audio(config, "test")
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text().replace("\r\n", "\n")
    assert old in text
    path.write_text(text.replace(old, new))


def test_archives_that_are_not_there(tmp_path: Path) -> None:
    config = AudioDataConfig("esc50", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="ESC-50 was not found: .*--data.archive.*ESC-50-master"):
        open_audio(config, "test")
    config = AudioDataConfig("esc50", archive=str(tmp_path / "x"), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="which is not a folder: name the folder 'ESC-50-master'"):
        open_audio(config, "test")


class Records(list):
    """What tfds gives: records by index."""


def test_records_of_tfds() -> None:
    wave = np.round(32767 * WAVE).astype(np.int16)
    records = Records({"audio": wave, "label": i % 12} for i in range(13))
    listing = tfds_commands.listing(records, "valid", 16_000, "mark")
    assert listing.numbers()["word"].tolist() == [i % 12 for i in range(13)]
    np.testing.assert_allclose(listing.load(3), WAVE, atol=1e-4)
    records[2]["audio"] = wave[:100]
    with pytest.raises(UserError, match="example 2 of speech_commands_tfds"):
        listing.load(2)


def test_tfds_without_its_packages(tmp_path: Path, monkeypatch) -> None:
    def missing(*given):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr("moezoo.data.tfds_store.prepare", missing)
    config = AudioDataConfig("speech_commands_tfds", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"not installed \(tensorflow\).*--data.name speech_comm"):
        open_audio(config, "test")
