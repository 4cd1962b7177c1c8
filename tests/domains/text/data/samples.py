"""Examples and documents that several tests encode and arrange."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.domains.text.adapter import tokenizer_files
from moezoo.domains.text.data.encode import EncodedDocument, Encodings
from moezoo.domains.text.data.example import Instruction
from moezoo.domains.text.data.tokenizer import HFTokenizer
from moezoo.domains.text.domain import TextDataConfig


class Listed:
    """Examples in a list."""

    def __init__(self, examples: Sequence[Instruction]):
        self.examples = list(examples)
        self.tasks = tuple(sorted({example.task for example in examples}))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Instruction:
        return self.examples[index]


def documents_of(sizes: Sequence[int], tasks: int = 3) -> Encodings:
    """Documents that take these places; every token of all of them is another number."""
    lengths = np.array(sizes, np.int64) + 1
    total = int(lengths.sum())
    starts = np.r_[0, np.cumsum(lengths)]
    rng = np.random.default_rng(0)
    answer = rng.random(total) < 0.5
    answer[starts[1:] - 1] = True
    return Encodings(
        np.arange(1000, 1000 + total, dtype=np.int32),
        answer,
        starts,
        np.zeros(len(sizes), np.int32),
        rng.integers(0, tasks, len(sizes)).astype(np.int32),
        tuple(f"task{j}" for j in range(tasks)),
        total + 1000,
        7,
        int(lengths.max()),
    )


def slow_row(
    documents: Sequence[tuple[EncodedDocument, int]], length: int, pad: int, only_answers: bool
) -> dict[str, list[int]]:
    """The arrays of a row, a token at a time."""
    row: dict[str, list[int]] = {
        name: [] for name in ("tokens", "targets", "segments", "positions", "task")
    }
    for number, (document, task) in enumerate(documents):
        for place in range(len(document.tokens) - 1):
            after = place + 1
            learned = document.answer[after] if only_answers else after != document.joint
            row["tokens"].append(int(document.tokens[place]))
            row["targets"].append(int(document.tokens[after]) if learned else -1)
            row["segments"].append(number + 1)
            row["positions"].append(place)
            row["task"].append(task)
    empty = {"tokens": pad, "targets": -1, "segments": 0, "positions": 0, "task": 0}
    return {name: row[name] + [empty[name]] * (length - len(row[name])) for name in row}


def chat_folder(
    folder: Path, words: Sequence[str] = ("<|im_start|>", "<|im_end|>"), **names: Any
) -> HFTokenizer:
    """A tokenizer of bytes, with further tokens from 259 on, in a folder; names: of its config."""
    files = tokenizer_files(TextDataConfig())
    made = json.loads(files["tokenizer.json"])
    plain = made["added_tokens"][0]
    made["added_tokens"] += [plain | {"id": 259 + i, "content": w} for i, w in enumerate(words)]
    config = json.loads(files["tokenizer_config.json"]) | names
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HFTokenizer(folder)
