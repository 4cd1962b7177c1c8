"""The dense Swin: every task on its own is what it is among all, costs, training and export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.cli import evaluate, export
from moezoo.errors import UserError
from moezoo.models.swin_dense.model import SwinDenseConfig
from moezoo.nn import module
from moezoo.train.loop import train
from tests.models.test_gradients import shrunk
from tests.models.tiny import TASKS, call, image, parts_of

CONFIG = SwinDenseConfig(
    width=4, depths=(2, 1), heads=(1, 2), patch=2, window=2, mlp_ratio=2.0, head_channels=2
)
SIZE = (8, 12)


def test_tasks_read_the_same_maps() -> None:
    parts = parts_of(CONFIG, TASKS, SIZE)
    x = image(SIZE, 2)
    both, one = call(parts, x).predictions, call(parts, x, tasks=("depth",)).predictions
    assert both["semseg"].shape == (2, *SIZE, 3) and both["depth"].dtype == jnp.float32
    assert one.keys() == {"depth"}
    np.testing.assert_allclose(one["depth"], both["depth"], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="did you mean depth"):
        call(parts, x, tasks=("dept",))
    with pytest.raises(UserError, match="at least one task"):
        CONFIG.build({}, SIZE, nnx.Rngs(0))


def test_formulas_count_what_the_compiler_counts() -> None:
    """Products only: the compiler counts norms and softmax, too, which are little at this width."""
    config = SwinDenseConfig(
        width=64, depths=(2, 1), heads=(2, 4), patch=4, window=4, head_channels=32
    )
    parts = module.abstract(lambda: config.build(TASKS, (32, 32), nnx.Rngs(0)))

    def run(params, stats, x):
        return module.merge(parts.definition, params, stats)(x).predictions

    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    cost = jax.jit(run).lower(parts.params, parts.stats, x).cost_analysis()
    flops = (cost if isinstance(cost, dict) else cost[0])["flops"]
    counted = 2 * config.macs((32, 32), TASKS).total
    assert counted < flops < 1.1 * counted


@pytest.mark.claims  # a whole run beyond one per domain; its path: tests/bench/test_paths.py
def test_a_run_is_evaluated_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = shrunk("rooms/swin_dense_tiny", tmp_path)
    fewer = replace(config.train, steps=2, batch=8), replace(config.optimiser, warmup=0)
    train(replace(config, directory=str(tmp_path), train=fewer[0], optimiser=fewer[1]))
    run = tmp_path / config.name
    capsys.readouterr()
    evaluate.main([str(run)], "moezoo evaluate")
    assert "depth" in capsys.readouterr().out
    words = [str(run), "--task", "depth", "--calibration", "4", "--out", str(tmp_path / "out")]
    assert export.main(words, "moezoo export") == 0
    assert (tmp_path / "out" / "model.stablehlo").is_file()
