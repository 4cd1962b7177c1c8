"""Updates pruned for one task: what is exact, what a NumPy oracle says, what folders hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.cli import export, prune
from moezoo.deploy import task_path
from moezoo.deploy.calibrate import Calibration, calibrate
from moezoo.deploy.cutter import cutter_of
from moezoo.deploy.path import TaskPath
from moezoo.deploy.plan import Plan
from moezoo.domains.text import pruning, rank_pruning
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.paths import RowPaths, RowReader
from moezoo.domains.text.rank_pruning import RankCutter, pruned_decoder, pruned_model
from moezoo.errors import UserError
from moezoo.models.alter.model import ALTERConfig
from moezoo.models.cpoly.model import CPolyConfig
from moezoo.models.language.model import LanguageConfig
from moezoo.models.polytropon.model import PolyConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted
from moezoo.nn.rank_blocks import keeps_weights, routed_updates
from moezoo.train import loop
from moezoo.train.config import Config, EvaluateConfig, OptimConfig, TrainConfig
from moezoo.train.console import Console
from moezoo.weights import peft
from tests.models.tiny import filled

QUIET = Console(rich.console.Console(quiet=True))
DATA = TextDataConfig(length=32, train=40, test=40, only=("copy", "reverse"))
DECODER = DecoderConfig(vocabulary=259, width=16, depth=1, heads=2, groups=1, hidden=16, length=32)
LAYERS = ("model/layers/0/attn/q", "model/layers/0/mlp/up")
TARGETS = ("layers/*/attn/q", "layers/*/mlp/up")
SMORA = SMoRAConfig(decoder=DECODER, targets=TARGETS, ranks=6, active=2)
MIXTURE = replace(SMORA, update="mixture", loras=3, top_k=1)
RARE = 4  # a rank that few tokens choose


def model_of(config: SMoRAConfig) -> Any:
    """Random updates whose tokens rarely choose the rank `RARE`, or the last LoRA."""
    parts = filled(lambda: config.build({"lm": 259}, (1, 32), nnx.Rngs(0)))
    model = module.merge(*parts)
    for layer in surgery.find(model, Adapted).values():
        router, last = layer.update.router, min(RARE, layer.update.experts - 1)
        if hasattr(router, "bias"):
            bias_E = 0.1 * jnp.cos(jnp.arange(6.0)).at[last].set(-20.0)
            router.bias.set_value(bias_E)
    return model


def rows() -> np.ndarray:
    exporter = RowPaths(DATA, "reverse")
    source = exporter.open("test")
    return exporter.stack([source[i] for i in range(8)], (), source.info)["rows"]


def path_of(config: SMoRAConfig) -> TaskPath:
    model = model_of(config)
    assert routed_updates(model) == tuple(name.removeprefix("model/") for name in LAYERS)
    exporter = RowPaths(DATA, "reverse")
    return task_path.task_path(RowReader(model, "reverse"), "reverse", exporter.input)


@pytest.fixture(scope="module")
def given() -> np.ndarray:
    return rows()


@pytest.fixture(scope="module")
def whole() -> TaskPath:
    return path_of(SMORA)


def cut(whole: TaskPath, kept: tuple[int, ...], experts: int = 6) -> TaskPath:
    plan = Plan("reverse", dict.fromkeys(LAYERS, kept), dict.fromkeys(LAYERS, experts))
    return task_path.rerouted(whole, plan, {})  # type: ignore[arg-type]


def logits_of(model: Any, given: np.ndarray) -> np.ndarray:
    return np.asarray(RowReader(model, "reverse")(jnp.asarray(given)).predictions["reverse"])


def test_all_ranks_give_the_updates_bits(whole: TaskPath, given: np.ndarray) -> None:
    found = np.asarray(whole.run(whole.weights, jnp.asarray(given)).logits)
    np.testing.assert_array_equal(found, logits_of(model_of(SMORA), given))
    np.testing.assert_array_equal(found, logits_of(pruned_decoder(whole), given))


def test_what_is_unused_leaves_exactly_and_what_is_used_does_not(
    whole: TaskPath, given: np.ndarray
) -> None:
    wanted = np.asarray(whole(given).logits)
    without = cut(whole, tuple(i for i in range(6) if i != RARE))
    found = without(given)
    assert not np.asarray(found.violations_B).any()
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits_of(pruned_decoder(without), given), wanted, atol=1e-5)
    fewer = cut(whole, (0, 1, 2))
    again = fewer(given)
    assert np.asarray(again.violations_B).all() and np.abs(again.logits - wanted).max() > 1e-3
    np.testing.assert_allclose(logits_of(pruned_decoder(fewer), given), again.logits, atol=1e-5)


def test_a_pruned_update_is_numpys(whole: TaskPath) -> None:
    """SMoRA's equation over the ranks that are left, biases included."""
    kept, x_ND = [0, 2, 3, 5], np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    layer = surgery.get(pruned_decoder(cut(whole, tuple(kept))), "layers/0/attn/q")
    full = surgery.get(model_of(SMORA), "layers/0/attn/q").update
    a, b, w, bias = (
        np.asarray(v.get_value(), np.float64)
        for v in (full.down, full.up, full.router.kernel, full.router.bias)
    )
    score_NE = 1 / (1 + np.exp(-x_ND @ w)) + bias
    wanted = np.zeros((9, 16))
    for n in range(9):
        best = sorted(kept, key=lambda e: -score_NE[n, e])[:2]
        gates = score_NE[n, best] / score_NE[n, best].sum()
        for g, e in zip(gates, best, strict=True):
            wanted[n] += full.scale * g * (x_ND[n] @ a[:, e]) * b[e]
    np.testing.assert_allclose(layer.update(jnp.asarray(x_ND))[0], wanted, rtol=1e-4, atol=1e-5)


def test_calibration_counts_ranks(whole: TaskPath, given: np.ndarray) -> None:
    found = calibrate(whole, [{"rows": given, "valid": np.ones(8, bool)}], "x")
    tokens = int((given[:, 0] >= 0).sum())
    for name in LAYERS:
        usage = found.layers[name]
        assert usage.count_E.sum() == 2 * tokens and usage.count_E[RARE] == 0
        record = whole.run(whole.weights, jnp.asarray(given)).routing[name]
        chosen = np.asarray(record.experts_NK)[np.asarray(record.mask_N)]
        np.testing.assert_array_equal(usage.count_E, np.bincount(chosen.ravel(), minlength=6))


def test_one_lora_of_a_mixture_is_plain(given: np.ndarray, tmp_path: Path) -> None:
    """A top-1 mixture of which one LoRA is left: its share is 1, and PEFT's form can say it."""
    whole = path_of(MIXTURE)
    one = cut(whole, (1,), 3)
    model = pruned_decoder(one)
    peft.save(tmp_path / "lora", model)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2 and "experts" not in config
    np.testing.assert_allclose(logits_of(model, given), one(given).logits, atol=1e-5)
    two = pruned_decoder(cut(whole, (0, 1), 3))
    peft.save(tmp_path / "stacked", two)
    assert "STACKED" in (tmp_path / "stacked/adapter_config.json").read_text()


def test_what_rows_without_violation_keep_is_asked_of_the_router() -> None:
    def router(config: SMoRAConfig) -> Any:
        return next(iter(surgery.find(model_of(config), Adapted).values())).update.router

    assert keeps_weights(router(SMORA)) and keeps_weights(router(replace(SMORA, gate="softmax")))
    assert keeps_weights(router(replace(MIXTURE, top_k=2)))
    assert not keeps_weights(router(MIXTURE)), "a probability is a share of all"


def trained(model: Any, name: str, folder: Path) -> Path:
    config = Config(
        name=name,
        directory=str(folder),
        tasks=("lm",),
        data=DATA,
        model=model,
        optimiser=OptimConfig(lr=1e-2, warmup=0, weight_decay=0.0),
        train=TrainConfig(steps=1, batch=8),
        evaluate=EvaluateConfig(batch=8, pictures=0),
    )
    loop.train(config, QUIET)
    return folder / name


@pytest.mark.slow
def test_a_run_becomes_an_adapter_with_a_certificate(tmp_path: Path) -> None:
    run = trained(SMORA, "ranks", tmp_path)
    assert isinstance(cutter_of(run, run), RankCutter)
    words = [str(run), "--task", "copy", "--batch", "8", "--out", str(tmp_path / "out")]
    refused = {
        "--keep 1": "--keep is 1; it must lie between 2, which every token chooses, and 6",
        "--keep 3 --length 9": "ranks is a run, which has data .*: leave out --length",
        "--keep 3 --weights int8": "weights in float32: leave out --weights",
        "--keep 3 --recover finetune": "would change the frozen decoder",
        "--keep 3 --novice mean": "no place for novices",
    }
    for more, message in refused.items():
        with pytest.raises(UserError, match=message):
            prune.main([*words, *more.split()], "moezoo prune")
    with pytest.raises(UserError, match="becomes an adapter's folder and no export: moezoo prune"):
        export.main([str(run), "--task", "copy", "--out", str(tmp_path / "x")], "moezoo export")
    prune.main([*words, "--total", "7"], "moezoo prune")
    out = tmp_path / "out"
    stated = json.loads((out / "certificate.json").read_text())
    kept = [layer["kept"] for layer in stated["layers"].values()]
    assert sum(map(len, kept)) == 7 and all(len(ids) >= 2 for ids in kept)
    assert stated["folder"]["form"] == "stacked, with routers"
    assert stated["folder"]["largest_difference"] < 1e-5
    assert (
        stated["source"] == {"run": "ranks", "step": 1} and "blocks of ranks" in stated["statement"]
    )
    assert Calibration.load(out / "calibration.npz").task == "copy"
    told = json.loads((out / "adapter_config.json").read_text())
    assert told["system"]["name"] == "SMoRAConfig" and told["system"]["ranks"] == SMORA.ranks
    ranks = [u.update.experts for u in surgery.find(pruned_model(run, out), Adapted).values()]
    assert sorted(ranks) == sorted(map(len, kept))


@pytest.mark.parametrize(
    ("model", "command"),
    [
        (
            CPolyConfig(decoder=DECODER, tasks=2),
            "adapter {} --merge --task sort --out FOLDER",
        ),
        (replace(SMORA, update="lora"), "adapter {} --merge --out FOLDER"),
        (LanguageConfig(DECODER), "adapter {} --merge --out FOLDER"),
        (ALTERConfig(DECODER, layers=(0,)), "generate {}"),
        (SMORA, "prune {} --task sort --keep NUMBER --out FOLDER"),
    ],
)
def test_the_command_that_works_is_named_with_the_task(
    model: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", Config("run", model, ("lm",), DATA)
    run.mkdir()
    (run / "config.json").write_text("{}")
    for module_of in (rank_pruning, pruning):
        monkeypatch.setattr(module_of, "read_config", lambda path: config)
    words = [str(run), "--task", "sort", "--out", str(tmp_path / "out")]
    wanted = f"moezoo {command.format(run)} "
    with pytest.raises(UserError) as told:
        export.main(words, "moezoo export")
    assert wanted in str(told.value), str(told.value)
    if model is not SMORA:
        assert "prune" not in str(told.value)
        with pytest.raises(UserError, match="nothing to prune") as told:
            prune.main([*words, "--keep", "4"], "moezoo prune")
        assert wanted in str(told.value), str(told.value)


def test_tasks_that_decide_are_cut_another_way(tmp_path: Path) -> None:
    """Poly's gates are the task's: nothing is chosen by tokens."""
    assert PolyConfig(decoder=DECODER).token_choice() is None
    assert replace(SMORA, update="lora").token_choice() is None
    assert SMORA.token_choice() == ("token", 6, 2) and MIXTURE.token_choice() == ("token", 3, 1)
