"""What the table of systems shows of one: title, paper, kind, parity, what was trained."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """A system in a row of a table. Its domain is what its configuration `reads`.

    title: its name, and the names of what else the same file builds.
    paper: authors, venue and year, arXiv number; "" for a baseline that is nobody's.
    kind: in one phrase, what the experts are and who chooses among them.
    parity: what its numbers are compared with: the published code, or why there is none.
    fixtures: folders of reference numbers that its parity tests read; a reconstruction has none.
    trained: the configurations whose training was measured, by name.
    headline: one measured result in one phrase. It stands here and nowhere else: the system's
      README shows the whole table of which it is a line.
    """

    title: str
    paper: str
    kind: str
    parity: str
    fixtures: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    headline: str = "not measured"
