"""Names of people's own in pictures: shown as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moezoo.domains.text import report as text_pictures
from moezoo.tasks.painting import Swatches
from moezoo.train import pictures

ODD = ("a$b", "$x^", "_first", "mmlu[/easy]", "a|b", "\\frac{", "")


def test_dollars_are_no_mathematics(tmp_path: Path) -> None:
    """Each of these ended in a ValueError of matplotlib's mathematics, or lost its dollars."""
    table = np.full((len(ODD), 4), 0.25)
    pictures.usage(tmp_path / "usage.png", {"layer $_": table}, ODD)
    pictures.usage_grid(tmp_path / "grid.png", {"layers/$_$/attn/q": table}, ODD)
    confusion = np.eye(len(ODD), dtype=int)
    pictures.confusions(tmp_path / "confusion.png", {"$_$": confusion}, {"$_$": ODD})
    image = np.zeros((4, 4, 3), np.uint8)
    key = Swatches(ODD, np.zeros((len(ODD), 3), np.uint8))
    column = pictures.Column({"$_$": [image], "a\n$x^": [image]}, key)
    pictures.predictions(tmp_path / "predictions.png", [column], {"$x^": ["$_"]})
    scores = {f"{name}/accuracy": 0.5 for name in ODD}
    text_pictures.scores_by_task(tmp_path / "scores.png", scores, ODD)
    assert len(list(tmp_path.iterdir())) == 5


def test_texts_made_while_drawing_are_plain_too() -> None:
    figure, axes = pictures.figure_of(1, 1, (2, 2))
    axes[0, 0].set_xticks([0, 1], ["$_$", "b"])
    axes[0, 0].plot([0, 1], [0, 1], label="x")
    axes[0, 0].legend(title="$_")
    assert pictures.drawn(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(("most", "between"), [(1200, False), (180, True)])
def test_powers_of_ten_are_plain_numbers(most: float, between: bool) -> None:
    figure, ((axes,),) = pictures.figure_of(1, 1, (3, 2))
    axes.set_yscale("log")
    axes.plot([30, most])
    pictures.drawn(figure)
    said = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert "100" in said and not any("$" in text for text in said)
    assert ("60" in said) == between


@pytest.mark.parametrize("name", ODD)
def test_figures_of_others_keep_their_mathematics(name: str) -> None:
    import matplotlib

    figure, axes = pictures.figure_of(1, 1, (1, 1))
    axes[0, 0].set_title(name)
    pictures.drawn(figure)
    assert matplotlib.rcParams["text.parse_math"]
