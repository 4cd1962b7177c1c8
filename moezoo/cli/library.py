"""Collect trained LoRAs in a library that prompts are routed over, and search documents with it.

Example: moezoo library build runs/lora_sort runs/lora_double --base runs/skills_tiny --out library
Example: moezoo library list library
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from moezoo.command import Positional, parse
from moezoo.errors import UserError, unknown


@dataclass(frozen=True)
class LibraryBuildCommand:
    """Collect trained LoRAs of one base: runs on text, and folders of Hugging Face PEFT.

    Each keeps its tasks, a prototype of every layer (Arrow) and the mean embedding of its prompts.
    Bases, targets, ranks and scales must be the same.

    Example: moezoo library build runs/lora_sort runs/lora_double --out library
    """

    adapters: Annotated[tuple[Path, ...], Positional]
    """Folders of runs, or of PEFT adapters."""
    out: Path
    """Folder to write; it must not exist."""
    base: Path | None = None
    """Folder of the base, a run or a Hugging Face decoder; default: the first run's."""
    clusters: int = 0
    """Groups of alike adapters to tell apart by their parameters (model-based clustering)."""
    tasks: tuple[str, ...] = ()
    """What PEFT folders were trained on; runs know it."""
    examples: Path | None = None
    """Text file with a prompt a line, like what PEFT folders were trained on; runs know it."""
    gradients: bool = False
    """Keep what gradients of each adapter's prompts look like, for route elrea."""


@dataclass(frozen=True)
class LibraryAddCommand:
    """Put further adapters into a library. Groups of alike ones are found anew.

    Example: moezoo library add library runs/lora_swap_halves --base runs/skills_tiny
    """

    library: Annotated[Path, Positional]
    """Folder of the library."""
    adapters: Annotated[tuple[Path, ...], Positional]
    """Folders of runs, or of PEFT adapters."""
    base: Path | None = None
    """Folder of the base; default: what the first run trained on."""
    tasks: tuple[str, ...] = ()
    """What PEFT folders were trained on; runs know it."""
    examples: Path | None = None
    """Text file with a prompt a line, like what PEFT folders were trained on; runs know it."""
    gradients: bool = False
    """Keep what gradients of each adapter's prompts look like, for route elrea."""


@dataclass(frozen=True)
class LibraryRemoveCommand:
    """Take members out of a library. Groups of alike ones are found anew.

    Example: moezoo library remove library lora_sort
    """

    library: Annotated[Path, Positional]
    """Folder of the library."""
    members: Annotated[tuple[str, ...], Positional]
    """Names of members."""


@dataclass(frozen=True)
class LibraryListCommand:
    """List a library's members, what they hold, and which routes it can answer by.

    Example: moezoo library list library
    """

    library: Annotated[Path, Positional]
    """Folder of the library."""


@dataclass(frozen=True)
class LibrarySplitCommand:
    """Split examples into groups whose prompts have alike gradients (ELREA), a file for each.

    Train an adapter on each file, and build a library of these with --gradients.

    Example: moezoo library split runs/skills_tiny all.jsonl --clusters 4 --out parts
    """

    base: Annotated[Path, Positional]
    """Folder of the base, a run or a Hugging Face decoder."""
    examples: Annotated[Path, Positional]
    """JSON lines of examples (`--data.name jsonl`)."""
    out: Path
    """Folder to write; it must not exist."""
    clusters: int = 4
    """Groups, 2 or more."""
    rank: int = 8
    """Rank of the fresh adapter whose gradients are taken."""
    seed: int = 0
    """Seed of k-means."""


@dataclass(frozen=True)
class LibraryRetrieveCommand:
    """Find documents, with the adapter that suits each query (RouterRetriever).

    Example queries say which adapter is the best for queries like them.

    Example: moezoo library retrieve library base "wing" --documents all.txt --examples a.jsonl
    """

    library: Annotated[Path, Positional]
    """Folder of the library."""
    base: Annotated[Path, Positional]
    """Folder of its base, a run or a Hugging Face decoder."""
    queries: Annotated[tuple[str, ...], Positional]
    """What to look for."""
    documents: Path
    """Text file with a document a line; empty lines do not count."""
    examples: tuple[Path, ...]
    """Data sets of JSON lines {"query": "...", "relevant": [0, 7]}, numbers of documents."""
    pilots: Literal["mean", "max"] = "mean"
    """By which of an adapter's pilots it is compared with a query: all, as in the paper, or the
    most similar one, as in its code."""
    count: int = 3
    """Documents to print for a query."""


@dataclass(frozen=True)
class LibraryContrastCommand:
    """Train an adapter that reads queries: it brings them near the documents that answer them.

    The adapter of one domain, for `moezoo library build` and `retrieve` (RouterRetriever).

    Example: moezoo library contrast base physics.jsonl --documents all.txt --out physics
    """

    base: Annotated[Path, Positional]
    """Folder of the base, a run or a Hugging Face decoder; it reads the documents."""
    examples: Annotated[Path, Positional]
    """JSON lines {"query": "...", "relevant": [0, 7]} to learn from, numbers of documents."""
    documents: Path
    """Text file with a document a line; empty lines do not count."""
    out: Path
    """Folder for the adapter, as PEFT reads it; it must not exist."""
    held: Path | None = None
    """Further examples, by which the adapter is scored; default: those it learned from."""
    rank: int = 8
    """Rank of the adapter."""
    alpha: float = 32.0
    """Its scale times the rank."""
    steps: int = 200
    """Training steps."""
    batch: int = 32
    """Queries of a step; the others' documents are the negatives of each."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    temperature: float = 0.05
    """What cosines are divided by."""
    seed: int = 0
    """Seed of the adapter and of the order of examples."""


def _contrast(words: list[str], prog: str) -> None:
    given = parse(LibraryContrastCommand, words, prog)
    from moezoo.domains.text.contrastive import ContrastiveOptions, check, trained
    from moezoo.domains.text.library import open_base, text_lines
    from moezoo.domains.text.retriever import embedded_by, mean_gain, read_queries
    from moezoo.weights import peft
    from moezoo.weights.files import check_new

    check_new(given.out)
    fields = ("rank", "alpha", "steps", "batch", "lr", "temperature", "seed")
    options = ContrastiveOptions(**{name: getattr(given, name) for name in fields})
    documents = text_lines(given.documents, "document")
    queries = read_queries(given.examples, len(documents))
    check(queries, options)
    judged = queries if given.held is None else read_queries(given.held, len(documents))
    base = open_base(given.base)
    index_ND = embedded_by(base, documents)
    before = mean_gain(base, judged, index_ND)
    model = trained(base, queries, index_ND, options)
    after = mean_gain(base._replace(model=model), judged, index_ND)
    peft.save(given.out, model, base.name)
    what = "the examples" if given.held is None else f"those of {given.held.name}"
    print(f"Wrote {given.out}: nDCG@10 on {what} {before:.3f} before, {after:.3f} after.")


def _build(words: list[str], prog: str) -> None:
    given = parse(LibraryBuildCommand, words, prog)
    from moezoo.domains.text.library import base_of, check_names, members_of
    from moezoo.weights.files import check_new
    from moezoo.weights.library import create

    check_new(given.out)
    check_names(given.adapters)
    if not 0 <= given.clusters <= len(given.adapters):
        raise UserError(
            f"--clusters is {given.clusters}: name at most as many groups as there are adapters, "
            f"{len(given.adapters)}, or 0 for none."
        )
    base = base_of(given.adapters, given.base)
    members = members_of(given.adapters, base, given.tasks, given.examples, given.gradients)
    library = create(given.out, base.told, members, given.clusters)
    print(f"Wrote {_count(library)} of {library.base.name} to {given.out}:")
    for member in library.members.values():
        print(f"  {member.name}: {', '.join(member.tasks) or 'no task named'}")
    usual = "arrow" if len(library.members) > 1 else f"task:{library.names[0]}"
    # A run stands for the base below its adapter.
    base_folder = given.base or given.adapters[0]
    print(f"Ask it: moezoo generate {base_folder} PROMPT --library {given.out} --route {usual}")


def _add(words: list[str], prog: str) -> None:
    given = parse(LibraryAddCommand, words, prog)
    from moezoo.domains.text.library import (
        base_of,
        check_library_base,
        check_names,
        members_of,
    )
    from moezoo.weights.library import Library, add

    library = Library(given.library)
    check_names(given.adapters, library)
    base = base_of(given.adapters, given.base, library.base.template)
    check_library_base(library, base)
    members = members_of(given.adapters, base, given.tasks, given.examples, given.gradients)
    print(f"{given.library} has {_count(add(library, members))} now.")


def _remove(words: list[str], prog: str) -> None:
    given = parse(LibraryRemoveCommand, words, prog)
    from moezoo.weights.library import Library, remove

    print(f"{given.library} has {_count(remove(Library(given.library), given.members))} now.")


def _list(words: list[str], prog: str) -> None:
    given = parse(LibraryListCommand, words, prog)
    from moezoo.weights.library import Library

    library = Library(given.library)
    form = next(iter(library.layers.values()))
    asked = f", template {library.base.template}" if library.base.template else ""
    print(
        f"{_count(library)} of {library.base.name}, on {len(library.layers)} linear layers, rank "
        f"{form.rank}, scale {form.scale:g}{asked}"
    )
    rows = [("member", "tasks", "holds", "group" if library.clusters else "")]
    rows += [_row(member) for member in library.members.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    if library.clusters:
        print("Groups are of alike adapters; every change of the library numbers them anew.")
    _print_routes(library)


def _print_routes(library: Any) -> None:
    """Which routes can be asked, and why others cannot."""
    from moezoo.domains.text.library_routes import ROUTES

    why: dict[str, list[str]] = {}
    able = ["task:NAME"]
    for name, kind in ROUTES.items():
        without = kind.lacking(library)
        if len(library.names) < 2:
            why.setdefault("there is a single member", []).append(name)
        elif without is not None:
            why.setdefault(f"{without} has no {kind.part}", []).append(name)
        else:
            able.append(name)
    print(f"Routes (moezoo generate {library.base.name} PROMPT --library ...): {', '.join(able)}")
    for what, names in why.items():
        print(f"Not {', '.join(names)}: {what}")


def _row(member: Any) -> tuple[str, ...]:
    """What the list says of a member."""
    told = [part for part in member.parts if part != "group"]  # which has a column
    group = "" if member.cluster is None else str(member.cluster)
    return member.name, ", ".join(member.tasks) or "no task named", ", ".join(told) or "-", group


def _split(words: list[str], prog: str) -> None:
    given = parse(LibrarySplitCommand, words, prog)
    from moezoo.domains.text.example_groups import split_examples
    from moezoo.domains.text.library import open_base

    if not 0 <= given.seed < 2**63:
        raise UserError(f"--seed is {given.seed}; it must lie between 0 and 2^63 - 1.")
    wanted = (given.clusters, given.rank, given.out, given.seed)
    sizes = split_examples(open_base(given.base), given.examples, *wanted)
    said = ", ".join(f"cluster_{i}.jsonl {size}" for i, size in enumerate(sizes))
    print(f"Wrote {sum(sizes)} examples to {given.out}: {said}.")


def _retrieve(words: list[str], prog: str) -> None:
    given = parse(LibraryRetrieveCommand, words, prog)
    from moezoo.domains.text.library import asked_with, open_base, text_lines
    from moezoo.domains.text.retriever import GATHER, Retriever, read_queries, retrieved
    from moezoo.weights.library import Library

    if given.count < 1:
        raise UserError(f"--count is {given.count}; it must be at least 1.")
    same = [file for i, file in enumerate(given.examples) if file in given.examples[:i]]
    if same:
        raise UserError(f"--examples names {same[0]} twice: each file is a data set of its own.")
    documents = text_lines(given.documents, "document")
    sets = {file: read_queries(file, len(documents)) for file in given.examples}
    library = Library(given.library)
    base = asked_with(open_base(given.base), library.base.template)
    retriever = Retriever(base, library)
    how = (GATHER[given.pilots], given.count)
    found = retrieved(retriever, given.queries, documents, sets, *how)
    for query, (reader, numbers) in zip(given.queries, found, strict=True):
        print(f"{query!r}, read by {reader or 'the base'}:")
        for number in numbers:
            print(f"  {number}  {documents[number]}")


def _count(library: object) -> str:
    count = len(library.members)  # type: ignore[attr-defined]
    return f"{count} adapter{'' if count == 1 else 's'}"


ARGUMENTS = {
    "build": LibraryBuildCommand,
    "add": LibraryAddCommand,
    "remove": LibraryRemoveCommand,
    "list": LibraryListCommand,
    "split": LibrarySplitCommand,
    "retrieve": LibraryRetrieveCommand,
    "contrast": LibraryContrastCommand,
}
ACTIONS = {"build": _build, "add": _add, "remove": _remove, "list": _list, "split": _split}
ACTIONS |= {"retrieve": _retrieve, "contrast": _contrast}


def main(words: list[str], prog: str) -> None:
    """What the first word says, with the words behind it."""
    if not words or words[0] in ("-h", "--help"):
        lines = ((name, (kind.__doc__ or "").splitlines()[0]) for name, kind in ARGUMENTS.items())
        actions = "\n".join(f"  {name.ljust(10)}{line}" for name, line in lines)
        print(
            f"usage: {prog} {{{'|'.join(ACTIONS)}}} ...\n\n{(__doc__ or '').strip()}\n\n{actions}"
            f"\n\n{prog} ACTION --help says more of one."
        )
        if not words:
            raise UserError(f"Say what to do with a library: one of {', '.join(ACTIONS)}.")
        return
    if words[0] not in ACTIONS:
        raise unknown("action on a library", words[0], list(ACTIONS))
    ACTIONS[words[0]](words[1:], f"{prog} {words[0]}")
