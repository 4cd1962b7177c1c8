"""The sources of Python's standard library, taken apart: statements, docstrings, comments.

Every machine that runs Python from sources has them; no network is needed. Python versions and
distributions differ in the files and their contents.
"""

from __future__ import annotations

import ast
import sysconfig
import tokenize
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from moezoo.errors import UserError

# Tests, what some distributions leave out, tables, and packages that Python 3.12 and 3.13 dropped.
_LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "ensurepip", "encodings"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "pydoc_data"),
    *("lib2to3", "distutils"),
}
_GENERATED = ("config-", "_sysconfigdata")


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Parts(NamedTuple):
    """A source file taken apart."""

    code: str
    docstrings: str
    comments: str


@lru_cache(1)
def files() -> dict[str, Path]:
    """Source files by their path inside the library, sorted; UserError where there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        parts = name.parts
        if not _LEFT_OUT & set(parts) and not any(p.startswith(_GENERATED) for p in parts):
            found[name.as_posix()] = path
    if not found:
        raise UserError(f"This Python has no source files of its standard library in {root}.")
    return found


def _source(name: str) -> tuple[str, ast.Module]:
    """A file's text and syntax tree, both empty where it cannot be parsed."""
    try:
        with tokenize.open(files()[name]) as file:
            source = file.read()
        return source, ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return "", ast.Module([], [])


@lru_cache(1024)
def parts(name: str) -> Parts:
    """Statements, docstrings and comments of one file; empty where it cannot be parsed.

    A docstring that is all of a body leaves `pass` behind. Comments are those of two lines and
    more, with a blank line between them.
    """
    source, tree = _source(name)
    lines = source.split("\n")
    in_string: set[int] = set()
    documented: dict[int, str] = {}
    docstrings: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant):
            in_string.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            if text is not None:
                first = node.body[0]
                documented |= dict.fromkeys(_lines_of(first), "")
                docstrings.append((first.lineno, text))
                if len(node.body) == 1:
                    documented[first.lineno] = " " * first.col_offset + "pass"
    comments = [
        number
        for number, line in enumerate(lines, 1)
        if line.lstrip().startswith("#") and number not in in_string
    ]
    left = documented | dict.fromkeys(comments, "")
    numbered = [(number, line.rstrip()) for number, line in enumerate(lines, 1)]
    kept = [left.get(number, line) for number, line in numbered if left.get(number) != ""]
    return Parts(
        "\n".join(line for i, line in enumerate(kept) if line or (i and kept[i - 1])),
        "\n\n".join(text for _, text in sorted(docstrings)),
        _prose(lines, comments),
    )


def _lines_of(statement: ast.stmt) -> range:
    return range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)


def _prose(lines: list[str], comments: list[int]) -> str:
    blocks: list[list[str]] = []
    for before, number in zip([0, *comments], comments, strict=False):
        text = lines[number - 1].strip().lstrip("#").strip()
        if number - 1 != before or not blocks:
            blocks.append([])
        if not text or any(c.isalnum() for c in text):  # no lines of ====
            blocks[-1].append(text)
    return "\n\n".join("\n".join(b).strip() for b in blocks if len(b) > 1)


def tree(name: str, size: int) -> str:
    """The syntax tree of a file without its docstrings, statement by statement.

    It ends with the statement that brings it to `size` characters.
    """
    _, whole = _source(name)
    for node in ast.walk(whole):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    texts: list[str] = []
    written = 0
    for statement in whole.body:
        texts.append(ast.dump(statement, indent=1))
        written += len(texts[-1])
        if written >= size:
            break
    return "\n".join(texts)
