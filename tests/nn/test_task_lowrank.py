"""Shared and own LoRAs of tasks: what is left for one task computes what it did among all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn.layers import Linear
from moezoo.nn.lowrank import LowRank
from moezoo.nn.task_lowrank import MODES, TaskLinear, TwoLinear

TASKS = ("semseg", "depth")
STREAMS = [mode for mode, way in MODES.items() if way.of_task is not None]


def filled(mode: str, base_reads: str) -> TaskLinear:
    """A layer 6 -> 4 with random numbers everywhere."""
    rngs, keys = nnx.Rngs(0), iter(jax.random.split(jax.random.key(1), 9))

    def update(ranks: int) -> LowRank:
        made = LowRank(6, 4, ranks, scale=2.0, rngs=rngs)
        made.up.set_value(jax.random.normal(next(keys), made.up.shape))
        return made

    summed = MODES[mode].shared == "sum"
    own = {task: update(2) for task in TASKS}
    base = Linear(6, 4, rngs=rngs)
    base.bias.set_value(jax.random.normal(next(keys), (4,)))
    return TaskLinear(base, None if summed else update(3), own, mode=mode, base_reads=base_reads)


def inputs() -> tuple[jax.Array, dict[str, jax.Array]]:
    x, *own = jax.random.normal(jax.random.key(2), (3, 2, 5, 6))
    return x, dict(zip(TASKS, own, strict=True))


@pytest.mark.parametrize("base_reads", ["own", "shared"])
@pytest.mark.parametrize("mode", STREAMS)
@pytest.mark.parametrize("parted", [False, True])
def test_one_task_is_what_it_is_among_all(mode: str, base_reads: str, parted: bool) -> None:
    layer = filled(mode, base_reads)
    x, own = inputs()
    by_task = own if parted else {}
    both = layer.streams(x, by_task, TASKS)
    for number, task in enumerate(TASKS):
        left = layer.of_task(number)
        # The sum is over all tasks: nothing leaves.
        assert (left is layer) == (mode == "addition")
        assert isinstance(left, TwoLinear) != (mode == "addition")
        alone = left.streams(x, by_task, (task,))
        np.testing.assert_allclose(alone.shared, both.shared, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(alone.tasks[task], both.tasks[task], rtol=1e-4, atol=1e-5)


def test_whose_features_the_frozen_layer_reads() -> None:
    x, by_task = inputs()
    seen = {}
    for reads in ("own", "shared"):
        layer = filled("matrix", reads)
        for update in layer.own.values():
            update.up.set_value(jnp.zeros(update.up.shape))
        seen[reads] = layer.streams(x, by_task, ("depth",)).tasks["depth"]
        wanted = layer.base(by_task["depth"] if reads == "own" else x)
        np.testing.assert_allclose(seen[reads], wanted, rtol=1e-5)
    assert np.abs(seen["own"] - seen["shared"]).max() > 1e-2


def test_a_mode_without_streams_has_no_such_layer() -> None:
    with pytest.raises(ValueError, match="lora_only"):
        filled("lora_only", "own")
