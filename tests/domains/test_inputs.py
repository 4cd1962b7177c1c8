"""What an export says of its input: the format that exports have had from the start, in full."""

from __future__ import annotations

import pytest

from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.runtime.forms import SCHEMA
from moezoo.domains.audio import runtime as sound
from moezoo.domains.audio.export import spectrograms
from moezoo.domains.images import runtime as photo
from moezoo.domains.images.export import photos
from moezoo.schema_check import FormatFault

MEAN = [0.48500001430511475, 0.4560000002384186, 0.4059999883174896]
STD = [0.2290000021457672, 0.2240000069141388, 0.22499999403953552]


def said(reads: InputSpec) -> dict:
    return {
        "inputs": {reads.name: reads.described()},
        "preprocess": [dict(step) for step in reads.preprocess],
        "postprocess": reads.postprocess,
    }


def test_images() -> None:
    reads = photos((64, 96))
    assert SCHEMA == 1 and reads.unit == "images" and set(reads.files) == {"photo.py", "picture.py"}
    assert reads.batch(2).shape == (2, 64, 96, 3)
    resize = {"step": "resize", "height": 64, "width": 96, "mode": "bilinear", "antialias": True}
    assert said(reads) == {
        "inputs": {
            "image": {
                "dtype": "float32",
                "shape": ["b", 64, 96, 3],
                "layout": "NHWC",
                "colour": "RGB",
                "range": "after `preprocess`",
            }
        },
        "preprocess": [
            resize,
            {"step": "scale", "factor": 1 / 255},
            {"step": "normalise", "mean": MEAN, "std": STD},
        ],
        "postprocess": "already applied in `prediction`; resize it to the photo to show it",
    }
    photo.STEPS(said(reads)["preprocess"], "preprocess")
    photo.fits([64, 96, 3], reads.preprocess, "inputs.image.shape")


def test_clips() -> None:
    reads = spectrograms((98, 64), 16_000, "average")
    files = {"sound.py", "fbank.py", "decode.py", "wav.py"}
    assert (
        reads.unit == "clips" and set(reads.files) == files and reads.batch(2).shape == (2, 98, 64)
    )
    mel = {"step": "log_mel", "bands": 64, "window_seconds": 0.025, "hop_seconds": 0.01}
    mel |= {"window": "hann", "lowest_hertz": 20.0, "preemphasis": 0.97, "by": "fbank.py"}
    assert said(reads) == {
        "inputs": {
            "audio": {
                "dtype": "float32",
                "shape": ["b", 98, 64],
                "layout": "frames of 10 ms, mel bands",
                "range": "after `preprocess`",
            }
        },
        "preprocess": [
            {"step": "mono", "how": "average"},
            {"step": "resample", "rate": 16_000},
            mel,
            {"step": "pad", "frames": 98, "value": 0.0, "longer": "cut"},
            {"step": "normalise", "mean": -4.2677393, "std": 9.1379948},
        ],
        "postprocess": "already applied in `prediction`",
    }
    sound.STEPS(said(reads)["preprocess"], "preprocess")
    sound.fits([98, 64], reads.preprocess, "inputs.audio.shape")


@pytest.mark.parametrize(
    ("at", "changes", "says"),
    [
        (2, {"window_seconds": 0.02}, "window_seconds is 0.02, it must be 0.025"),
        (2, {"lowest_hertz": 0.0}, "lowest_hertz is 0.0, it must be 20.0"),
        (4, {"mean": 0.0}, "mean is 0.0, it must be -4.2677393"),
        (4, {"std": 1.0}, "std is 1.0, it must be 9.1379948"),
    ],
)
def test_steps_that_no_program_here_does_are_refused(at: int, changes: dict, says: str) -> None:
    steps = said(spectrograms((98, 64), 16_000, "average"))["preprocess"]
    sound.STEPS(steps, "preprocess")
    steps[at] |= changes
    with pytest.raises(FormatFault, match=says):
        sound.STEPS(steps, "preprocess")
