"""Runs on text: the `data` section, opening its sources, and everything the trainer asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from moezoo import fields
from moezoo.data.source import Batch, First
from moezoo.domains.text.data import corpus, instruct
from moezoo.domains.text.data.encode import answers_only, encode_all, ends, everything
from moezoo.domains.text.data.example import TextExamples as Instructions
from moezoo.domains.text.data.example import chatml, plain
from moezoo.domains.text.data.jsonl import InstructionFile
from moezoo.domains.text.data.packing import Packed
from moezoo.domains.text.data.rows import (
    Padded,
    TextSource,
    TextTraining,
    blank,
    stack,
    text_evaluation,
)
from moezoo.domains.text.data.stream import Continuous
from moezoo.domains.text.data.tokenizer import ByteTokenizer, Tokenizer, tokenizer_at
from moezoo.domains.text.tasks import LM, TASKS
from moezoo.errors import UserError, unknown
from moezoo.fields import ExampleCount, FilePath, Range, Seed
from moezoo.tasks.base import Task
from moezoo.train.domain import Classes, Domain, Pretrained
from moezoo.train.schema import Config

TEMPLATES = {"plain": plain, "chatml": chatml}
TRAINED = {"answers": answers_only, "everything": everything}
SHORTEST = 8


@dataclass(frozen=True)
class TextDataConfig:
    """Which text to use, how it is cut into rows, and which part of it is learned."""

    name: Literal["instructions", "corpus", "jsonl"] = "instructions"
    """instructions: generated tasks with exact answers; corpus: text that every Python installation
    has, in several domains, as continuous text; jsonl: files of instructions or chats."""
    length: Annotated[int, Range(SHORTEST, 2**20)] = 64
    """Tokens per row."""
    train: ExampleCount = 20_000
    """Number of generated training examples."""
    test: ExampleCount = 1_300
    """Number of generated test examples."""
    seed: Seed = 0
    """Seed for generated examples and for packing."""
    only: tuple[str, ...] = ()
    """instructions: tasks to generate; corpus: domains to read; default: all."""
    train_file: FilePath | None = None
    """jsonl: the file of training examples."""
    test_file: FilePath | None = None
    """jsonl: the file of test examples."""
    tokenizer: FilePath | None = None
    """Folder of a Hugging Face tokenizer; without one, tokens are bytes."""
    template: Literal["plain", "chatml"] = "plain"
    """How instructions and chats become text; chatml needs a tokenizer that has its marks."""
    arrangement: Literal["packed", "padded"] = "packed"
    """Several examples per row, or one."""
    trained: Literal["answers", "everything"] = "answers"
    """Which tokens the loss covers."""

    @property
    def domain(self) -> Text:
        """The domain that runs on text use."""
        return Text(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The kinds of text."""
        return ("instructions", "corpus", "jsonl")


def check(config: TextDataConfig) -> None:
    """Raise UserError if a field has no meaning."""
    fields.check(config, "data")
    files = (config.train_file, config.test_file)
    if config.name == "jsonl" and None in files:
        raise UserError("data.name is jsonl, so data.train_file and data.test_file are needed.")
    if config.name != "jsonl" and any(files):
        raise UserError(f"data.train_file needs data.name jsonl; it is {config.name}.")
    if config.name == "jsonl" and config.only:
        raise UserError(
            "data.only names generated tasks or domains of the corpus; data.name is jsonl, so "
            "leave it empty (--data.only without names)."
        )
    _check_form(config)
    known = {"instructions": tuple(instruct.KNOWN), "corpus": corpus.DOMAINS}.get(config.name, ())
    for name in config.only:
        if name not in known:
            raise unknown(f"entry of data.only for {config.name}", name, list(known))


def _check_form(config: TextDataConfig) -> None:
    """Raise UserError for a template or an arrangement that would not apply to the rows."""
    for field, usual in (("template", "plain"), ("arrangement", "packed")):
        if config.name == "corpus" and getattr(config, field) != usual:
            raise UserError(
                f"data.{field} is {getattr(config, field)}, but data.name is corpus, which is one "
                f"continuous text: leave it at {usual}."
            )
    if not config.tokenizer:  # a folder's tokenizer is read where the data are
        ends(TEMPLATES[config.template], ByteTokenizer())


def tokenizer_of(config: TextDataConfig) -> Tokenizer:
    """The configured tokenizer; UserError if it cannot be read."""
    return tokenizer_at(config.tokenizer)


def open_text(config: TextDataConfig, split: str) -> TextSource:
    """The `train` or `test` split as rows.

    Raises UserError for files that cannot be read, and if no example fits in a row.
    """
    check(config)
    if split not in ("train", "test"):
        raise unknown("split", split, ["train", "test"])
    tokenizer = tokenizer_of(config)
    if config.name == "corpus":
        # Domains in turn, so that the first rows are a sample of all.
        by_domain = (corpus.documents(name, split) for name in _domains(config))
        texts = [d for turn in zip_longest(*by_domain) for d in turn if d is not None]
        return Continuous(texts, tokenizer, config.length, config.name, split)
    ends(TEMPLATES[config.template], tokenizer)  # before files of data are read
    examples = _EXAMPLES[config.name](config, split)
    documents = encode_all(examples, tokenizer, config.length, TEMPLATES[config.template])
    trained = TRAINED[config.trained]
    if config.arrangement == "padded":
        return Padded(documents, config.length, config.name, split, trained)
    return Packed(documents, config.length, config.seed, config.name, split, trained)


def open_rows(config: TextDataConfig, split: str) -> Padded:
    """The split with one example in each row, whatever the arrangement in training.

    Raises UserError as `open_text`, and for continuous text, which has no examples.
    """
    if config.name == "corpus":
        raise UserError("data.name is corpus, continuous text without examples of a task.")
    source = open_text(replace(config, arrangement="padded"), split)
    assert isinstance(source, Padded)
    return source


def tasks_of(config: TextDataConfig) -> tuple[str, ...]:
    """The names that a token's task number refers to; reads the files of a jsonl data set."""
    if config.name == "corpus":
        return _domains(config)
    return tuple(_EXAMPLES[config.name](config, "train").tasks)


def task_number(task: str, config: TextDataConfig) -> int:
    """The task's number in tables; UserError with the nearest names for one that is not known."""
    known = tasks_of(config)
    if task not in known:
        raise unknown("task of this run's data", task, list(known))
    return known.index(task)


def _domains(config: TextDataConfig) -> tuple[str, ...]:
    return tuple(name for name in corpus.DOMAINS if not config.only or name in config.only)


def _generated(config: TextDataConfig, split: str) -> Instructions:
    count = config.train if split == "train" else config.test
    return instruct.Instructions(count, config.seed, split, config.only or instruct.TASKS)


def _files(config: TextDataConfig, split: str) -> Instructions:
    check(config)  # files that are not named are told as such
    train = InstructionFile(Path(str(config.train_file)))
    if split == "train":
        return train
    return InstructionFile(Path(str(config.test_file)), tasks=train.tasks)


_EXAMPLES: dict[str, Callable[[TextDataConfig, str], Instructions]] = {
    "instructions": _generated,
    "jsonl": _files,
}


class Text(Domain[TextDataConfig]):
    """Rows of tokens; all arrays of a row are the label of the one task, "lm"."""

    name, unit = "text", "rows"
    tasks = TASKS
    pictures = MappingProxyType(
        {"samples.md": "answers beside truth", "scores.png": "scores by task"}
    )

    @property
    def pretrained(self) -> Pretrained:
        """Hugging Face decoders."""
        from moezoo.domains.text.pretrained import Decoders

        return Decoders(self.data)

    def check(self, config: Config) -> None:
        """Raise UserError if a field has no meaning."""
        check(self.data)

    def open(self, config: Config, split: str) -> TextSource:
        """The `train` or `test` split as rows."""
        return open_text(self.data, split)

    def classes(self, config: Config, source: TextSource) -> Classes:
        """The vocabulary, and the names that rows are numbered by."""
        info = source.info
        return Classes({LM: info.vocabulary}, {LM: info.tasks}, info.tasks)

    def size(self, config: Config) -> tuple[int, int]:
        """One row of the configured number of tokens."""
        return 1, self.data.length

    def example(self, config: Config) -> tuple[Batch, Classes]:
        """One row of padding."""
        tokenizer, tasks = tokenizer_of(self.data), tasks_of(self.data)
        row = stack([blank(self.data.length, tokenizer.pad)])
        return {LM: row}, Classes({LM: tokenizer.vocabulary}, {LM: tasks}, tasks)

    def training(
        self,
        config: Config,
        source: TextSource,
        tasks: Sequence[str],
        start: int,
        rows: Sequence[int],
    ) -> Iterator[tuple[int, Batch]]:
        """(step, this process's rows of the batch)."""
        made = TextTraining(source, config.train.batch, config.seed)
        return ((s, {LM: b}) for s, b in made.batches(start, config.train.steps, rows))

    def evaluation(
        self, source: Any, count: int, size: int, names: Sequence[str], rows: Sequence[int]
    ) -> Iterator[Batch]:
        """The first `count` rows once."""
        for batch in text_evaluation(First(source, count), size, rows):  # type: ignore[arg-type]
            valid = batch.pop("valid")
            yield {LM: batch, "valid": valid}

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for the rows."""
        return model.read(batch[LM], **options)

    def describe(self, config: Config) -> str:
        """The rows' length."""
        return f"of {self.data.length} tokens"

    def amount(self, source: Any, split: str) -> str:
        """Rows, and the examples in them where a row may hold several."""
        count, rows = source.examples, super().amount(source, split)
        return rows if count in (None, len(source)) else f"{rows} ({count} examples)"

    def narrowed(self, groups: Sequence[str]) -> str:
        """`--data.only`; files have to be made anew."""
        if self.data.name == "jsonl":
            return f"take files with rows of {', '.join(groups)} only"
        return f"restrict the data with --data.only {' '.join(groups)}"

    def told_data(self, config: Config) -> str:
        """Their kind, and the tasks or the file that they are restricted to."""
        of = self.data.train_file or ", ".join(self.data.only)
        return f"{self.data.name}: {of}" if of else self.data.name

    def questions(self, config: Config) -> tuple[str, ...]:
        """A test question of each generated task; of files and of running text none."""
        if self.data.name != "instructions":
            return ()
        names = self.data.only or instruct.TASKS
        examples = instruct.Instructions(len(names), self.data.seed, "test", names)
        return tuple(examples[i].turns[0].content for i in range(len(names)))

    def check_labels(self, tasks: Sequence[Task], source: Any) -> None:
        """Nothing to check: rows contain everything needed."""

    def groups(self, config: Config) -> int | None:
        """None: unknown before the data are there, because their files may name the groups."""
        return None

    def inference(self, run: Any, classes: Classes) -> Any:
        """Prompts in, answers out."""
        from moezoo.domains.text.inference import (
            TextInference,
            asks_for_task,
        )  # other commands do without

        speech = tokenizer_of(self.data), TEMPLATES[self.data.template]
        # Names of a file's tasks need the file, which may be gone: only where they decide.
        names = tasks_of(self.data) if asks_for_task(run.model) else ()
        return TextInference(run, *speech, names)

    def exports(self, config: Config) -> Any:
        """Always raises UserError, which names the tool to use instead."""
        raise UserError(
            f"{config.name} is a run on text, which has no single task to export: "
            "moezoo adapter writes what it has learned, or with --merge the whole decoder, and "
            "moezoo prune a decoder with fewer experts for one task."
        )

    def draw(self, finished: Any, folder: Path, count: int) -> None:
        """Samples of answers, usage of experts and scores by task."""
        from moezoo.domains.text import report  # matplotlib costs a third of a second

        report.draw(finished, folder, count)
