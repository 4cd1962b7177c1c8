"""What the captions of `rooms` say, taken apart: the kind of room, what is in it, the light."""

from __future__ import annotations

import re
from typing import NamedTuple

from moezoo.data.rooms.names import SCENES
from moezoo.errors import UserError

LIGHTS = ("in daylight", "in lamplight")
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
        raise UserError(f"{caption!r} is no caption of rooms: make the data set again.")
    return Said(scene, tuple(re.split(r", | and ", found["things"])), found["light"])


def without_scene(caption: str) -> str:
    """The caption that says "room" for every kind of room, so that things must tell the kind."""
    return re.sub(r"^An? .+? with", "A room with", caption)


def phrase(said: Said, count: int) -> str:
    """The `count` largest things alone: "two plants and a sofa"."""
    return " and ".join(said.things[:count])


def fits(said: Said, things: tuple[str, ...]) -> bool:
    """Whether a scene has all the things, in these numbers."""
    return set(things) <= set(said.things)
