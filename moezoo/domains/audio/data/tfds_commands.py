"""Speech Commands as tensorflow-datasets prepares it: ten words, silence, everything else.

tfds's own program and its audio feature type need TensorFlow and pydub, which this project does
without: anyone who has them can read what tfds prepared. The folder that the archive unpacks to
(`speech_commands`, all 35 words) needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.domains.audio.data.clips import Listing
from moezoo.domains.audio.data.fbank import RATE
from moezoo.domains.audio.data.published import TFDS_SPEECH_COMMANDS
from moezoo.domains.audio.data.read import checked, resampled, whole_steps
from moezoo.errors import UserError

NAME = "speech_commands_tfds"
NAMES = {"word": TFDS_SPEECH_COMMANDS}
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class Mapping(NamedTuple):
    """What `tfds_store` needs to know about a data set."""

    name: str = NAME
    dataset: str = "speech_commands"
    builder: Callable[..., Any] | None = None


def find(split: str, rate: int, given: Path | None, data_dir: Path) -> Listing:
    """The clips of a split, prepared by tfds first if they are not in `data_dir`.

    Raises UserError if the data cannot be obtained or a package is missing.
    """
    from moezoo.data import records, tfds_store  # tensorflow-datasets costs a quarter of a second

    mapping: Any = Mapping()
    try:
        builder = tfds_store.prepare(mapping, given, data_dir)
        found = records.records(builder, SPLITS[split])
    except ImportError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # tfds puts its own words in front
            cause = cause.__cause__
        raise UserError(
            "The speech_commands of tensorflow-datasets needs a package that is not installed "
            f"({getattr(cause, 'name', None) or cause}): install it, or unpack the archive and "
            "use --data.name speech_commands."
        ) from error
    return listing(found, split, rate, str(builder.data_dir))


def listing(records: Any, split: str, rate: int, mark: str) -> Listing:
    """The clips of records with `audio` int16 [N] at 16 kHz and `label`, a number."""
    words = [TFDS_SPEECH_COMMANDS[int(records[i]["label"])] for i in range(len(records))]

    def load(index: int) -> np.ndarray:
        where = f"example {index} of {NAME} ({split})"
        wave_N = whole_steps(records[index]["audio"], where)
        return checked(resampled(wave_N, RATE, rate), rate, where)

    return Listing(NAME, split, range(len(records)), {"word": words}, NAMES, load, mark)
