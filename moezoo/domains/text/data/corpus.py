"""A corpus that needs no download: text that every machine has, in several different domains.

| domain | one document |
|---|---|
| code | statements of one file of the standard library, without docstrings and comment lines |
| docstrings | the docstrings of one file |
| comments | its comments of two or more lines |
| trees | its syntax tree, as `ast.dump` writes it |
| topics | one topic of the language reference (`pydoc_data.topics`) |
| names | 256 code points and their Unicode names |

The corpus takes apart the sources of Python's standard library; every machine that runs Python from
sources has them. Domains, their order and the form of documents are the same on Python 3.11 to
3.13; the contents depend on the Python in use, so figures from different versions or distributions
are not comparable.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tokenize
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from moezoo.errors import UserError, unknown

# Tests, files that some distributions omit, tables, and packages dropped in Python 3.12 and 3.13.
_LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "ensurepip", "encodings"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "pydoc_data"),
    *("lib2to3", "distutils"),
}
_GENERATED = ("config-", "_sysconfigdata")


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class SourceParts(NamedTuple):
    """A source file taken apart."""

    code: str
    docstrings: str
    comments: str


@lru_cache(1)
def files() -> dict[str, Path]:
    """Source files by their path inside the library, sorted; UserError if there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        parts = name.parts
        if not _LEFT_OUT & set(parts) and not any(p.startswith(_GENERATED) for p in parts):
            found[name.as_posix()] = path
    if not found:
        raise UserError(f"This Python has no source files for its standard library in {root}.")
    return found


def _source(name: str) -> tuple[str, ast.Module]:
    """A file's text and syntax tree, both empty if it cannot be parsed."""
    try:
        with tokenize.open(files()[name]) as file:
            source = file.read()
        return source, ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return "", ast.Module([], [])


@lru_cache(1024)
def parts(name: str) -> SourceParts:
    """Statements, docstrings and comments of one file; empty if it cannot be parsed.

    If a docstring is all of a body, `pass` takes its place. Comments are those of two or more
    lines, with a blank line between them.
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
    return SourceParts(
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

    It ends with the statement that brings it up to `size` characters.
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


SPLITS = ("train", "test")
TEST = 5  # one document in this many
LONGEST = 20_000  # characters per document, cut at the end of a line
SHORTEST = 200
LIMIT = 400_000  # characters of a domain's split


class Document(NamedTuple):
    """One text; `name` is its file, topic or range of code points."""

    domain: str
    name: str
    text: str


def split_of(name: str) -> str:
    """The split of everything that comes from the file (or topic, or range) with this name."""
    return "test" if crc32(f"split {name}".encode()) % TEST == 0 else "train"


def _scattered(names: list[str]) -> list[str]:
    """The names ordered by hash, so that the first ones are a sample."""
    return sorted(names, key=lambda name: (crc32(name.encode()), name))


def _of_files(read: Callable[[str], str], split: str) -> Iterator[tuple[str, str]]:
    for name in _scattered([n for n in files() if split_of(n) == split]):
        yield name, read(name)


def _topics(split: str) -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python lacks pydoc_data.topics, which the domain 'topics' needs."
        ) from None
    for name in _scattered([n for n in topics if split_of(f"topic {n}") == split]):
        yield name, topics[name]


def _names(split: str) -> Iterator[tuple[str, str]]:
    blocks = {f"{start:05X}": start for start in range(0, 0x20000, 256)}
    for block in _scattered([b for b in blocks if split_of(f"names {b}") == split]):
        codes = range(blocks[block], blocks[block] + 256)
        named = [(code, unicodedata.name(chr(code), "")) for code in codes]
        # These two scripts have 50,000 names that contain nothing but the number.
        yield (
            block,
            "\n".join(
                f"{code:04X} {name}"
                for code, name in named
                if name and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE"))
            ),
        )


_DOMAINS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "code": partial(_of_files, lambda name: parts(name).code),
    "comments": partial(_of_files, lambda name: parts(name).comments),
    "docstrings": partial(_of_files, lambda name: parts(name).docstrings),
    "names": _names,
    "topics": _topics,
    "trees": partial(_of_files, lambda name: tree(name, LONGEST)),
}
DOMAINS = tuple(_DOMAINS)

_UNPRINTABLE = re.compile(r"[^\n\x20-\x7e\u00a0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd]")


def clean(text: str) -> str:
    """Tabs become spaces; no control characters, no blank edges, at most `LONGEST` characters."""
    text = _UNPRINTABLE.sub("", text.replace("\r\n", "\n").expandtabs(4)).strip("\n").rstrip()
    if len(text) <= LONGEST:
        return text
    return text[: text.rfind("\n", 0, LONGEST) if "\n" in text[:LONGEST] else LONGEST].rstrip()


@lru_cache
def documents(domain: str, split: str, limit: int = LIMIT) -> tuple[Document, ...]:
    """A domain's documents in a fixed order, as many as fit in `limit` characters.

    A file's name decides its split, the same one in all domains. Raises UserError for unknown
    names, and if this Python lacks the texts.
    """
    if domain not in _DOMAINS:
        raise unknown("text domain", domain, list(DOMAINS))
    if split not in SPLITS:
        raise unknown("split", split, list(SPLITS))
    found: list[Document] = []
    room = limit
    for name, text in _DOMAINS[domain](split):
        text = clean(text)
        if len(text) < SHORTEST:
            continue
        if len(text) > room:
            break
        found.append(Document(domain, name, text))
        room -= len(text)
    if not found:
        raise UserError(
            f"Domain '{domain}' has no {split} document within {limit} characters on this Python."
        )
    return tuple(found)


def words(
    split: str, shortest: int = 3, longest: int = 8, count: int = 2000, limit: int = LIMIT
) -> tuple[str, ...]:
    """The most frequent words (a to z) in docstrings and topics, in alphabetical order."""
    counts: dict[str, int] = {}
    for domain in ("docstrings", "topics"):
        for document in documents(domain, split, limit):
            for word in re.findall(r"\b[a-z]+\b", document.text):
                if shortest <= len(word) <= longest:
                    counts[word] = counts.get(word, 0) + 1
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(sorted(islice(ordered, count)))
