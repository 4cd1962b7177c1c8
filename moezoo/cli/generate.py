"""Answer prompts with the model of a run on text, or with a Hugging Face folder.

Example: moezoo generate runs/smora_tiny $'stutter\nkasu'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from moezoo.command import WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError

if TYPE_CHECKING:
    from moezoo.backbones.generate import Settings
    from moezoo.domains.text.library_routes import LibraryRoute


@dataclass(frozen=True)
class GenerateCommand:
    """Answer prompts with the model of a run on text, or with a Hugging Face folder.

    Example: moezoo generate runs/smora_tiny $'stutter\\nkasu'
    """

    model: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint or a Hugging Face decoder with its tokenizer, or the name
    of a model with weights."""
    prompts: Annotated[tuple[str, ...], Positional] = ()
    """What to answer; default: every line of standard input (not beside --write-...), where a line
    in double quotes is a JSON string, so that it can hold more than one line."""
    new: int = 128
    """Maximum number of tokens in an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 samples, more randomly the higher it is."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this share; needs a temperature."""
    seed: int = 0
    """Seed for sampling."""
    task: str | None = None
    """Of a run whose tasks decide what is computed (Polytropon's): the task of the prompts."""
    template: str | None = None
    """plain or chatml; default: that of the run, also for a folder that was written from one, and
    for other folders the prompt as it is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of a folder's parameters and computation; a run keeps its own."""
    library: Path | None = None
    """Folder of adapters of this model (`moezoo library`), over which prompts are routed."""
    route: str | None = None
    """Who answers: arrow, mbc, phatgoose, uniform, task:NAME (a member, or the one of a task),
    oracle, nearest, mocle, tle or elrea."""
    combine: Literal["outputs", "factors", "downs"] | None = None
    """How adapters are mixed: what they give, their factors, or the first factors alone; default:
    what the route's paper has."""
    top_k: int | None = None
    """Adapters per token of the routes arrow, mbc (default 4) and phatgoose (2), at most those that
    there are."""
    tasks: tuple[str, ...] = ()
    """Route oracle: the task of every prompt."""
    write_peft: Path | None = None
    """Folder for what uniform or task:NAME answers with, as an adapter that PEFT reads."""
    write_merged: Path | None = None
    """Folder for the same added to the decoder's matrices, as a Hugging Face model."""
    certificate: Path | None = None
    """JSON file for what a plain decoder in the place of the route would answer differently."""


def prompt_of(line: str) -> str:
    """A line of standard input as a prompt."""
    bare = line.strip()
    if not (len(bare) > 1 and bare[0] == bare[-1] == '"'):
        return line
    try:
        return json.loads(bare)
    except ValueError as error:
        raise UserError(
            f"{line[:60]} is no JSON string, which a line in double quotes has to be: write a new "
            'line as \\n and a quote as \\", or leave the quotes around it out.'
        ) from error


def lines_of(content: bytes) -> tuple[str, ...]:
    """The prompts in what stands on standard input, a line each; empty lines are none."""
    from moezoo.text_lines import lines

    try:
        found = lines(content)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"Line {line} of standard input is no text in UTF-8: give it in that encoding."
        ) from error
    return tuple(map(prompt_of, filter(None, found)))


def main(words: list[str], prog: str) -> None:
    """Read the command line, answer the prompts, print the answers."""
    given = parse(GenerateCommand, words, prog)
    from moezoo.backbones.generate import Settings
    from moezoo.domains.text.generation import choice, open_speaker
    from moezoo.domains.text.inference import complete

    if not 0 <= given.seed < 2**63:
        raise UserError(f"--seed is {given.seed}; it must lie between 0 and 2^63 - 1.")
    settings = Settings(new=given.new, choose=choice(given.temperature, given.top_p))
    if given.library is None:
        _check_alone(given)
    prompts = _prompts(given)
    if given.library is not None:
        answers = _routed(given, prompts, settings)
    else:
        speaker = open_speaker(given.model, given.template, given.dtype, given.task)
        answers = complete(speaker, prompts, settings, given.seed)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(answer if len(prompts) == 1 else f"{prompt!r}: {answer}")


def _prompts(given: GenerateCommand) -> tuple[str, ...]:
    """Those that are named, or on standard input; () where something is only written."""
    if given.prompts or given.write_peft is not None or given.write_merged is not None:
        return given.prompts
    found = () if sys.stdin is None else lines_of(sys.stdin.buffer.read())
    if not found:
        raise UserError("There is no prompt: give one, or lines on standard input.")
    return found


def _say(line: str) -> None:
    """Beside the answers, which are all that stands on standard output."""
    print(line, file=sys.stderr)


def _routed(given: GenerateCommand, prompts: Sequence[str], settings: Settings) -> list[str]:
    """The answers by the library's adapters; writes what is asked for."""
    from moezoo.domains.text.library import open_base
    from moezoo.domains.text.library_routes import RouteOptions, check_route, check_tasks, route
    from moezoo.weights.library import Library

    _check_words(given, prompts)
    assert given.library is not None and given.route is not None
    options = RouteOptions(given.combine, given.top_k)
    library = Library(given.library)
    check_route(given.route, library, options)
    if prompts or given.tasks:
        check_tasks(given.route, library, len(prompts), given.tasks)
    base = open_base(given.model, given.template or library.base.template)
    if base.left_out:
        _say(
            f"{given.model} trained updates of {base.left_out} layers, which take no part: the "
            "library's adapters stand on the decoder below them."
        )
    chosen = route(given.route, base, library, options)
    _write(given, chosen, base.name, given.template or library.base.template)
    if given.certificate is not None:
        _certify(given, chosen, prompts, settings)
    if not prompts:
        return []
    answers = chosen.answered(prompts, settings, given.seed, given.tasks)
    for number, answer in enumerate(answers, 1):
        if answer.by:
            _say(f"Prompt {number} of {len(answers)} is answered by {answerers(answer.by)}.")
    return [answer.text for answer in answers]


def answerers(by: Sequence[tuple[str, float]], most: int = 3) -> str:
    """Members of a library with their weights, the first ones by name, as words."""
    if len(by) == 1:
        return by[0][0]
    named = ", ".join(f"{name} {weight:.2f}" for name, weight in by[:most])
    return named if len(by) <= most else f"{named} and {len(by) - most} more"


def _check_words(given: GenerateCommand, prompts: Sequence[str]) -> None:
    """Raise UserError for words that do not fit each other, before anything is opened."""
    from moezoo.domains.text.domain import TEMPLATES
    from moezoo.domains.text.library_routes import check_written
    from moezoo.errors import unknown
    from moezoo.files import check_file
    from moezoo.weights.files import check_new

    if given.route is None:
        raise UserError("--library needs --route: arrow, uniform, task:NAME or another one.")
    if given.task is not None or given.dtype != "float32":
        raise UserError("With --library leave --task and --dtype out: take --route task:NAME.")
    if given.template is not None and given.template not in TEMPLATES:
        raise unknown("template", given.template, list(TEMPLATES))
    folders = [folder for folder in (given.write_peft, given.write_merged) if folder is not None]
    for folder in folders:
        check_written(given.route)
        check_new(folder)
    files = [*folders, *([] if given.certificate is None else [given.certificate])]
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise UserError(
            "--write-peft, --write-merged and --certificate name one path twice: give each its own."
        )
    if given.certificate is not None:
        check_file(given.certificate)
        if not prompts or given.temperature:
            raise UserError("--certificate compares likeliest answers to prompts: give some.")


def _write(given: GenerateCommand, chosen: LibraryRoute, base: str, template: str | None) -> None:
    from moezoo.domains.text.adapter import write_folded
    from moezoo.weights import peft

    if given.write_peft is not None:
        peft.save(given.write_peft, chosen.model(), base)
        _say(f"Wrote the adapter of route {given.route} to {given.write_peft}.")
    if given.write_merged is not None:
        _say(write_folded(given.model, chosen.model(), given.write_merged))
        if template is not None:
            _say(f"Ask it with --template {template}, as here.")
    if (given.write_peft or given.write_merged) and not given.prompts:
        _say("No prompt was named, so none is answered: standard input is not read here.")


def _certify(
    given: GenerateCommand, chosen: LibraryRoute, prompts: Sequence[str], settings: Settings
) -> None:
    from moezoo.domains.text.route_certificate import certificate, summary
    from moezoo.files import write_atomically
    from moezoo.json_text import json_text

    assert given.certificate is not None
    told = certificate(chosen, prompts, settings, given.tasks)
    facts = {"route": given.route, "library": str(given.library)}
    write_atomically(given.certificate, json_text(facts | told, 1))
    _say(f"{summary(told)}\nWrote {given.certificate}.")


def _check_alone(given: GenerateCommand) -> None:
    """Raise UserError for options of a library where there is none."""
    for name in ("route", "combine", "top_k", "tasks", "write_peft", "write_merged", "certificate"):
        if getattr(given, name) not in (None, ()):
            raise UserError(f"--{name.replace('_', '-')} needs --library, a folder of adapters.")
