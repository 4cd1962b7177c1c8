"""Sound files of every kind, and what is no sound file."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moezoo.domains.audio.data import decode, fbank, read
from moezoo.errors import UserError
from tests.domains.audio.data.waves import RATE, tone, wav_bytes, write


@pytest.mark.parametrize(
    ("suffix", "subtype", "step"),
    [
        ("wav", "PCM_U8", 2.0**-7),
        ("wav", "PCM_16", 2.0**-15),
        ("wav", "PCM_24", 2.0**-23),
        ("wav", "PCM_32", 2.0**-23),
        ("wav", "FLOAT", 1e-7),
        ("wav", "DOUBLE", 1e-7),
        ("flac", "PCM_16", 2.0**-15),
        ("flac", "PCM_24", 2.0**-23),
    ],
)
def test_sample_types(tmp_path: Path, suffix: str, subtype: str, step: float) -> None:
    path = write(tmp_path / f"a.{suffix}", tone(), subtype=subtype)
    wave = read.read(path)
    assert wave.dtype == np.float32
    np.testing.assert_allclose(wave, tone(), atol=step)


def test_channels_become_one(tmp_path: Path) -> None:
    left, right = tone(hertz=300), tone(hertz=700)
    path = write(tmp_path / "a.wav", np.stack([left, right, left], 1), subtype="FLOAT")
    np.testing.assert_allclose(read.read(path), (2 * left + right) / 3, atol=1e-6)
    np.testing.assert_allclose(read.read(path, mono=read.first), left, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_other_rates_give_the_same_sound(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", tone(1.0, rate=rate), rate, subtype="FLOAT")
    wave = read.read(path)
    assert abs(len(wave) - RATE) <= 1
    middle = slice(RATE // 10, -RATE // 10)
    np.testing.assert_allclose(wave[middle], tone(1.0)[: len(wave)][middle], atol=2e-3)
    line = np.abs(np.fft.rfft(wave)).argmax() * RATE / len(wave)
    assert line == pytest.approx(440, abs=2)


def test_what_is_above_half_the_rate_does_not_fold_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(1.0, hertz=13_000, rate=48_000), 48_000)
    assert np.abs(read.read(path)[1000:-1000]).max() < 2e-3
    heard = write(tmp_path / "b.wav", tone(1.0, hertz=5_000, rate=48_000), 48_000)
    assert fbank.fbank(read.read(heard)).max() > fbank.fbank(read.read(path)).max() + 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.write_bytes(b"RIFF, but nothing else"), "cannot be read as sound"),
        (lambda path: path.write_text("a page of text"), "cannot be read as sound"),
        (lambda path: path.write_bytes(b""), "cannot be read as sound"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
        (lambda path: os.mkfifo(path), "is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: write(path, np.zeros(0)), "has no samples"),
        (lambda path: write(path, tone(0.02)), "20 ms long, shorter than one window of 25 ms"),
        (
            lambda path: write(path, np.append(tone(), np.nan), subtype="FLOAT"),
            "not finite numbers",
        ),
        (
            lambda path: write(path, np.append(tone(), np.inf), subtype="FLOAT"),
            "not finite numbers",
        ),
    ],
)
def test_what_is_no_sound_is_one_sentence(tmp_path: Path, make, says: str) -> None:
    path = tmp_path / "bad.wav"
    make(path)
    with pytest.raises(UserError, match=says) as told:
        read.read(path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.flac", tone(1.0))
    whole.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(UserError, match="a.flac' (cannot be read as sound|has no samples|is )"):
        read.read(whole)


def test_without_soundfile_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    flac, wave = write(tmp_path / "a.flac", tone()), write(tmp_path / "a.wav", tone())
    packed = write(tmp_path / "b.wav", tone(), subtype="ULAW")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for path, why in ((flac, "is no WAV file"), (packed, "has compressed samples")):
        with pytest.raises(UserError, match=rf"{why}.* pip install 'moezoo\[audio\]'"):
            read.read(path)
    np.testing.assert_allclose(read.read(wave), tone(), atol=2.0**-15)


@pytest.mark.parametrize("subtype", ["ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_compressed_wav(tmp_path: Path, subtype: str) -> None:
    path = write(tmp_path / "a.wav", tone(), subtype=subtype)
    stored, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(read.read(path), stored)
    assert np.corrcoef(stored[: len(tone())], tone())[0, 1] > 0.95


@pytest.mark.parametrize("name", ["a.aiff", "a.caf", "a.au", "a.ogg", "a.mp3"])
def test_other_kinds_of_files(tmp_path: Path, name: str) -> None:
    wave = read.read(write(tmp_path / name, tone(1.0)))
    assert np.corrcoef(wave[: len(tone(1.0))], tone(1.0)[: len(wave)])[0, 1] > 0.99


@pytest.mark.parametrize("name", ["a.mat", "a.htk", "a.xi", "a.pvf"])
def test_what_libsndfile_reads_beside_recordings_is_refused(tmp_path: Path, name: str) -> None:
    form = {"a.mat": "MAT5"}.get(name, name[2:].upper())
    how = {"subtype": "DPCM_16"} if form == "XI" else {}
    path = write(tmp_path / name, tone(), 44_100, format=form, **how)
    with pytest.raises(UserError, match=f"is a file of the kind {form}, not one of WAV"):
        read.read(path)


def test_floats_on_the_scale_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    """Loud recordings go beyond 1; steps of 16, 24 or 8 bits stored as floats are a mistake."""
    loud = write(tmp_path / "loud.wav", 8 * tone(), subtype="FLOAT")
    np.testing.assert_allclose(read.read(loud), 8 * tone(), rtol=1e-6)
    for scale in (2**7, 2**15, 2**23):
        for name, subtype in (("a.wav", "FLOAT"), ("a.wav", "DOUBLE"), ("a.aiff", "FLOAT")):
            path = write(tmp_path / name, scale * tone(), subtype=subtype)
            with pytest.raises(UserError, match="where 1 is full scale: its floats are whole st"):
                read.read(path)
    far = write(tmp_path / "far.wav", 1e300 * tone(), subtype="DOUBLE")
    with pytest.raises(UserError, match="samples up to .*e\\+299"):
        read.read(far)


def test_whole_steps() -> None:
    stored = np.array([-(2**15), 0, 2**15 - 1], np.int64)
    np.testing.assert_array_equal(read.whole_steps(stored, "it") * 2**15, stored)
    for wrong in (stored * 2, stored / 2**15, stored[None]):
        with pytest.raises(UserError, match="it is no sound of 16-bit samples"):
            read.whole_steps(wrong, "it")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize("own", [8_000, 16_000, 44_100])
def test_only_what_is_heard_is_read_and_it_is_the_same(
    tmp_path: Path, name: str, own: int, monkeypatch
) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / name, rng.uniform(-0.5, 0.5, (3 * own, 2)), own)
    whole = read.read(path)
    monkeypatch.setattr(decode, "BLOCK", 1000)
    for frames in (1, 37, 298, 1000):
        samples = fbank.samples_of(frames)
        found = read.read(path, frames=frames)
        np.testing.assert_array_equal(found, whole[:samples])
        if len(found) == samples:
            assert fbank.frames_of(samples) == frames


def test_memory_is_that_of_what_is_heard(tmp_path: Path) -> None:
    """An hour of FLAC, many channels, a header that announces 256 GB: a second is a second."""
    hour = tmp_path / "hour.flac"
    with soundfile.SoundFile(hour, "w", 8_000, 1) as file:
        for _ in range(60):
            file.write(np.zeros(8_000 * 60))
    wide = write(tmp_path / "wide.wav", np.zeros((16_000, 512)), subtype="PCM_16")
    (tmp_path / "cut.flac").write_bytes(announced(write(tmp_path / "a.flac", tone(1.0)))[:132])
    tracemalloc.start()
    try:
        assert len(read.read(hour, frames=98)) == len(read.read(wide, frames=98)) == 15_920
        with pytest.raises(UserError, match="cannot be read as sound: it is damaged or cut off"):
            read.read(tmp_path / "cut.flac", frames=98)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match="has more than 33554432 samples"):
        read.read(_of_zeros(tmp_path / "long.wav", (1 << 25) + 1))


def test_flac_of_a_stream(tmp_path: Path) -> None:
    """It does not say how long it is: its beginning is read, its end is refused."""
    path = write(tmp_path / "a.flac", tone(2.0))
    whole = read.read(path)
    path.write_bytes(announced(path, 0))
    np.testing.assert_array_equal(read.read(path, frames=98), whole[: fbank.samples_of(98)])
    with pytest.raises(UserError, match="does not say how long it is"):
        read.read(path)


def announced(flac: Path, samples: int = 2**36 - 1) -> bytes:
    """A FLAC file whose header announces so many samples."""
    stored = bytearray(flac.read_bytes())
    packed = int.from_bytes(stored[18:26], "big")  # rate, channels, bits; then 36 bits of length
    stored[18:26] = (packed >> 36 << 36 | samples).to_bytes(8, "big")
    return bytes(stored)


def _of_zeros(path: Path, samples: int) -> Path:
    """A file of 8-bit samples that takes no place on the disk."""
    path.write_bytes(wav_bytes(b"", bits=8, size=samples))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + samples)
    return path
