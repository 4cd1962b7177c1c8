"""Examples of instruction tuning: turns of a conversation, and the task they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one of `ROLES` says."""

    role: str
    content: str


@dataclass(frozen=True)
class Instruction:
    """An instruction, the input it is about (may be empty), and its answer."""

    instruction: str
    input: str
    output: str
    task: str

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One question, instruction and input on lines of their own, and one answer."""
        lines = [text for text in (self.instruction, self.input) if text]
        return Turn("user", "\n".join(lines)), Turn("assistant", self.output)


@dataclass(frozen=True)
class Chat:
    """A conversation whose last turn is the assistant's."""

    turns: tuple[Turn, ...]
    task: str


class Example(Protocol):
    """What templates read: `Instruction` or `Chat`."""

    @property
    def turns(self) -> tuple[Turn, ...]: ...

    @property
    def task(self) -> str: ...


class Examples(Protocol):
    """Random access to examples; `tasks` are the names in the order that numbers them."""

    @property
    def tasks(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...
