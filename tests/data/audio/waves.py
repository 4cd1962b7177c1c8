"""Sound files that tests write."""

from __future__ import annotations

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
