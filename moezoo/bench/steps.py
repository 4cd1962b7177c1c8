"""Whole training steps on this machine: one configuration in several variants, side by side."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from moezoo.command import CONFIGURATIONS, parse
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.planning.step import held_bytes
from moezoo.timing import TimedCall, Times, interleave, machine, versions
from moezoo.train import config as configs
from moezoo.train import mesh as meshes
from moezoo.train import state
from moezoo.train.console import Console
from moezoo.train.setup import extra_state, make_rules, make_update, prepare
from moezoo.train.step import Update

AS_IS = "as_is"
LOOKED_AT = 50  # steps, for kinds of batches


@dataclass(frozen=True)
class StepArguments:
    """Time the training step of a configuration in several variants, side by side in one run.

    Each variant is a quoted list of overrides, or "as_is"; the first is what the others are divided
    by. Data, loss, gradients and update are those of training, from fresh parameters; where tasks
    take turns, a step of each is taken. MB: what one device needs at once.
    Example: moezoo bench steps text/smora_tiny "model.update=lora model.ranks=8" as_is
    """

    config: Annotated[str, tyro.conf.Positional, CONFIGURATIONS]
    """A configuration, as train.py takes it."""
    variants: Annotated[tuple[str, ...], tyro.conf.Positional]
    """At least two lists of overrides; as_is is the configuration as it stands."""
    repeats: int = 15
    """Pairs of steps for every variant."""
    json: Path | None = None
    """Also write the numbers, the machine and the versions to this file."""

    def __post_init__(self) -> None:
        if len(self.variants) < 2 or self.repeats < 1:
            raise UserError("Give at least two variants, each quoted, and at least one repeat.")


def overrides(variant: str) -> list[str]:
    """`model.update=lora data.resolution=16 16` as train.py takes it: further values follow.

    Raises UserError where nothing is named before the first value, and for an open quotation.
    """
    try:
        words = [] if variant == AS_IS else shlex.split(variant)
    except ValueError as error:
        raise UserError(
            f"The variant {variant} opens a quotation and does not close it."
        ) from error
    if words and "=" not in words[0]:
        raise UserError(f"'{words[0]}' is no override: write name=value, such as model.ranks=8.")
    parted = (word.split("=", 1) if "=" in word else [word] for word in words)
    return [part for one in parted for part in ([f"--{one[0]}", one[1]] if one[1:] else one)]


class MeasuredSteps(NamedTuple):
    """run: one more training step on every batch. parameters: trained ones. batches: how many.
    bytes: what the largest step needs of one device's memory."""

    run: TimedCall
    parameters: int
    batches: int
    bytes: int


def steps(config: configs.Config) -> MeasuredSteps:
    """Training steps on the first batch of every kind: where tasks take turns, one of each."""
    setup = prepare(replace(config, start_from=None))
    with jax.set_mesh(setup.mesh):
        extra = extra_state(setup.config, len(setup.tasks))
        made = state.create(
            setup.build, setup.optimiser, setup.mesh, make_rules(setup.config), extra
        )
        update = _update(setup, made)
        size = setup.config.train.batch
        rows = meshes.rows(setup.mesh, size)
        batches = setup.domain.training(setup.config, setup.train, setup.names, 0, rows)
        given = [meshes.place(setup.mesh, batch, size) for batch in kinds(b for _, b in batches)]
        programs = [update.compile(made.state, batch) for batch in given]
    kept = {"state": made.state}
    count = module.count(made.state["params"])

    def run() -> Any:
        metrics = None
        with jax.set_mesh(setup.mesh):
            for (program, _), batch in zip(programs, given, strict=True):
                kept["state"], metrics = program(kept["state"], batch)
        return metrics

    largest = max(held_bytes(compiled) for _, compiled in programs)
    return MeasuredSteps(run, count, len(given), largest)


def kinds(batches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first batch of every kind among the first `LOOKED_AT`; kinds differ in their names."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for batch in itertools.islice(batches, LOOKED_AT):
        found.setdefault(tuple(sorted(batch)), batch)
    return list(found.values())


def _update(setup: Any, made: Any) -> Update:
    return make_update(
        setup.config,
        made.definition,
        setup.tasks,
        setup.optimiser,
        made.shardings,
        len(setup.groups),
    )


def run(words: list[str]) -> int:
    """Compile all variants, time them, print a table, write the file."""
    a = parse(StepArguments, words, prog="moezoo bench steps")
    check_file(a.json)
    console = Console()
    made = {text: steps(configs.load(a.config, overrides(text))) for text in a.variants}
    base, *others = a.variants
    last: dict[str, Times] = {}
    with console.progress("steps", a.repeats, unit="repeats") as bar:
        cases = {text: made[text].run for text in others}
        for number, so_far in enumerate(interleave(made[base].run, cases, a.repeats), 1):
            last = so_far
            bar.update(number)
    seconds = np.concatenate([times.base for times in last.values()])
    rows = [_row(base, made[base], seconds, np.ones(1))]
    rows += [_row(text, made[text], last[text].case, last[text].ratios) for text in others]
    each = made[base].batches
    console.table(
        f"{a.config}, one training step" + (f" of each of {each} tasks" if each > 1 else ""),
        ("variant", "trained parameters", "MB", "ms", "ratio", "quartiles"),
        [
            (
                row["variant"],
                f"{row['parameters']:,}",
                f"{row['bytes'] / 1e6:.1f}",
                row["milliseconds"],
                row["ratio"],
                f"{row['low']:.2f} to {row['high']:.2f}",
            )
            for row in rows
        ],
    )
    if a.json is not None:
        made_on = {"machine": machine(), "versions": versions("jax", "jaxlib", "flax")}
        result = {"benchmark": "steps", "config": a.config, "rows": rows} | made_on
        write_atomically(a.json, json_text(result, 1))
    return 0


def _row(
    variant: str, made: MeasuredSteps, seconds: np.ndarray, ratios: np.ndarray
) -> dict[str, Any]:
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "variant": variant,
        "parameters": made.parameters,
        "bytes": made.bytes,
        "milliseconds": 1e3 * float(np.median(seconds)),
        "ratio": float(middle),
        "low": float(low),
        "high": float(high),
    }
