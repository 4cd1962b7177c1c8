"""Pages of sweeps and certificates: what stands in them, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moezoo.deploy import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PIXEL = page._png([[[255, 0, 0]]])  # type: ignore[arg-type]


def section(task: str = "depth") -> dict[str, Any]:
    """A sweep of two methods at three budgets, one example and one layer."""

    def point(keep: int, loss: float) -> dict[str, Any]:
        more = {"loss_at_most": loss + 0.01, "differ": 0.25, "coverage": 0.5, "flops": 2e6}
        return {"keep": keep, "value": 1 + loss, "loss": loss, "bytes": keep * 1e6, **more}

    example = {"picture": PIXEL, "differ": float("nan"), "violations": 3}
    return {
        "kind": "sweep", "task": task, "metric": "rmse", "lower_is_better": True, "full": 1.0,
        "methods": [
            {"label": "mean </script><b>bold", "points": [point(k, 0.1 / k) for k in (3, 2, 1)]},
            {"label": "cut", "points": [point(k, 0.3 / k) for k in (3, 2)]},
        ],
        "examples": {
            "input": [PIXEL], "full": [PIXEL], "at": {str(k): [example] for k in (3, 2, 1)},
        },
        "usage": [{"layer": "blocks/1/mlp", "share": [0.5, 0.25, 0.25, 0.0]}],
        "patches": [{"blocks/1/mlp": {"grid": [2, 2], "first": [0, 1, -1, 3]}}],
    }  # fmt: skip


def test_nothing_in_the_data_is_read_as_html(tmp_path: Path) -> None:
    page.write(tmp_path / "index.html", "a <title>", "words & more", [section("<img src=x>")])
    text = (tmp_path / "index.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert not set("<>&") & set(data)
    found = json.loads(data)
    assert found["title"] == "a <title>" and found["sections"][0]["task"] == "<img src=x>"
    assert found["sections"][0]["examples"]["at"]["2"][0]["differ"] is None
    # The page asks nobody for anything: its own policy forbids it.
    assert "default-src 'none'" in text and not re.findall(r"(?:src|href)=.?https?:", text)


def test_another_program_is_no_page_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    page.write(file, "title", "words", [section()])
    assert page.is_own(file)
    text = file.read_text()
    for changed in (
        text.replace("default-src 'none'", "default-src *"),
        text.replace("</html>", "</html><script>alert(1)</script>"),
        text.replace('"title": "title"', '"title": "</script><script>alert(1)</script>"'),
        text.replace('"title": "title"', '"title": title'),
        text.partition('id="data">')[0],
        "",
    ):
        assert changed != text
        file.write_text(changed)
        assert not page.is_own(file), changed[:200]


@pytest.mark.parametrize(
    ("tokens", "shape", "grid"),
    [
        (64, (64, 64), (8, 8)),
        (65, (64, 64), (8, 8)),
        (129, (64, 128), (8, 16)),
        (69, (64, 64), (8, 8)),
        (12, (480, 640), (3, 4)),
        (7, (64, 64), (1, 7)),
        (1, (64, 64), (1, 1)),
    ],
)
def test_patches_have_the_form_of_the_picture(
    tokens: int, shape: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert page.grid_of(tokens, shape) == grid


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_numbers_of_the_sliders_place(tmp_path: Path) -> None:
    other = section("semseg")
    other["methods"] = other["methods"][:1]
    file = tmp_path / "index.html"
    page.write(file, "small", "words", [section(), other])
    # The address moves the slider, as a hand does.
    for place, keep, rows, img in (
        ("depth:2", 2, 2, 3),
        ("depth:1", 1, 1, 3),
        ("semseg:3", 3, 1, 3),
    ):
        words = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000")
        call = [str(BROWSER), *words, "--dump-dom", f"file://{file}#{place}"]
        shown = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout
        (said,) = re.findall(r'<b id="keep">([^<]*)</b>', shown)
        assert said == f" {keep} experts per layer"
        table = shown.split('<table id="at">')[1].split("</table>")[0]
        cells = re.findall(r"<td>([^<]*)</td>", table)
        assert len(cells) == 10 * rows
        assert cells[0] == "mean &lt;/script&gt;&lt;b&gt;bold"
        assert cells[2] == f"{10 / keep:.1f} %" and cells[6] == f"{keep:.2f}"
        assert shown.count('src="data:image/png') == img
