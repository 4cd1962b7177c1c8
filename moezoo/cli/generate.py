"""Answer prompts with the model of a run on text, or with a Hugging Face folder.

Example: moezoo generate runs/smora_tiny $'stutter\nkasu'
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moezoo.command import WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class GenerateCommand:
    """Answer prompts with the model of a run on text, or with a Hugging Face folder.

    Example: moezoo generate runs/smora_tiny $'stutter\\nkasu'
    """

    model: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint or a Hugging Face decoder with its tokenizer, or the name
    of a model with weights."""
    prompts: Annotated[tuple[str, ...], Positional] = ()
    """What to answer; default: every line of standard input, where a line in double quotes is a
    JSON string, so that it can hold more than one line."""
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
    """plain or chatml; default: a run's own template, and for a folder the prompt as it is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of a folder's parameters and computation; a run keeps its own."""


def prompt_of(line: str) -> str:
    """A line of standard input as a prompt."""
    if not (len(line) > 1 and line[0] == line[-1] == '"'):
        return line
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{line[:60]} is no JSON string, which a line in double quotes has to be: write a new "
            'line as \\n and a quote as \\", or leave the quotes around it out.'
        ) from error


def main(words: list[str], prog: str) -> None:
    """Read the command line, answer the prompts, print the answers."""
    given = parse(GenerateCommand, words, prog)
    from moezoo.backbones.generate import Settings
    from moezoo.domains.text.generation import choice, open_speaker
    from moezoo.domains.text.inference import complete

    if not 0 <= given.seed < 2**63:
        raise UserError(f"--seed is {given.seed}; it must lie between 0 and 2^63 - 1.")
    settings = Settings(new=given.new, choose=choice(given.temperature, given.top_p))
    prompts = given.prompts or tuple(map(prompt_of, filter(None, sys.stdin.read().splitlines())))
    if not prompts:
        raise UserError("There is no prompt: give one, or lines on standard input.")
    speaker = open_speaker(given.model, given.template, given.dtype, given.task)
    answers = complete(speaker, prompts, settings, given.seed)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(answer if len(prompts) == 1 else f"{prompt!r}: {answer}")
