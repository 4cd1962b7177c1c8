"""The one task on text: the next token, whatever the rows are about."""

from __future__ import annotations

from typing import Any

from moezoo.tasks import language
from moezoo.tasks.registry import TaskFacts, TaskKind, TaskTable

LM = "lm"


def settings(given: TaskFacts) -> dict[str, Any]:
    """The tokenizer's vocabulary and the names that rows are numbered by."""
    # Continuous text has no answers to match.
    headline = "loss" if given.data == "corpus" else "exact_match"
    return {"vocabulary": given.count, "tasks": given.names, "headline": headline}


TASKS = TaskTable({LM: TaskKind(language.task, settings)})
