"""The synthesised data set: what is in the clips, and how they lie on disk."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from moezoo.data.store import DamagedStore
from moezoo.domains.audio.data import cache, clips
from moezoo.domains.audio.data.fbank import fbank
from moezoo.domains.audio.data.sounds import acoustics, store
from moezoo.domains.audio.data.sounds.events import EVENTS
from moezoo.domains.audio.data.sounds.example import NAMES, REGISTERS, synthesise
from moezoo.domains.audio.data.sounds.synth import RATE, harmonics, sweep
from moezoo.domains.audio.domain import AudioDataConfig, open_audio
from moezoo.errors import UserError

HERTZ = {name: float(np.sqrt(low * high)) for name, (low, high) in REGISTERS.items()}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def middle(wave: np.ndarray) -> float:
    """The frequency below which half of a wave's energy lies."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    return float(np.searchsorted(power.cumsum(), power.sum() / 2) * RATE / len(wave))


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_is_heard_in_its_register(name: str) -> None:
    found = []
    for register in HERTZ:
        waves = [EVENTS[name](HERTZ[register], RATE // 2, rng(seed)) for seed in range(4)]
        for wave in waves:
            assert wave.shape == (RATE // 2,) and np.isfinite(wave).all()
            assert np.sqrt(np.mean(wave**2)) > 0.003 * np.abs(wave).max() > 0
        found.append(np.median([middle(wave) for wave in waves]))
    assert found[0] < found[2], "low is lower than high"
    if not name.startswith("vowel"):
        assert found[0] < found[1] < found[2]


def test_two_of_a_kind_differ_and_kinds_differ_more() -> None:
    assert len(EVENTS) >= 12
    form: dict[str, list[np.ndarray]] = {}
    for name, event in EVENTS.items():
        made = [event(600.0, RATE // 2, rng(seed)) for seed in (1, 2)]
        assert not np.allclose(made[0], made[1]), name
        form[name] = [fbank(w / np.abs(w).max(), 32).clip(-10) for w in made]
    same = np.mean([np.abs(a - b).mean() for a, b in form.values()])
    other = np.mean([np.abs(a[0] - b[0]).mean() for a in form.values() for b in form.values()])
    assert other > 1.5 * same


def test_harmonics_equal_their_definition() -> None:
    hertz = np.linspace(300.0, 2600.0, 4000)
    shares = rng().uniform(0, 1, 12)
    expected = sum(a * sweep(k * hertz) for k, a in enumerate(shares, 1))
    np.testing.assert_allclose(harmonics(hertz, shares), expected, atol=1e-9)


def test_rooms_keep_a_sound_going() -> None:
    click = np.zeros(RATE)
    click[0] = 1.0
    tails = {}
    for name, room in acoustics.ROOMS.items():
        wave = np.stack([acoustics.reverberated(click, room, rng(s)) for s in range(6)])
        assert wave.shape == (6, RATE)
        tails[name] = float((wave[:, RATE // 2 :] ** 2).sum())
    assert tails["dry"] == pytest.approx(0, abs=1e-20)
    assert tails["hall"] > 100 * tails["small"]


def test_noise_is_as_loud_as_asked() -> None:
    wave = np.zeros(RATE)
    event = slice(2000, 9000)
    wave[event] = rng().standard_normal(7000)
    for decibels in (-3.0, 10.0):
        noise = acoustics.mixed(wave, event, decibels, rng(1)) - wave
        ratio = np.mean(wave[event] ** 2) / np.mean(noise**2)
        assert 10 * np.log10(ratio) == pytest.approx(decibels, abs=0.1)


def test_a_clip_is_a_function_of_seed_split_and_index() -> None:
    events = NAMES["event"][:3]
    one = synthesise(3, "train", 5, events)
    again = synthesise(3, "train", 5, events)
    np.testing.assert_array_equal(one.wave, again.wave)
    assert one.heard == again.heard and one.heard["event"] == events[5 % 3]
    for other in ((4, "train", 5), (3, "test", 5), (3, "train", 8)):
        assert not np.array_equal(one.wave, synthesise(*other, events).wave)
    assert one.wave.dtype == np.int16 and one.wave.shape == (RATE,)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> AudioDataConfig:
    where = tmp_path_factory.mktemp("sounds")
    return AudioDataConfig(train=12, valid=5, test=4, mel=16, frames=50, data_dir=str(where),
                           only=("bell", "rain", "siren"))  # fmt: skip


def test_splits_features_and_labels(stored: AudioDataConfig, capsys) -> None:
    train, valid, test = (open_audio(stored, split) for split in ("train", "valid", "test"))
    assert [len(s) for s in (train, valid, test)] == [12, 5, 4]
    assert train.info.labels["event"].names == ("bell", "rain", "siren")
    assert train.info.resolution == (50, 16)
    example = train[4]
    assert example["audio"].shape == (50, 16) and example["audio"].dtype == np.float32
    assert int(example["frames"]) == 50 and int(example["event"]) == 1
    assert isinstance(train.arrays["audio"], np.memmap)
    assert np.bincount(train.arrays["event"]).tolist() == [4, 4, 4]
    assert not np.array_equal(train[0]["audio"], valid[0]["audio"])
    capsys.readouterr()
    open_audio(stored, "train")
    assert capsys.readouterr().err == "", "nothing is computed twice"


def test_files_can_be_listened_to_and_are_what_the_features_show(stored: AudioDataConfig) -> None:
    source = open_audio(stored, "train")
    folder = next((Path(str(stored.data_dir)) / "sounds").glob("train*"))
    files = sorted((folder / "train").glob("*.wav"))
    assert len(files) == 12 and "rain" in files[4].name
    wave, rate = soundfile.read(files[4], dtype="float32")
    assert rate == RATE and 0.03 < np.abs(wave).max() <= 1
    np.testing.assert_array_equal(wave, store.load(files[4]))
    audio, _ = cache.fbank.features(wave, 50, 16)
    np.testing.assert_allclose(source[4]["audio"], audio, atol=1e-6)
    row = store.rows(folder, "train", 12)[4]
    assert row["event"] == "rain" and row["room"] in NAMES["room"]
    names = source.info.labels["room"].names
    assert names[int(source[4]["room"])] == row["room"]


def test_half_made_data_do_not_stay(tmp_path: Path, monkeypatch) -> None:
    config = AudioDataConfig(train=4, valid=1, test=1, data_dir=str(tmp_path), only=("bell",))

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_wave", stop)
        with pytest.raises(KeyboardInterrupt):
            open_audio(config, "train")
    assert [p.name for p in (tmp_path / "sounds").iterdir()] == [".lock"]
    assert len(open_audio(config, "train")) == 4


@pytest.mark.parametrize("broken", ["labels.csv", "00001"])
def test_damaged_files_are_made_again(
    tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AudioDataConfig(train=3, valid=1, test=1, data_dir=str(tmp_path), only=("bell",))
    open_audio(config, "train")
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file() and p.name.startswith(broken)
               and p.parent.name not in ("valid", "test"))  # fmt: skip
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    # Features that are there already do not need the files.
    shutil.rmtree(tmp_path / "audio_features")
    assert len(open_audio(config, "train")) == 3 and path.read_bytes() == whole
    assert capsys.readouterr().err.count("is damaged; it is made again") == 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: text.replace(b"bell,", b"bxll,"),  # was a KeyError
        lambda text: text.replace(b"bell,", b"ring,"),
        lambda text: text.replace(b",dry", b",hall").replace(b",small", b",hall"),
        lambda text: text.replace(b"00001", b"00000"),
        lambda text: text + b'"' + b"a" * 200_000,  # was csv.Error
        lambda text: text.replace(b"b", b"\xff"),
        lambda text: text.replace(b"00001 bell", b"../00001 bell"),
        lambda text: text[: text.rindex(b",")],
    ],
)
def test_damaged_labels_are_seen_and_made_again(tmp_path: Path, harm: Any) -> None:
    config = AudioDataConfig(train=3, valid=1, test=1, data_dir=str(tmp_path), only=("bell",))
    open_audio(config, "train")
    (path,) = tmp_path.rglob("train/labels.csv")
    whole = path.read_bytes()
    assert harm(whole) != whole
    path.write_bytes(harm(whole))
    with pytest.raises(DamagedStore, match="is damaged; delete that folder, then run again"):
        store.rows(path.parents[1], "train", 3)
    assert len(open_audio(config, "train")) == 3 and path.read_bytes() == whole


def test_clips_that_are_no_regular_files_or_of_another_form(tmp_path: Path) -> None:
    config = AudioDataConfig(train=2, valid=1, test=1, data_dir=str(tmp_path), only=("bell",))
    open_audio(config, "train")
    (clip,) = tmp_path.rglob("train/00001*.wav")
    stored = clip.read_bytes()
    pipe, stereo = tmp_path / "a" / "b" / "pipe", tmp_path / "a" / "b" / "stereo"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    stereo.write_bytes(stored[:22] + b"\2" + stored[23:])
    for path in (pipe, stereo):
        with pytest.raises(UserError, match="is damaged"):
            store.load(path)
    assert len(store.load(clip)) == (len(stored) - 44) // 2


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 16]) + content[-4:]


@pytest.mark.parametrize("name", ["features.npy", "frames.npy", "sums.json"])
@pytest.mark.parametrize("harm", [flipped, lambda c: c[: len(c) // 2], lambda c: b"", None])
def test_damaged_features_are_made_again(
    tmp_path: Path, name: str, harm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit of them was trained on."""
    config = AudioDataConfig(
        *("sounds", 4, 8), train=3, valid=1, test=1, data_dir=str(tmp_path), only=("bell",)
    )
    source = open_audio(config, "train")
    before = [{k: np.array(v) for k, v in source[i].items()} for i in range(3)]  # not mapped
    del source
    (path,) = (tmp_path / "audio_features").rglob(name)
    content = path.read_bytes()
    path.unlink() if harm is None else path.write_bytes(harm(content))
    capsys.readouterr()
    for expected in (1, 0):
        source = open_audio(config, "train")
        assert path.read_bytes() == content
        for i, one in enumerate(before):
            assert all(np.array_equal(one[key], source[i][key]) for key in one)
        assert capsys.readouterr().err.count("is damaged; it is made again") == expected


def test_features_that_are_damaged_again_and_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_sum", lambda path: -1)
    config = AudioDataConfig(train=1, valid=1, test=1, data_dir=str(tmp_path), only=("bell",))
    with pytest.raises(UserError, match="is damaged; delete that folder, then run again"):
        open_audio(config, "train")


def test_a_disk_that_fills_up_while_features_are_written(tmp_path: Path, monkeypatch) -> None:
    """Through a memory map of a file with holes it would end the process by a signal."""

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > 200:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    def full(path: Path, mode: str) -> io.FileIO:
        return Full(path, mode.replace("b", ""))

    config = AudioDataConfig(train=1, valid=1, test=1, data_dir=str(tmp_path), only=("bell",))
    monkeypatch.setattr(cache, "open", full, raising=False)
    with pytest.raises(UserError, match="Cannot store the features of sounds in .*No space left"):
        open_audio(config, "train")
    assert [p.name for p in (tmp_path / "audio_features").iterdir()] == [".lock"]


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot store the sounds data set"):
        open_audio(AudioDataConfig(data_dir=str(tmp_path / "file")), "train")


def test_damaged_clips_of_others_are_not_removed(tmp_path: Path) -> None:
    """What tensorflow-datasets prepared is not made here: only features are made again."""
    records = tmp_path / "records"
    records.mkdir()

    def damaged(clip: Any) -> np.ndarray:
        raise DamagedStore(records)

    labels, names = {"event": ["bell"]}, {"event": ("bell",)}
    listing = clips.Listing("theirs", "train", range(1), labels, names, damaged, "mark")
    with pytest.raises(DamagedStore, match="records' is damaged"):
        cache.open_listing(listing, clips.ClipForm(4, 8), tmp_path)
    assert records.is_dir()
