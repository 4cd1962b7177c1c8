"""What an AST reads of a clip, from the `preprocessor_config.json` of its folder.

`ASTFeatureExtractor` of transformers: log-mel features minus a mean, over two deviations. Another
mean and deviation than AudioSet's are folded into the patches' map; another rate is refused.
"""

from __future__ import annotations

from pathlib import Path

from moezoo.errors import UserError
from moezoo.schema_check import anything, flag, maybe, number, one_of, refused, table, text, whole
from moezoo.structured import read_object
from moezoo.weights.fold import Inputs

NAME = "preprocessor_config.json"
PREPROCESSOR = "ASTFeatureExtractor"
PREPROCESSOR_FORM = table(
    {
        "feature_extractor_type": maybe(one_of(PREPROCESSOR)),
        "processor_class": maybe(text(200)),
        "mean": number(-1e4, 1e4),
        "std": number(1e-4, 1e4),
        "do_normalize": flag,  # null would be false
        "sampling_rate": maybe(whole(1, 10_000_000)),
        "num_mel_bins": maybe(whole(1, 10_000)),
        "max_length": maybe(whole(1)),
        "feature_size": maybe(one_of(1)),
        # Of waveforms, which the extractor does not pad.
        **dict.fromkeys(("padding_value", "padding_side", "return_attention_mask"), anything),
    },
    others=refused,  # windows, dither and the like would change the features
)
# Of the extractor's class, where a file does not say.
MEAN, STD, RATE, BANDS = -4.2677393, 4.5689974, 16_000, 128


def read_preprocessor(folder: Path | str) -> Inputs | None:
    """What the model in a folder sees of log-mel features; None where its folder does not tell.

    Raises UserError where the file is damaged or another kind of preprocessor's.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    values = read_object(path, PREPROCESSOR_FORM)
    if values.get("do_normalize") is False:
        return Inputs((0.0,), (1.0,))
    return Inputs((values.get("mean", MEAN),), (2 * values.get("std", STD),))


def check_preprocessor(folder: Path | str, rate: int, bands: int) -> None:
    """UserError where the model in a folder heard clips of another rate, or reads other bands."""
    path = Path(folder) / NAME
    if read_preprocessor(folder) is None:
        return
    values = read_object(path, PREPROCESSOR_FORM)
    own = {"rate": values.get("sampling_rate") or RATE, "mel": values.get("num_mel_bins") or BANDS}
    wrong = {k: v for k, v in own.items() if v != {"rate": rate, "mel": bands}[k]}
    if wrong:
        names = {"rate": "sampling_rate", "mel": "num_mel_bins"}
        told = " and ".join(f"{names[k]} {v}" for k, v in wrong.items())
        options = " ".join(f"--data.{k} {v}" for k, v in wrong.items())
        raise UserError(f"{path} has {told}, the data section another: add {options}.")
