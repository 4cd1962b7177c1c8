"""The filterbank against `ASTFeatureExtractor`, for a clip that is padded or cut."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.domains.audio.data import fbank
from tests.fixtures import load, names


@pytest.mark.parametrize("name", names("soft_moa", "fbank", ("fbank",)))
def test_filterbank_and_input_values(name: str) -> None:
    z = load("soft_moa", name)
    frames, bands = z["input_values"].shape
    assert frames == int(z["max_length"])
    assert (fbank.MEAN, fbank.STD) == (float(z["mean"]), float(z["std"]))
    logmel = fbank.fbank(z["waveform"], bands)
    assert logmel.shape == z["fbank"].shape
    assert len(logmel) == fbank.frames_of(len(z["waveform"]))
    near = {"rtol": 1e-4, "atol": 2e-5}  # as the fixtures' description suggests
    np.testing.assert_allclose(logmel, z["fbank"], **near)
    audio, own = fbank.features(z["waveform"], frames, bands)
    np.testing.assert_allclose(audio, z["input_values"], **near)
    assert own == min(len(logmel), frames) and audio.dtype == np.float32
