"""The manifest of a library of adapters, `library.json`: what is written in it, and what is not.

Whatever is not known here is refused by name, since the next change would write the file without
it. A manifest that could not be read again is not written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moezoo import regular
from moezoo.errors import UserError
from moezoo.json_text import json_text, plain
from moezoo.schema_check import (
    FormatFault,
    flag,
    line,
    list_of,
    map_of,
    maybe,
    number,
    refused,
    table,
    text,
    whole,
)
from moezoo.structured import read_object

MANIFEST = "library.json"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
AGAIN = "build the library again"
LARGEST = 64 * regular.MB  # room for as many members as there may be, some 200 bytes each
_NAMED = text(100, NAME.pattern)
_BASE = {"name": line(), "sha256": line(64)}
_ASKED = {"template": maybe(line(200)), "tokenizer": maybe(line(64))}  # later than format 1
_LAYER = {"inputs": whole(1, 2**24), "outputs": whole(1, 2**24), "rank": whole(1, 2**16)}
_LAYER |= {"scale": number(-1e6, 1e6)}
_MEMBER = {
    "name": _NAMED,
    "tasks": list_of(line(200), 0, 10_000),
    "source": line(),
    "cluster": maybe(whole(0, 100_000)),
    "embedding": whole(0, 2**24),
    "gated": flag,
    "gradient": whole(0, 2**24),
}
_NEEDED = tuple(name for name in _MEMBER if name != "gradient")  # later than format 1
FORM = table(
    {
        "format": whole(1, 1),
        "base": table(_BASE | _ASKED, required=tuple(_BASE), others=refused),
        "layers": map_of(table(_LAYER, required=tuple(_LAYER), others=refused), 1, 100_000),
        "members": list_of(table(_MEMBER, required=_NEEDED, others=refused), 1, 200_000),
    },
    required=("format", "base", "layers", "members"),
    others=refused,
)


class LayerForm(NamedTuple):
    """What every member's update of a layer has: W [inputs, outputs] gets scale * down up."""

    inputs: int
    outputs: int
    rank: int
    scale: float


class BaseModel(NamedTuple):
    """The decoder that members belong to: how it is called, and the hash of its arrays.

    template, tokenizer: how texts become its tokens, the template's name and what tells the
    tokenizer from others; None where it is not known.
    """

    name: str
    sha256: str
    template: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Member:
    """An adapter of a library.

    tasks: what it was trained on.   source: where it came from.   cluster: its group of alike
    members, None where there are no groups.   embedding: width of its mean embedding, 0 = none.
    gated: whether it has a trained gate.   gradient: width of its mean gradient, 0 = none.
    """

    name: str
    tasks: tuple[str, ...] = ()
    source: str = ""
    cluster: int | None = None
    embedding: int = 0
    gated: bool = False
    gradient: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """What it has besides its factors: of examples, gate, gradient and group."""
        held = {
            "examples": self.embedding > 0,
            "gate": self.gated,
            "gradient": self.gradient > 0,
            "group": self.cluster is not None,
        }
        return tuple(part for part, there in held.items() if there)


WIDTHS = {"embedding": "mean embedding", "gradient": "mean gradient"}


class LibraryManifest(NamedTuple):
    """A library's base, its layers by path, and its members in the order in which they came."""

    base: BaseModel
    layers: Mapping[str, LayerForm]
    members: tuple[Member, ...]


def read_manifest(path: Path) -> LibraryManifest:
    """The manifest in a file; UserError where there is none, or it is damaged."""
    told = {"absent": "name a library's folder", "again": AGAIN}
    found = read_object(path, FORM, **told, largest=LARGEST)
    members = tuple(Member(**(m | {"tasks": tuple(m["tasks"])})) for m in found["members"])
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{path} names a member twice; {AGAIN}.")
    fault = unlike_width(members)
    if fault is not None:
        raise UserError(f"{path}: {fault}; {AGAIN}.")
    layers = {name: LayerForm(**form) for name, form in found["layers"].items()}
    return LibraryManifest(BaseModel(**found["base"]), layers, members)


def unlike_width(members: Iterable[Member]) -> str | None:
    """Which member's embedding or gradient has another width than those before; None: all agree.

    Those of all members are compared with one of a prompt, so that one width is right.
    """
    first: dict[str, Member] = {}
    for member in members:
        for kind, words in WIDTHS.items():
            width = getattr(member, kind)
            if not width:
                continue
            other = first.setdefault(kind, member)
            if getattr(other, kind) != width:
                return (
                    f"{member.name} has a {words} of {width} numbers, but that of {other.name} has "
                    f"{getattr(other, kind)}"
                )
    return None


def manifest_text(manifest: LibraryManifest) -> str:
    """The content of the file; UserError for what could not be read again."""
    base = {n: v for n, v in manifest.base._asdict().items() if v is not None}
    found = {
        "format": 1,
        "base": base,
        "layers": {path: form._asdict() for path, form in manifest.layers.items()},
        "members": [vars(member) for member in manifest.members],
    }
    try:
        FORM(plain(found), "")
    except FormatFault as error:
        raise UserError(f"The library cannot be described: {error}.") from error
    content = json_text(found, 1)
    size = len(content.encode())
    if size > LARGEST:
        raise UserError(
            f"The library's {MANIFEST} would have {size / regular.MB:,.1f} MB, and at most "
            f"{LARGEST / regular.MB:,.1f} MB are read: name fewer tasks, or make two libraries."
        )
    return content
