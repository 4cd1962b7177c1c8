"""A plan beside the step that really runs: bytes on every device, temporaries, products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
import rich.console

from moezoo.planning import shapes
from moezoo.planning import step as pod_step
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.loop import train
from moezoo.train.step import Update
from tests.planning.test_command import config


class FirstStep(Exception):
    """What was seen of a run's first step, which is its last: the compiler's object, and the bytes
    that each device was given."""

    def __init__(self, compiled: Any, given: Counter[Any]):
        super().__init__()
        self.compiled, self.given = compiled, given


def bytes_on(*trees: Any) -> Counter[Any]:
    """Bytes of all arrays, by device."""
    found = Counter[Any]()
    for leaf in jax.tree.leaves(trees):
        for part in leaf.addressable_shards:
            found[part.device] += part.data.nbytes
    return found


def first_step(made: Config, patch: pytest.MonkeyPatch) -> FirstStep:
    """Train until the first step is done."""
    plain = Update.compile

    def compile(self: Update, state: Any, batch: Any) -> tuple[Callable, Any]:
        call, compiled = plain(self, state, batch)

        def run(state: Any, batch: Any) -> Any:
            given = bytes_on(state, batch)
            jax.block_until_ready(call(state, batch))
            raise FirstStep(compiled, given)

        return run, compiled

    patch.setattr(Update, "compile", compile)
    patch.setattr(Update, "__call__", lambda self, s, b: self.compile(s, b)[0](s, b))
    with pytest.raises(FirstStep) as seen:
        train(made, Console(rich.console.Console(quiet=True)))
    return seen.value


@pytest.mark.slow
def test_a_plan_is_what_a_step_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = config(data=2, fsdp=2, expert=2)
    made = replace(
        made, directory=str(tmp_path), data=replace(made.data, train=16, test=8),
        log=replace(made.log, tensorboard="off"),
    )  # fmt: skip
    planned = pod_step.measure(made, "here", jax.devices()[:8])
    guessed = shapes.estimate(made, "here", 8, shapes.look(made, "train"))
    real = first_step(made, monkeypatch)
    memory, held = real.compiled.memory_analysis(), planned.state_bytes + planned.batch_bytes
    assert real.given == dict.fromkeys(jax.devices()[:8], held)
    assert memory.argument_size_in_bytes == held == guessed.state_bytes + guessed.batch_bytes
    assert memory.temp_size_in_bytes == planned.temporary_bytes
    assert pod_step.held_bytes(real.compiled) == planned.memory_bytes
    assert guessed.memory_bytes == pytest.approx(planned.memory_bytes, rel=0.15)
    # The compiler counts what is done number by number, too, a fifth of so small a step.
    counted = real.compiled.cost_analysis()["flops"]
    assert 0.75 * counted < guessed.flops <= planned.flops < counted
