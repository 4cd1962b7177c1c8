"""A report as one page: index.html beside report.md, which needs no server, network or other file.

Made of the text of report.md itself, so that the two cannot differ: headings, lists, tables, code
and pictures are all that stands in it (`train.report`). Every sign of people's own is text, never
HTML, and the page may load nothing.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterator
from itertools import groupby

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b2430; }}
h1 {{ font-size: 1.35rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }} h3 {{ font-size: 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #e3e7ec; }}
td:first-child, th:first-child {{ text-align: left; }} figure {{ margin: 1.2rem 0; }} img {{ max-width: 100%; }}
figcaption {{ font-size: 13px; color: #5a6675; }} pre {{ background: #f4f6f9; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }}
</style>
</head>
<body>
"""  # noqa: E501
LINK = re.compile(r"!?\[(?P<words>(?:\\.|[^\]\\])*)\]\((?P<file>[^()\s]+)\)")
INLINE = re.compile(r"`([^`]*)`|\\([^a-zA-Z0-9\s])")
CELL = re.compile(r"(?<!\\)\|")
LONGEST = 200_000  # bytes of a text that is shown as it is


def page_of(text: str, read: Callable[[str], bytes]) -> str:
    """The page of a report.md. read: the bytes of a file by its name in the report."""
    found = (line[2:] for line in text.splitlines() if line.startswith("# "))
    head = HEAD.format(title=html.escape(_plain(next(found, "report"))))
    return f"{head}{_body(text, read)}\n</body>\n</html>\n"


def _body(text: str, read: Callable[[str], bytes]) -> str:
    groups = groupby(text.splitlines(), _kind)
    return "\n".join(part for kind, group in groups for part in PARTS[kind]([*group], read))


def _kind(line: str) -> str:
    if LINK.fullmatch(line):
        return "file"
    starts = {"#": "heading", "- ": "list", "|": "table"}
    return next((kind for start, kind in starts.items() if line.startswith(start)), "words")


def _headings(lines: list[str], read: Callable[[str], bytes]) -> Iterator[str]:
    for line in lines:
        marks, _, words = line.partition(" ")
        level = min(len(marks), 6)
        yield f"<h{level}>{_inline(words)}</h{level}>"


def _list(lines: list[str], read: Callable[[str], bytes]) -> Iterator[str]:
    yield "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"


def _table(lines: list[str], read: Callable[[str], bytes]) -> Iterator[str]:
    rows = [CELL.split(line)[1:-1] for line in lines]
    made = []
    for number, cells in enumerate(rows):
        if all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in cells):
            continue  # the line under the head
        tag = "td" if number else "th"
        shown = "".join(f"<{tag}>{_inline(cell.strip())}</{tag}>" for cell in cells)
        made.append(f"<tr>{shown}</tr>")
    yield f"<table>{''.join(made)}</table>"


def _files(lines: list[str], read: Callable[[str], bytes]) -> Iterator[str]:
    for line in lines:
        found = LINK.fullmatch(line)
        assert found is not None  # of this kind
        words, content = _inline(found["words"]), read(found["file"])
        if found["file"].endswith(".png"):
            shown = base64.b64encode(content).decode()
            inside = f'<img alt="" src="data:image/png;base64,{shown}">'
        elif found["file"].endswith(".md"):
            inside = _body(content.decode("utf-8", "replace"), read)
        else:
            inside = f"<pre>{html.escape(content[:LONGEST].decode('utf-8', 'replace'))}</pre>"
        yield f"<figure>{inside}<figcaption>{words}</figcaption></figure>"


def _words(lines: list[str], read: Callable[[str], bytes]) -> Iterator[str]:
    yield from (f"<p>{_inline(line)}</p>" for line in lines if line.strip())


PARTS = {
    "heading": _headings,
    "list": _list,
    "table": _table,
    "file": _files,
    "words": _words,
}


def _inline(text: str) -> str:
    """A text of report.md as HTML: code, and signs that were escaped there."""
    made, at = "", 0
    for found in INLINE.finditer(text):
        made += html.escape(text[at : found.start()])
        code, sign = found.groups()
        shown = sign if sign is not None else code.replace("\\|", "|")
        made += f"<code>{html.escape(shown)}</code>" if sign is None else html.escape(shown)
        at = found.end()
    return made + html.escape(text[at:])


def _plain(text: str) -> str:
    return INLINE.sub(lambda found: found[1] if found[2] is None else found[2], text)
