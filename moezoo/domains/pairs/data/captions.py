"""The captions of `rooms`, taken apart: the kind of room, what is in it, the light."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from moezoo.domains.images.data.rooms.labels import NUMBERS, THINGS, counted
from moezoo.domains.images.data.rooms.names import NOUNS, SCENES
from moezoo.domains.pairs.data.words import Vocabulary, split
from moezoo.errors import UserError

LIGHTS = ("in daylight", "in lamplight")
# Everything that a caption may list: "a bed", "two beds", ...
LISTED = tuple(dict.fromkeys(counted(n, i + 1) for n in NOUNS for i in range(len(NUMBERS) + 1)))
ASKED = 2  # things in a phrase that asks for an image
_CAPTION = re.compile(r"^(?P<kind>An? .+?) with (?P<things>.+), (?P<light>in \w+)\.$")


class Said(NamedTuple):
    """scene: a name of `SCENES`. things: "two plants", "a sofa", ..., largest first. light."""

    scene: str
    things: tuple[str, ...]
    light: str


def read(caption: str) -> Said:
    """The parts of a caption that `rooms.labels.caption` wrote; UserError for another text."""
    found = _CAPTION.match(caption)
    scene = found["kind"].split(" ", 1)[1] if found else ""
    if found is None or scene not in SCENES or found["light"] not in LIGHTS:
        raise UserError(f"{caption!r} is not a caption of rooms: make the data set again.")
    return Said(scene, tuple(re.split(r", | and ", found["things"])), found["light"])


def without_scene(caption: str) -> str:
    """The caption with "room" for every kind of room, so that only things reveal the kind."""
    return re.sub(r"^An? .+? with", "A room with", caption)


@cache
def vocabulary() -> Vocabulary:
    """The words of all possible captions, so that no data set lacks one."""
    return Vocabulary.of([*LISTED, *SCENES, *LIGHTS, "a an room with and , ."])


def longest() -> int:
    """The number of words in the longest possible caption."""
    parts = [max(len(split(text)) for text in texts) for texts in (SCENES, LISTED, LIGHTS)]
    # An article, "with", THINGS - 1 signs or "and" between things, a comma, a full stop.
    return parts[0] + THINGS * parts[1] + parts[2] + THINGS - 1 + 4
