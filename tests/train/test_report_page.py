"""A report as one page: the same words, numbers and pictures, nothing that is read as HTML."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moezoo.train import report_page
from moezoo.train.report import code, escaped, row

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
HOSTILE = "a <script>alert(1)</script> [x](javascript:y) | `b` *c* & _d_"
FILES = {
    "pictures/usage.png": PNG,
    "pictures/samples.md": f"| prompt | answer |\n|---|---|\n| {code('x|<b>')} | y |\n".encode(),
    "pictures/notes.txt": b"plain <i> text",
}
TEXT = "\n".join([
    f"# {escaped(HOSTILE)}", "", "- configuration: `config.json` beside this file",
    f"- data: {escaped(HOSTILE)}", "", "## Scores on the test split", "",
    row(("task", "this model")), "|---|---|", row((HOSTILE, 0.4321)), "",
    "![expert usage by task](pictures/usage.png)", "", "[answers](pictures/samples.md)", "",
    "[notes](pictures/notes.txt)", "", "some words", "",
])  # fmt: skip


def page() -> str:
    return report_page.page_of(TEXT, FILES.__getitem__)


def test_everything_of_the_report_stands_on_the_page_as_text() -> None:
    text = page()
    body = text.split("<body>")[1]
    tags = set(re.findall(r"<(/?\w+)", body))
    assert tags <= {
        f"{end}{tag}"
        for end in ("", "/")
        for tag in "h1 h2 ul li table tr th td figure figcaption img code pre p body html".split()
    }, "nobody's own sign is a tag"
    assert "default-src 'none'" in text and not re.findall(r"(?:src|href)=.?(?:https?|java)", text)
    shown = "a &lt;script&gt;alert(1)&lt;/script&gt; [x](javascript:y) | `b` *c* &amp; _d_"
    assert body.count(shown) == 3, "title, list, table"
    assert "<td>0.4321</td>" in body and "<code>config.json</code> beside" in body
    assert f"data:image/png;base64,{base64.b64encode(PNG).decode()}" in body
    assert "<code>x|&lt;b&gt;</code>" in body and "plain &lt;i&gt; text" in body
    assert body.count("<table>") == 2 and "---" not in body


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    file.write_text(page(), encoding="utf-8")
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000")
    call = [str(BROWSER), *words, "--dump-dom", f"file://{file}"]
    shown = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(re.findall(r"<td>", shown)) == 4 and "alert" in shown and "<script" not in shown
