"""Sentences of exports: what is painted and said of them, and manifests that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moezoo.deploy.runtime import drawing, folder, forms
from moezoo.deploy.runtime.forms import ExportError
from moezoo.schema_check import FormatFault

WORDS = ["<pad>", "<mask>", "<start>", "<end>", "a", "room", ",", "."]


def manifest(**picture: Any) -> dict[str, Any]:
    how = {"kind": "sentence", "words": WORDS, "end": 3, "marks": 4} | picture
    outputs = {
        "prediction": {"shape": ["b", 5], "dtype": "int32"},
        "logits": {"shape": ["b", 5, 8], "dtype": "float32"},
    }
    return {"task": {"name": "caption", "unit": "word index"}, "picture": how, "outputs": outputs}


def test_a_sentence_is_written_below_its_picture() -> None:
    row = np.array([4, 5, 6, 2, 3, 5, 5])
    assert drawing.words(manifest(), row) == "a room,"
    below = np.full((60, 90, 3), 7, np.uint8)
    painted = drawing.paint(manifest(), row, below=below)
    np.testing.assert_array_equal(painted[:60], below)
    assert painted.shape[1:] == (90, 3) and len(painted) > 60 and painted[60:].max() > 100
    nothing = drawing.paint(manifest(), np.array([3, 0]))
    assert nothing.shape[1] == drawing.BLANK[1]
    narrow = drawing.paint(manifest(words=[*WORDS[:5], "room" * 40, ",", "."]), row, (4, 4))
    assert narrow.shape[1] == 4, "as long as it has to be"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": WORDS[:-1]}, "words and labels are not 8"),
        ({"words": []}, "picture.words"),
        ({"words": [*WORDS[:-1], "two\nlines"]}, r"picture.words\[7\]"),
        ({"end": -1}, "picture.end"),
        ({"marks": "4"}, "picture.marks"),
        ({"marks": 10**9}, "picture.marks"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    made = manifest(**change)
    with pytest.raises(FormatFault, match=message):
        forms._picture(made["picture"], "picture")
        forms._check_picture(made)


def test_predictions_outside_of_the_words_are_refused() -> None:
    forms._check_picture(manifest())
    with pytest.raises(ExportError, match="predicts the classes 0 to 8, of which there are 8"):
        folder.check_classes(np.array([[0, 8]]), len(WORDS))
    wrong = manifest()
    wrong["outputs"]["prediction"]["dtype"] = "float32"
    with pytest.raises(FormatFault, match="no class index's"):
        forms._check_picture(wrong)
