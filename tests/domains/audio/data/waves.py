"""Sound files that tests write."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16_000


def tone(seconds: float = 0.3, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
    """A sine of half the full scale, float64 [N]."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write(path: Path, wave: np.ndarray, rate: int = RATE, **how: Any) -> Path:
    """A sound file; `subtype` and `format` are soundfile's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **how)
    return path


def wav_bytes(
    samples: bytes,
    code: int = 1,
    bits: int = 16,
    channels: int = 1,
    rate: int = RATE,
    *,
    frame: int | None = None,
    told: int | None = None,
    size: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
    subformat: int | None = None,
) -> bytes:
    """A WAV file with a header of one's own: `told` and `size` are the lengths that it announces.

    before, after: chunks around the samples. subformat: makes the header an extensible one.
    """
    frame = channels * -(-bits // 8) if frame is None else frame
    head = struct.pack("<HHIIHH", code, channels, rate, rate * frame % 2**32, frame, bits)
    if subformat is not None:
        tail = bytes.fromhex("00001000800000aa00389b71")
        head += struct.pack("<HHII", 22, bits, 0, subformat) + tail
    data = b"data" + struct.pack("<I", len(samples) if size is None else size)
    rest = b"WAVE" + chunk(b"fmt ", head) + before + data + samples
    rest += b"\0" * (len(samples) % 2) * (size is None) + after
    return b"RIFF" + struct.pack("<I", len(rest) if told is None else told) + rest


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a RIFF file, with the byte that fills up an odd one."""
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
