"""Headers of WAV files: every width, streams without lengths, odd chunks, and what has no sense."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from moezoo.domains.audio.data.read import read
from moezoo.errors import UserError
from tests.domains.audio.data.waves import RATE, chunk, tone, wav_bytes

WAVE = tone(0.05)
STEPS = np.round(WAVE * 2**15).astype("<i2").tobytes()
LIST = chunk(b"LIST", b"INFOISFT\x05\0\0\0x.y.z")


@pytest.fixture(autouse=True, params=["with soundfile", "without"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read alike whether soundfile is there or not."""
    there = soundfile if request.param == "with soundfile" else None
    monkeypatch.setitem(sys.modules, "soundfile", there)


def heard(path: Path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    return read(path)


def whole(wave: np.ndarray, size: int) -> bytes:
    """Samples as whole numbers of so many bytes; those of one have no sign."""
    steps = [int(round(float(x) * 2 ** (8 * size - 1))) for x in wave]
    if size == 1:
        return bytes(step + 128 for step in steps)
    return b"".join(step.to_bytes(size, "little", signed=True) for step in steps)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("extensible", [False, True])
def test_whole_numbers_of_every_width(tmp_path: Path, size: int, extensible: bool) -> None:
    more: dict[str, Any] = {"code": 0xFFFE, "subformat": 1} if extensible else {}
    found = heard(tmp_path / "a.wav", wav_bytes(whole(WAVE, size), bits=8 * size, **more))
    np.testing.assert_allclose(found, WAVE, atol=max(2.0 ** (-8 * size), 1e-7))


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("extensible", [False, True])
def test_floats(tmp_path: Path, size: int, extensible: bool) -> None:
    more: dict[str, Any] = {"code": 0xFFFE, "subformat": 3} if extensible else {"code": 3}
    stored = WAVE.astype(f"<f{size}").tobytes()
    found = heard(tmp_path / "a.wav", wav_bytes(stored, bits=8 * size, **more))
    np.testing.assert_allclose(found, WAVE, atol=1e-7)


@pytest.mark.parametrize(("bits", "size"), [(12, 2), (20, 3), (20, 4), (24, 4)])
def test_fewer_bits_than_bytes_are_the_upper_ones(tmp_path: Path, bits: int, size: int) -> None:
    stored = wav_bytes(whole(WAVE, size), bits=bits, frame=size)
    np.testing.assert_allclose(heard(tmp_path / "a.wav", stored), WAVE, atol=2.0**-15)


def test_big_endian_files(tmp_path: Path) -> None:
    for size, code in ((2, 1), (3, 1), (4, 3)):
        little = whole(WAVE, size) if code == 1 else WAVE.astype("<f4").tobytes()
        big = np.frombuffer(little, np.uint8).reshape(-1, size)[:, ::-1].tobytes()
        head = struct.pack(">HHIIHH", code, 1, RATE, RATE * size, size, 8 * size)
        rest = b"WAVEfmt " + struct.pack(">I", 16) + head + b"data" + struct.pack(">I", len(big))
        content = b"RIFX" + struct.pack(">I", len(rest) + len(big)) + rest + big
        np.testing.assert_allclose(heard(tmp_path / "a.wav", content), WAVE, atol=2.0**-15)


def test_files_beyond_4_gb_keep_their_length_apart(tmp_path: Path) -> None:
    lengths = chunk(b"ds64", struct.pack("<QQQI", 0, len(STEPS), len(STEPS) // 2, 0))
    content = wav_bytes(STEPS, told=0xFFFFFFFF, size=0xFFFFFFFF, after=LIST)
    content = b"RF64" + content[4:12] + lengths + content[12:]
    np.testing.assert_allclose(heard(tmp_path / "a.wav", content), WAVE, atol=2.0**-15)


@pytest.mark.parametrize(
    "changes",
    [
        {"told": 0},  # scipy: UnboundLocalError
        {"told": 0, "size": 0},
        {"told": 36, "size": 0},  # written first by whoever died before coming back
        {"told": 8, "size": 0},
        {"told": 0xFFFFFFFF, "size": 0xFFFFFFFF},  # ffmpeg's
        {"told": 0x7FFFF024, "size": 0x7FFFF000},  # sox's
        {"told": 0xFFFFFFFF, "size": 0},
        {"told": 5},
        {"told": 10**6},
        {"before": LIST},
        {"before": chunk(b"LIST", b"odd"), "after": chunk(b"junk", b"")},
        {"after": LIST},
        {"after": b"trailing rubbish"},
        {"before": chunk(b"fact", b"\xff" * 4)},
    ],
    ids=str,
)
def test_headers_of_streams_and_odd_chunks(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = heard(tmp_path / "a.wav", wav_bytes(STEPS, **changes))
    np.testing.assert_allclose(found, WAVE, atol=2.0**-15)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (wav_bytes(b"", after=LIST), "has no samples"),
        (wav_bytes(b"", told=0, size=0), "has no samples"),
        (wav_bytes(b""), "has no samples"),
        (wav_bytes(STEPS[:-500], size=len(STEPS)), "is cut off: 1600 bytes of samples are announ"),
        (wav_bytes(STEPS)[:40], "has no samples: its header has no chunk 'data'"),
        (wav_bytes(STEPS)[:30], "has a chunk 'fmt ' that is too short"),
        (wav_bytes(STEPS)[:12], "has no samples: its header has no chunk 'fmt '"),
        (wav_bytes(STEPS)[:12] + chunk(b"data", STEPS), "has samples in front of the chunk"),
        (wav_bytes(STEPS, channels=0, frame=2), "has a header without sense: 0 channels"),
        (wav_bytes(STEPS, frame=0), "without sense"),
        (wav_bytes(STEPS, channels=3, frame=4), "without sense"),
        (wav_bytes(STEPS, bits=0, frame=2), "without sense"),
        (wav_bytes(STEPS, bits=128), "without sense"),
        (wav_bytes(STEPS, bits=32, frame=2), "without sense"),
        (wav_bytes(STEPS, code=3), "without sense"),
        (wav_bytes(STEPS, code=3, bits=64, frame=4), "without sense"),
        (wav_bytes(STEPS, bits=8, frame=2), "without sense"),
        (wav_bytes(STEPS, bits=24, frame=8), "without sense"),
        (wav_bytes(STEPS, bits=4, frame=1), "without sense"),
        (wav_bytes(STEPS, rate=1), "has 1 samples per second, where 1000 to 1000000 are read"),
        (wav_bytes(STEPS, rate=0), "has 0 samples per second"),
        (wav_bytes(STEPS, rate=268_435_399), "has 268435399 samples per second"),
        (wav_bytes(STEPS[:40]), "is 1 ms long, shorter than one window"),
        (wav_bytes(np.float32([0.5, np.nan] * 400).tobytes(), 3, 32), "not finite numbers"),
        (wav_bytes(np.float32([0.5, -np.inf] * 400).tobytes(), 3, 32), "not finite numbers"),
        (wav_bytes(np.float64([0.5, 1e300] * 400).tobytes(), 3, 64), "up to 1e.300 where 1 is"),
        (wav_bytes(np.float32([0.5, -9e3] * 400).tobytes(), 3, 32), "up to 9000 where 1 is full"),
    ],
)
def test_what_has_no_sense_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UserError, match=f"a.wav' .*{says}") as told:
        heard(tmp_path / "a.wav", content)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("code", [2, 6, 7, 0x11, 0x50, 0x55, 0xF1AC, 0xFFFE, 0x7777])
def test_other_encodings_are_read_by_soundfile_or_refused(tmp_path: Path, code: int) -> None:
    """Their headers are of no use here; what counts is one sentence."""
    (tmp_path / "a.wav").write_bytes(wav_bytes(STEPS, code=code, bits=8))
    if sys.modules["soundfile"] is not None and code in (6, 7):
        stored, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
        np.testing.assert_array_equal(read(tmp_path / "a.wav"), stored)
        return
    with pytest.raises(UserError, match="a.wav' (has|cannot|is no)"):
        read(tmp_path / "a.wav")
