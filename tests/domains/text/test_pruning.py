"""Decoders pruned for one task: what is exact, what equals the smaller model, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.cli import export, prune
from moezoo.deploy import recover, task_path
from moezoo.deploy.calibrate import calibrate
from moezoo.deploy.cutter import cutter_of
from moezoo.deploy.novices import MEAN
from moezoo.deploy.path import TaskPath
from moezoo.deploy.plan import Plan
from moezoo.deploy.produce import Request
from moezoo.deploy.sweep import Limits
from moezoo.deploy.trial import Trial
from moezoo.domains.text.adapter import tokenizer_files
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.paths import RowPaths, RowReader, answered, share_of_other_tokens
from moezoo.domains.text.pruning import DecoderCutter, Lines, decoder_arrays
from moezoo.errors import UserError
from moezoo.models.language.model import LanguageConfig
from moezoo.nn import module
from moezoo.train import loop
from moezoo.train.config import Config, EvaluateConfig, OptimConfig, TrainConfig
from moezoo.train.console import Console
from moezoo.train.domain import Classes
from moezoo.weights import hf
from tests.backbones.test_decoder import random_parts

QUIET = Console(rich.console.Console(quiet=True))


def quiet(folder: Path, lines: Lines | None = None) -> DecoderCutter:
    return DecoderCutter(folder, lines or Lines(), QUIET)


DATA = TextDataConfig(length=32, train=40, test=40, only=("copy", "reverse"))
RENORMALISED = ExpertsConfig(4, 2, 12)
DECODER = DecoderConfig(
    vocabulary=259, width=16, depth=2, heads=2, groups=1, hidden=16, experts=RENORMALISED
)
RARE = 1  # an expert that few tokens choose
LAYERS = tuple(f"model/layers/{i}/mlp/routed" for i in range(2))
KEPT = (0, 2, 3)


class Case(NamedTuple):
    config: DecoderConfig
    whole: TaskPath
    rows_B2T: np.ndarray


def build(config: DecoderConfig) -> module.ModuleParts:
    """Random parameters whose tokens share a direction, against which `RARE` is chosen rarely."""
    parts = random_parts(config)
    flat = module.flatten(parts.params)
    for path in flat:
        if path.endswith("embed/table"):
            # The token that begins every row has nothing else.
            flat[path] = (flat[path] + 0.7).at[ByteTokenizer.bos].set(1.0)
        if path.endswith("router/kernel"):
            flat[path] = flat[path].at[:, RARE].add(-0.3)
    return parts._replace(params=module.unflatten(flat))


def case_of(config: DecoderConfig) -> Case:
    parts = build(config)
    exporter = RowPaths(DATA, "reverse")
    source = exporter.open("test")
    rows = exporter.stack([source[i] for i in range(16)], (), source.info)["rows"]
    model = RowReader(module.merge(*parts), "reverse")
    whole = task_path.task_path(model, "reverse", exporter.input)
    return Case(config, whole, rows)


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of(DECODER)


def without_rare(case: Case) -> TaskPath:
    plan = Plan("reverse", dict.fromkeys(LAYERS, KEPT), dict.fromkeys(LAYERS, 4))
    return task_path.rerouted(case.whole, plan, {})


def test_rows_are_those_of_the_task_and_only_answers_are_compared(case: Case) -> None:
    logits = np.asarray(case.whole(case.rows_B2T).logits)
    tokens_BT, asked_BT = case.rows_B2T[:, 0], case.rows_B2T[:, 1] == 1
    assert (asked_BT.sum(1) > 1).all() and not (asked_BT & (tokens_BT < 0)).any()
    np.testing.assert_array_equal((logits != 0).any(-1), asked_BT)
    likeliest = np.asarray(answered(jnp.asarray(logits)))
    np.testing.assert_array_equal(likeliest >= 0, asked_BT)
    other = np.where(np.arange(32) == asked_BT.argmax(1)[:, None], 0, likeliest)
    apart = share_of_other_tokens(jnp.asarray(likeliest), jnp.asarray(other))
    np.testing.assert_allclose(apart, 100 / asked_BT.sum(1), rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_short_fine_tuning_trains_norms_and_the_head(tied: bool) -> None:
    """The head of a decoder has no task's name; a tied one is the embedding's table."""
    parts = random_parts(replace(DECODER, tied_head=tied))
    model = module.merge(*parts)
    exporter = RowPaths(DATA, "reverse")
    loaded: Any = SimpleNamespace(model=model)
    subject = exporter.subject(loaded, Classes())
    whole = task_path.task_path(subject.model, "reverse", exporter.input)
    names = recover.tuned(whole, "small", subject.head("reverse"))
    matrices = {name for name in names if whole.weights[name].ndim > 1}
    assert matrices == {"model/embed/table" if tied else "model/lm_head/kernel"}
    assert len(names) > 1 and all("norm" in name for name in set(names) - matrices)


def test_a_cut_path_is_the_smaller_decoder(case: Case) -> None:
    cut = without_rare(case)
    flat = decoder_arrays(cut)
    small = replace(case.config, experts=replace(case.config.experts, count=3))
    shapes = module.abstract(lambda: small.build(nnx.Rngs(0)))
    assert {p: a.shape for p, a in flat.items()} == {
        p: a.shape for p, a in module.flatten(shapes.params).items()
    }
    reader = RowReader(module.merge(shapes.definition, module.unflatten(flat), {}), "reverse")
    wanted = reader(jnp.asarray(case.rows_B2T)).predictions["reverse"]
    np.testing.assert_allclose(cut(case.rows_B2T).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selection", ["softmax_then_top_k_renormalised", "softmax_then_top_k"])
def test_what_rows_without_violation_keep(case: Case, selection: Any) -> None:
    renormalised = selection == case.config.experts.selection
    if not renormalised:
        experts = replace(RENORMALISED, selection=selection)
        case = case_of(replace(DECODER, experts=experts))
    whole, cut = case.whole(case.rows_B2T), without_rare(case)(case.rows_B2T)
    violations_B = np.asarray(cut.violations_B)
    clean_B = violations_B == 0
    assert 2 <= clean_B.sum() <= 14, violations_B
    apart_B = np.abs(np.asarray(whole.logits) - np.asarray(cut.logits)).max((1, 2))
    assert (apart_B[~clean_B] > 1e-3).any()
    if renormalised:
        assert apart_B[clean_B].max() < 1e-4
    else:
        assert apart_B[clean_B].min() > 1e-4  # every weight has grown


def test_a_layer_keeps_as_many_as_a_token_chooses(case: Case) -> None:
    plan = Plan("reverse", dict.fromkeys(LAYERS, (1,)), dict.fromkeys(LAYERS, 4))
    with pytest.raises(UserError, match="keeps 1 experts in model/layers/0/mlp/routed, but a tok"):
        task_path.rerouted(case.whole, plan, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra text)")
    made = tmp_path_factory.mktemp("hf")
    for name, config in {
        "sparse": DECODER,
        "dense": replace(DECODER, experts=ExpertsConfig()),
    }.items():
        files = tokenizer_files(DATA)
        hf.save(made / name, config, random_parts(config).params, files=files)
    for name in ("train", "test"):
        text = json.dumps({"instruction": "abc", "output": "cba" * 4, "task": "reverse"}) + "\n"
        (made / f"{name}.jsonl").write_text(text * 2)
    return made


def test_what_files_hold_decides_the_fingerprint_and_not_where_they_lie(
    folder: Path, tmp_path: Path
) -> None:
    def told(place: Path) -> Any:
        lines = Lines(place / "train.jsonl", place / "test.jsonl")
        return RowPaths(lines.data(place / "sparse"), "reverse").identity()

    shutil.copytree(folder, tmp_path / "copy")
    first = told(folder)
    assert first == told(tmp_path / "copy") and str(folder) not in json.dumps(first)
    for name in ("train.jsonl", "sparse/tokenizer.json"):
        with open(tmp_path / "copy" / name, "a") as file:
            file.write("\n")
        changed = told(tmp_path / "copy")
        assert changed != first
        first = changed


REFUSED = {
    "few": ("sparse --keep 1", "--keep is 1; it must lie between 2, which every token chooses, an"),
    "many": ("sparse --keep 5", "--keep is 5; .* and 4, which there are"),
    "total": ("sparse --total 5", "the same number of experts in every layer: give --keep"),
    "dense": ("dense --keep 2", "dense has no experts in any layer: there is nothing to prune"),
    "replace": ("sparse --keep 2 --replace", "is never replaced: leave out --replace"),
    "unknown": ("sparse --keep 2 --task revers", "Unknown task of this data 'revers': did you me"),
    "short": ("sparse --keep 2 --length 8", "None of 2 examples has an answer that fits in rows"),
    "chatml": ("sparse --keep 2 --template chatml", "<.im_start.>"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_any_work(kind: str, folder: Path, tmp_path: Path) -> None:
    told, message = REFUSED[kind]
    name, *rest = told.split()
    words = [str(folder / name), "--task", "reverse", "--out", str(tmp_path / "out"), *rest]
    for option in ("train", "test"):
        words += [f"--{option}-file", str(folder / f"{option}.jsonl")]
    with pytest.raises(UserError, match=message) as raised:
        prune.main(words, "moezoo prune")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_folder_needs_lines_and_a_place(folder: Path, tmp_path: Path) -> None:
    request = Request(keep=2)
    with pytest.raises(UserError, match="model without data: give JSON lines of the task, --train"):
        quiet(folder / "sparse").export("reverse", request, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        quiet(folder / "sparse").export("reverse", request, tmp_path)


@pytest.mark.slow
def test_a_trial_answers_for_every_cut(case: Case) -> None:
    """One program for all choices, biases on the choice included."""
    ways: Any = {"selection": "sigmoid_then_top_k_renormalised", "choice": "score_plus_bias"}
    biased = ExpertsConfig(4, 2, 12, **ways)
    for one in (case, case_of(replace(DECODER, experts=biased))):
        widths = dict.fromkeys(LAYERS, 16)
        trial = Trial(one.whole, widths, 0, cut=True)
        kept = dict.fromkeys(LAYERS, KEPT)
        usage = calibrate(one.whole, [{"rows": one.rows_B2T, "valid": np.ones(16, bool)}], "x")
        found = trial.of(kept, usage, MEAN)(one.rows_B2T)
        wanted = without_rare(one)(one.rows_B2T)
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        lost = np.asarray(found.violations_BL).sum(1)
        np.testing.assert_array_equal(lost, wanted.violations_B)


@pytest.fixture(scope="module")
def lines(folder: Path) -> Lines:
    """Several examples of one task, so that there are bounds."""
    for name, count in {"more": 12, "others": 12}.items():
        rows = [
            json.dumps({"instruction": text, "output": text[::-1], "task": "reverse"})
            for text in (f"a{i}bc{name[:2]}" for i in range(count))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return Lines(folder / "more.jsonl", folder / "others.jsonl", 32)


@pytest.mark.slow
def test_a_sweep_of_a_decoder(folder: Path, lines: Lines, tmp_path: Path) -> None:
    """The curve of a Hugging Face folder, its page with texts in the place of pictures."""
    out, request = tmp_path / "curve", Request(batch=6)
    with pytest.raises(UserError, match="the rows of one task: give --task"):
        quiet(folder / "sparse", lines).sweep(None, request, out)
    (curve,) = quiet(folder / "sparse", lines).sweep("reverse", request, out)
    assert {p.name for p in out.iterdir()} == {"curve.json", "curve.png", "index.html"}
    own, *others = curve.points
    assert own[1:4] == ("reap", "mean", "cut") and all(m.router == "cut" for m in others)
    assert [point.keep for point in curve.points[own]] == [3, 2], "tokens choose two"
    assert all(0 <= point.test["coverage"] <= 1 for point in curve.points[own])
    page = (out / "index.html").read_text()
    assert page.count("iVBORw0KGgo") > 12, "rows and answers are drawn"


@pytest.mark.parametrize("more", [["--task", "reverse", "--out", "x"], ["--compare"]])
def test_an_export_of_a_decoder_names_the_command(folder: Path, more: list[str]) -> None:
    made = folder / "sparse"
    task = "reverse" if "reverse" in more else "TASK"
    with pytest.raises(UserError, match=f"moezoo prune {made} --task {task} .* --train-file"):
        export.main([str(made), *more], "moezoo export")


@pytest.mark.slow
def test_the_fewest_experts_within_a_limit(folder: Path, lines: Lines, tmp_path: Path) -> None:
    """Chosen on verification rows; what was measured for the curve is not measured again."""
    hf.save(tmp_path / "rare", DECODER, build(DECODER).params, files=tokenizer_files(DATA))
    cutter = quiet(tmp_path / "rare", lines)
    # Six rows can promise no one percent.
    with pytest.raises(UserError, match="already loses more than"):
        cutter.within("reverse", Request(batch=6), Limits(disagreement=0.01), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    cutter.within("reverse", Request(batch=6), Limits(disagreement=0.999), tmp_path / "out")
    stated = json.loads((tmp_path / "out/certificate.json").read_text())
    assert stated["chosen_by"]["limits"] == {"disagreement": 0.999, "loss": None}
    assert hf.load(tmp_path / "out").config.experts.count in (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "trains"), [("router", None), ("finetune", "all"), ("finetune", None)]
)
def test_recovery_of_a_decoder(
    kind: str, trains: Any, folder: Path, lines: Lines, tmp_path: Path
) -> None:
    """The written folder is the recovered path, whose loss on calibration rows has fallen."""
    request = Request(keep=2, batch=6, recover=kind, recover_steps=20, recover_trains=trains)
    quiet(folder / "sparse", lines).export("reverse", request, tmp_path / "out")
    stated = json.loads((tmp_path / "out/certificate.json").read_text())
    assert stated["folder"]["largest_difference"] < 1e-4 and stated["recovery"]["kind"] == kind
    told = stated["recovery"]
    assert told["calibration_loss_after"] < told["calibration_loss_before"]
    assert "no example keeps the full model's output" in stated["statement"]


@pytest.mark.slow
def test_a_run_on_text_becomes_a_folder(tmp_path: Path) -> None:
    config = Config(
        name="sparse",
        directory=str(tmp_path),
        tasks=("lm",),
        data=DATA,
        model=LanguageConfig(replace(DECODER, layers="scanned")),
        optimiser=OptimConfig(lr=1e-2, warmup=0, weight_decay=0.0),
        train=TrainConfig(steps=2, batch=8, importance_weight=0.01),
        evaluate=EvaluateConfig(batch=8, pictures=2),
    )
    loop.train(config, QUIET)
    run = tmp_path / "sparse"
    assert isinstance(cutter_of(run, run), DecoderCutter)
    words = [str(run), "--task", "copy", "--keep", "2", "--batch", "8"]
    with pytest.raises(UserError, match="sparse is a run, which has data .*: leave out --length"):
        prune.main([*words, "--length", "9", "--out", str(tmp_path / "x")], "moezoo prune")
    with pytest.raises(UserError, match=f"run on text, .*: moezoo prune {run} --task copy"):
        export.main([str(run), "--task", "copy", "--out", str(tmp_path / "x")], "moezoo export")
    prune.main([*words, "--out", str(tmp_path / "out")], "moezoo prune")
    found = hf.load(tmp_path / "out").config
    assert found.experts == replace(RENORMALISED, count=2) and hf.stop_tokens(tmp_path / "out")
    stated = json.loads((tmp_path / "out/certificate.json").read_text())
    assert stated["source"] == {"run": "sparse", "step": 2}
    assert stated["folder"]["largest_difference"] < 1e-4
