"""Properties of the filterbank; its numbers are compared in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.data.audio import fbank
from tests.data.audio.waves import tone


def test_a_tone_is_in_its_own_band() -> None:
    for hertz in (250.0, 1000.0, 4000.0):
        logmel = fbank.fbank(tone(0.2, hertz), 64)
        assert np.unique(logmel.argmax(axis=1)).size == 1
        nearest = np.abs(fbank.centres(64) - hertz).argmin()
        assert abs(int(logmel[0].argmax()) - int(nearest)) <= 1


def test_mel_and_back() -> None:
    np.testing.assert_allclose(fbank.hertz(fbank.mel(np.arange(20.0, 8000.0, 50.0))),
                               np.arange(20.0, 8000.0, 50.0))  # fmt: skip
    assert fbank.mel(700.0) == pytest.approx(1127 * np.log(2))


@pytest.mark.parametrize(
    ("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)]
)
def test_number_of_frames(samples: int, frames: int) -> None:
    assert fbank.frames_of(samples) == frames
    assert fbank.fbank(np.ones(samples), 32).shape == (frames, 32)


def test_silence_and_offset_are_the_floor() -> None:
    np.testing.assert_allclose(fbank.fbank(np.full(800, 0.25), 16), np.log(fbank.FLOOR), rtol=1e-6)


def test_padding_is_log_mel_zero_and_truncation_keeps_the_start() -> None:
    wave = tone(0.2)
    audio_TF, own = fbank.features(wave, 30, 16)
    assert own == 18 and audio_TF.shape == (30, 16)
    np.testing.assert_allclose(audio_TF[own:], fbank.normalise(np.float32(0)))
    assert audio_TF[own, 0] == pytest.approx(0.46703, abs=1e-5)
    cut, kept = fbank.features(wave, 7, 16)
    assert kept == 7
    np.testing.assert_array_equal(cut, audio_TF[:7])
    np.testing.assert_allclose(fbank.denormalise(audio_TF[:own]), fbank.fbank(wave, 16), atol=1e-5)


def test_another_rate_has_the_same_bands_in_time() -> None:
    logmel = fbank.fbank(tone(0.5, 600.0, 8_000), 32, 8_000)
    assert len(logmel) == fbank.frames_of(4_000, 8_000) == 48
    nearest = np.abs(fbank.centres(32, 8_000) - 600).argmin()
    assert abs(int(logmel[3].argmax()) - int(nearest)) <= 1
