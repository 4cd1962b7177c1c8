"""What counts as finite, and what a run says where something is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.train.config import OptimConfig
from moezoo.train.guard import Diverged, Guard, not_finite
from tests.train import tiny


def state(**changes: Any) -> dict[str, Any]:
    sound = {
        "params": {"w": jnp.ones((2, 3)), "half": jnp.ones(2, jnp.bfloat16)},
        "stats": {"mean": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)},
        "optimiser": ({"nu": jnp.full(3, 1e30)},),
        "step": jnp.zeros((), jnp.int32),
    }
    return sound | changes


def test_a_sound_state_has_nothing_to_name() -> None:
    assert not_finite(state()) == []
    assert not_finite({"step": jnp.zeros((), jnp.int32)}) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_one_value_of_the_parameters(value: float) -> None:
    changed = {"w": jnp.ones((2, 3)).at[1, 2].set(value), "half": jnp.ones(2, jnp.bfloat16)}
    assert not_finite(state(params=changed)) == ["params/w"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_every_group_is_looked_at(value: float) -> None:
    changed = state(
        stats={"mean": jnp.full(3, value)},
        optimiser=({"nu": jnp.full(3, value)},),
        weighting={"sigma": jnp.full(2, value)},
    )
    assert not_finite(changed) == ["optimiser/0/nu", "stats/mean", "weighting/sigma"]


def guard(directory: Path, newest: int | None = None, **optimiser: Any) -> Guard:
    config = replace(tiny.config(str(directory)), optimiser=OptimConfig(**optimiser))
    return Guard(config, directory, lambda: newest)


def test_a_loss_is_tested_once_the_next_step_is_under_way(tmp_path: Path) -> None:
    watch = guard(tmp_path, 3)
    watch.seen(4, jnp.float32(np.inf))
    with pytest.raises(Diverged, match="The loss is inf at step 4: .*checkpoint 3 is sound"):
        watch.seen(5, jnp.float32(1.0))


@pytest.mark.parametrize("ask", ["settle", "check"])
def test_the_last_loss_is_tested_before_a_save(tmp_path: Path, ask: str) -> None:
    watch = guard(tmp_path)
    watch.seen(1, jnp.float32(np.nan))
    with pytest.raises(Diverged, match="no checkpoint, and .* begins anew"):
        watch.settle() if ask == "settle" else watch.check(1, state())


def test_the_option_that_is_wrong_is_named(tmp_path: Path) -> None:
    nan = state(stats={"mean": jnp.full(3, np.nan)})
    with pytest.raises(Diverged, match="after step 1: give optimiser.eps a finite value"):
        guard(tmp_path, eps=float("nan")).check(1, nan)
    with pytest.raises(Diverged, match="lower 2 of optimiser.clip, .* --optimiser.lr 0.001"):
        guard(tmp_path, lr=1e30, clip=2.0).check(1, nan)
    with pytest.raises(Diverged, match="stats/mean is not finite at the beginning"):
        guard(tmp_path).check(0, nan)


def test_the_first_step_from_a_checkpoint_says_so(tmp_path: Path) -> None:
    watch = guard(tmp_path, 8)
    watch.resumed = 8
    watch.seen(9, jnp.float32(np.nan))
    with pytest.raises(Diverged, match=f"delete {tmp_path / 'checkpoints/8'} to go on from"):
        watch.settle()


def bearing(directory: Path, steps: int, said: list[str] | None = None) -> Guard:
    config = tiny.config(str(directory))
    config = replace(config, train=replace(config.train, nonfinite_steps=steps))
    return Guard(config, directory, lambda: 3, [].append if said is None else said.append)


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    watch = bearing(tmp_path, 2, said)
    for at, skipped in enumerate((False, True, False, True, True, True), 1):
        watch.seen(at, jnp.float32(np.nan if skipped else 1.0), jnp.asarray(skipped))
        assert not watch.exhausted
    watch.settle()
    watch.settle()  # asked about again, a step counts once
    assert (watch.skipped, watch.in_row, watch.sound, watch.exhausted) == (4, 3, 2, True)
    assert [line.split(" changed")[0] for line in said] == [f"Step {n}" for n in (2, 4, 5, 6)]
    with pytest.raises(Diverged, match="Steps 4 to 6 changed nothing, .*checkpoint 3 is sound"):
        watch.give_up()


def test_a_single_step_may_be_one_too_many(tmp_path: Path) -> None:
    watch = bearing(tmp_path, 0)
    watch.seen(1, jnp.float32(1.0), jnp.asarray(True))
    watch.settle()
    assert watch.exhausted
    with pytest.raises(Diverged, match="Step 1 changed nothing"):
        watch.give_up()
