"""Text that every machine has, in domains that differ: a corpus without a download.

| domain | one document |
|---|---|
| code | statements of one file of the standard library: no docstrings, no lines of comment |
| docstrings | the docstrings of one file |
| comments | its comments of two lines and more |
| trees | its syntax tree, as `ast.dump` writes it |
| topics | one topic of the language reference (`pydoc_data.topics`) |
| names | 256 code points and their Unicode names |

Domains, their order and the form of documents are the same on Python 3.11 to 3.13; the contents
follow the Python in use, so figures of different versions are not comparable.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple
from zlib import crc32

from moezoo.data.text import stdlib
from moezoo.errors import UserError, unknown

SPLITS = ("train", "test")
TEST = 5  # one document in so many
LONGEST = 20_000  # characters of a document, cut at the end of a line
SHORTEST = 200
LIMIT = 400_000  # characters of a domain's split


class Document(NamedTuple):
    """One text; `name` is its file, topic or range of code points."""

    domain: str
    name: str
    text: str


def split_of(name: str) -> str:
    """The split of everything that comes from the file (topic, range) of this name."""
    return "test" if crc32(f"split {name}".encode()) % TEST == 0 else "train"


def _scattered(names: list[str]) -> list[str]:
    """The names in an order by hash, so that the first ones are a sample."""
    return sorted(names, key=lambda name: (crc32(name.encode()), name))


def _of_files(read: Callable[[str], str], split: str) -> Iterator[tuple[str, str]]:
    for name in _scattered([n for n in stdlib.files() if split_of(n) == split]):
        yield name, read(name)


def _topics(split: str) -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python comes without pydoc_data.topics, the domain 'topics'."
        ) from None
    for name in _scattered([n for n in topics if split_of(f"topic {n}") == split]):
        yield name, topics[name]


def _names(split: str) -> Iterator[tuple[str, str]]:
    blocks = {f"{start:05X}": start for start in range(0, 0x20000, 256)}
    for block in _scattered([b for b in blocks if split_of(f"names {b}") == split]):
        codes = range(blocks[block], blocks[block] + 256)
        named = [(code, unicodedata.name(chr(code), "")) for code in codes]
        # These two scripts have 50,000 names that say nothing but the number.
        yield (
            block,
            "\n".join(
                f"{code:04X} {name}"
                for code, name in named
                if name and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE"))
            ),
        )


_DOMAINS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "code": partial(_of_files, lambda name: stdlib.parts(name).code),
    "comments": partial(_of_files, lambda name: stdlib.parts(name).comments),
    "docstrings": partial(_of_files, lambda name: stdlib.parts(name).docstrings),
    "names": _names,
    "topics": _topics,
    "trees": partial(_of_files, lambda name: stdlib.tree(name, LONGEST)),
}
DOMAINS = tuple(_DOMAINS)

_UNPRINTABLE = re.compile(r"[^\n\x20-\x7e\u00a0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd]")


def clean(text: str) -> str:
    """Tabs as spaces, no control characters, no blank edges, at most `LONGEST` characters."""
    text = _UNPRINTABLE.sub("", text.replace("\r\n", "\n").expandtabs(4)).strip("\n").rstrip()
    if len(text) <= LONGEST:
        return text
    return text[: text.rfind("\n", 0, LONGEST) if "\n" in text[:LONGEST] else LONGEST].rstrip()


@lru_cache
def documents(domain: str, split: str, limit: int = LIMIT) -> tuple[Document, ...]:
    """A domain's documents in a fixed order, as many as fit in `limit` characters.

    A file's split is decided by its name, the same in all domains. Raises UserError for unknown
    names, and where this Python lacks the texts.
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
    """The most frequent words of a to z in docstrings and topics, in alphabetical order."""
    counts: dict[str, int] = {}
    for domain in ("docstrings", "topics"):
        for document in documents(domain, split, limit):
            for word in re.findall(r"\b[a-z]+\b", document.text):
                if shortest <= len(word) <= longest:
                    counts[word] = counts.get(word, 0) + 1
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(sorted(islice(ordered, count)))
