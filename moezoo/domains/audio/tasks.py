"""The tasks on clips: what is asked about a clip, each a class for the whole clip."""

from __future__ import annotations

from functools import partial

from moezoo.tasks import classification
from moezoo.tasks.registry import TaskKind, TaskTable

# The event in it, its register and room; spoken words and intents.
NAMES = ("event", "register", "room", "word", "intent", "action", "object", "location")
TASKS = TaskTable(
    {
        name: TaskKind(partial(classification.whole, name, example="clip"), classification.settings)
        for name in NAMES
    }
)
