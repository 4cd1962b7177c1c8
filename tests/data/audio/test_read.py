"""Sound files of every kind, and what is no sound file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from moezoo.data.audio import read
from moezoo.data.audio.fbank import fbank
from moezoo.errors import UserError
from tests.data.audio.waves import RATE, tone, write


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
    assert fbank(read.read(heard)).max() > fbank(read.read(path)).max() + 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.write_bytes(b"RIFF, but nothing else"), "cannot be read as sound"),
        (lambda path: path.write_text("a page of text"), "cannot be read as sound"),
        (lambda path: path.write_bytes(b""), "cannot be read as sound"),
        (lambda path: path.mkdir(), "is missing"),
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
    path = write(tmp_path / "a.wav", tone())
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[audio\]'"):
        read.read(path)
