"""Properties of the filterbank; its numbers are compared in tests/parity."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from moezoo.domains.audio.data import fbank
from tests.domains.audio.data.waves import tone


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


USED = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000)


def test_ratios_of_rates_in_use_are_exact_and_all_are_bounded() -> None:
    for own in USED:
        for rate in USED:
            up, down = fbank.ratio(own, rate)
            assert up * own == down * rate
    rng = np.random.default_rng(0)
    for own, rate in rng.integers(*fbank.RATES, (300, 2)).tolist():
        up, down = fbank.ratio(own, rate)
        assert max(up, down) <= fbank.FINEST
        assert up / down == pytest.approx(rate / own, rel=2e-5)
    for own, rate in ((1, 16_000), (0, 16_000), (268_435_399, 16_000), (16_000, 999), (-8, 8)):
        with pytest.raises(ValueError, match="samples per second"):
            fbank.resampled(np.zeros(9), own, rate)


@pytest.mark.parametrize("own", [700_001, 44_101, 16_001, 1_009])
def test_rates_without_small_terms_cost_little(own: int) -> None:
    """700,001 Hz took 7.6 s and 643 MB for a second of sound."""
    wave = tone(1.0, 100, own)
    fbank.resampled(wave[:100], own, 16_000)  # without the time that SciPy takes to load
    tracemalloc.start()
    begun = time.process_time()
    found = fbank.resampled(wave, own, 16_000)
    assert time.process_time() - begun < 2
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert abs(len(found) - 16_000) <= 1
    middle = slice(500, 15_500)
    np.testing.assert_allclose(found[middle], tone(1.0, 100)[middle], atol=0.01)


@pytest.mark.parametrize("own", [8_000, 44_100, 48_000, 700_001])
@pytest.mark.parametrize("samples", [1, 7, 400])
def test_the_beginning_needs_only_the_beginning(own: int, samples: int) -> None:
    wave = np.random.default_rng(0).standard_normal(40_000)
    count = fbank.needed(samples, own, 16_000)
    whole = fbank.resampled(wave, own, 16_000)[:samples]
    np.testing.assert_array_equal(fbank.resampled(wave[:count], own, 16_000)[:samples], whole)
    # One sample less is missed, but where the filter's last weight is all but 0.
    other = np.where(np.arange(40_000) < count - 20, wave, 0)
    assert (fbank.resampled(other, own, 16_000)[:samples] != whole).any()
