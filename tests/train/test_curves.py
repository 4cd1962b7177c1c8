"""The picture of a run's course."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from moezoo.train import curves


def rows(count: int = 100) -> list[dict]:
    return [
        {
            "step": step,
            "loss/total": 2.0 + 1.0 / step,
            "loss/depth": 1000.0 if step == 1 else 1.0 + 0.01 * (step % 2),
            "loss/edge": 10.0 ** (-step / 20),
            "balance/importance": None if step == 3 else 0.5,
            "gradient_norm": 3.0,
            "learning_rate": 1e-3 * (1 - step / count),
            "dropped": 0.0,
            "timing": {"seconds": 1.0},
        }
        for step in range(1, count + 1)
    ]


def test_what_is_drawn_and_in_which_order() -> None:
    scores = [{"step": 50, "depth/rmse": 0.5, "x/acc": None}, {"step": 100, "depth/rmse": 0.4}]
    found = curves.panels(rows(), scores, {"depth/rmse": True})
    assert [panel.title for panel in found] == [
        "weighted sum of all losses",
        "loss/depth",
        "loss/edge",
        "balance/importance",
        "length of the gradient",
        "learning rate",
        "depth/rmse",
    ]
    assert all(panel.label for panel in found)
    assert found[-1].label == "m, lower is better"
    assert len(found[3].values) == 99  # what was no number has no point


def test_one_wild_value_does_not_flatten_a_curve() -> None:
    values = np.array([row["loss/depth"] for row in rows()])
    low, high = curves.limits(values)
    assert low < 1.0 < 1.01 < high < 50
    assert curves.limits(np.array([0.1, 0.9]))[0] == 0.0
    low, high = curves.limits(np.array([2.0, 2.0]))
    assert low < 2.0 < high


def test_a_curve_over_decades_is_logarithmic() -> None:
    assert curves.logarithmic(np.array([row["loss/edge"] for row in rows()]))
    assert not curves.logarithmic(np.array([row["loss/total"] for row in rows()]))
    assert not curves.logarithmic(np.array([0.0, 1.0, 1e9]))


def test_every_panel_names_its_axes_and_the_lines_have_a_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Figure] = []
    save = curves.save
    monkeypatch.setattr(
        curves, "save", lambda figure, path: (kept.append(figure), save(figure, path))
    )
    curves.curves(tmp_path / "curves.png", rows(), [{"step": 100, "a$b$|[/x]/_acc": 0.5}])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (figure,) = kept
    drawn = [axis for axis in figure.axes if axis.axison]
    assert len(drawn) == 7
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for axis in drawn)
    assert all(axis.get_xlim() == (0, 100) for axis in drawn)
    words = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert words == {"as logged", "running mean", "evaluation"}


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    curves.curves(tmp_path / "curves.png", [{"step": 1, "loss/total": None}], [])
    assert not list(tmp_path.iterdir())


def test_running_mean_keeps_length_and_level() -> None:
    values = np.full(120, 3.0)
    np.testing.assert_allclose(curves.smooth(values), values)
    assert len(curves.smooth(np.arange(7.0))) == 7
