"""All tasks of all domains in one table, for tests that go over every one of them."""

from __future__ import annotations

from typing import Any

from moezoo.domains.audio.tasks import TASKS as AUDIO
from moezoo.domains.images.tasks import TASKS as IMAGES
from moezoo.domains.pairs.tasks import TASKS as PAIRS
from moezoo.domains.text.tasks import TASKS as TEXT
from moezoo.tasks import registry
from moezoo.tasks.base import Task

# "scene" is that of images; pairs have another under this name.
EVERY = {**PAIRS, **AUDIO, **TEXT, **IMAGES}


def build(name: str, **settings: Any) -> Task:
    """The task with this name and these settings."""
    return registry.build(name, EVERY, **settings)
