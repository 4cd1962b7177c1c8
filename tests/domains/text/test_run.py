"""Runs on text: a base, SMoRA on top of it, what both leave, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import rich.console
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.vit import ViT, ViTConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.errors import UserError
from moezoo.models.language.model import LanguageConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.nn import module
from moezoo.nn.rope import RopeConfig
from moezoo.train import config as configs
from moezoo.train import loop, start
from moezoo.train.config import Config, EvaluateConfig, MeshConfig, OptimConfig, TrainConfig
from moezoo.train.console import Console
from moezoo.train.report import write_report
from moezoo.weights import hf, peft
from moezoo.weights.augreg_names import to_augreg
from tests.train import tiny

DECODER = DecoderConfig(vocabulary=259, width=16, depth=1, heads=2, groups=1, hidden=16, length=48)
DATA = TextDataConfig(length=48, train=60, test=30, only=("copy", "reverse", "upper"))
QUIET = Console(rich.console.Console(quiet=True))


def config(directory: Path, made: Any, **changes: Any) -> Config:
    return replace(
        Config(
            name="base",
            directory=str(directory),
            tasks=("lm",),
            data=DATA,
            model=made,
            optimiser=OptimConfig(lr=1e-2, warmup=0, weight_decay=0.0),
            train=TrainConfig(steps=4, batch=8, log_every=1, importance_weight=0.0),
            evaluate=EvaluateConfig(batch=8, pictures=2),
            mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        ),
        **changes,
    )


FILES = {"train_file": "x.jsonl", "test_file": "y.jsonl"}
SMORA = SMoRAConfig(decoder=DECODER, ranks=8, active=2, rate=0.25)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[loop.Finished, loop.Finished]:
    folder = tmp_path_factory.mktemp("text")
    base = loop.train(config(folder, LanguageConfig(DECODER)), QUIET)
    adapted = config(folder, SMORA, name="smora", start_from=str(base.directory))
    finished = loop.train(adapted, QUIET)
    write_report(finished, QUIET)
    return base, finished


@pytest.mark.slow
def test_the_base_stays_as_it_was_and_has_no_moments(runs) -> None:
    base, smora = runs
    learned = module.flatten(base.state["params"])
    frozen = module.flatten(smora.state["stats"])
    kept = {p.replace("/base/", "/"): a for p, a in frozen.items() if not p.endswith("router/bias")}
    assert set(kept) == set(learned)
    for path, array in kept.items():
        np.testing.assert_array_equal(array, learned[path], err_msg=path)
    assert all("/update/" in path for path in module.flatten(smora.state["params"]))
    count = sum(x.size for x in jax.tree.leaves(smora.state["optimiser"]) if x.ndim)
    assert count == 2 * module.count(smora.state["params"])


@pytest.mark.slow
def test_biases_moved_once_per_step_by_the_rule(runs) -> None:
    _, smora = runs
    stats = module.flatten(smora.state["stats"])
    biases = [np.asarray(a) for path, a in stats.items() if path.endswith("router/bias")]
    assert len(biases) == 7
    for bias in biases:
        steps = bias / 0.25
        np.testing.assert_array_equal(steps, np.round(steps))
        assert 0 < np.abs(steps).max() <= 4


@pytest.mark.slow
def test_what_a_run_leaves(runs) -> None:
    _, smora = runs
    pictures = smora.directory / "pictures"
    assert {p.name for p in pictures.iterdir()} == {
        "curves.png", "samples.md", "scores.png", "usage.json", "usage.png"
    }  # fmt: skip
    text = (pictures / "samples.md").read_text()
    assert "| copy |" in text or "| reverse |" in text or "| upper |" in text
    assert text.count("| wrong |") + text.count("| right |") == 8
    report = (smora.directory / "report.md").read_text()
    assert "(pictures/samples.md)" in report and "predictions.png" not in report
    assert "exact_match" in report and "of 48 tokens" in report
    usage = json.loads((pictures / "usage.json").read_text())
    counts = np.array(usage["layers/0/mlp/down"])
    assert counts.shape == (3, 8)  # tasks and rank experts
    tokens = {name: np.array(table).sum() for name, table in usage.items()}
    assert set(tokens.values()) == {counts.sum()}, "every layer saw the same tokens"
    scores = smora.evaluation.scores["lm"]
    assert {"loss", "exact_match", "copy/accuracy", "upper/loss"} <= set(scores)


@pytest.mark.slow
def test_the_run_is_read_back(runs) -> None:
    from moezoo.train.scoring import score_run
    from moezoo.train.setup import load_run

    _, smora = runs
    loaded = load_run(smora.directory)
    flat = module.flatten(module.split(loaded.model).params)
    for path, array in module.flatten(smora.state["params"]).items():
        np.testing.assert_array_equal(flat[path], array)
    again = score_run(smora.directory, console=QUIET).scores["lm"]
    assert again["loss"] == pytest.approx(smora.evaluation.scores["lm"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_biases_do_not_depend_on_slices_and_devices(runs, tmp_path: Path) -> None:
    """After one step: later ones have other parameters, by rounding and by means of slices."""
    first = str(runs[0].directory)
    found = []
    for name, slices, mesh in (
        ("whole", 1, MeshConfig(data=2, fsdp=2, tensor=2)),
        ("sliced", 2, MeshConfig(data=4, tensor=2)),
        ("alone", 1, MeshConfig(data=1, fsdp=1, tensor=8)),
    ):
        train = TrainConfig(steps=1, batch=8, importance_weight=0.0, gradient_accumulation=slices)
        made = config(tmp_path, SMORA, name=name, start_from=first, train=train, mesh=mesh)
        found.append(module.flatten(loop.train(made, QUIET).state["stats"]))
    for path in found[0]:
        if path.endswith("router/bias"):
            assert found[0][path].any()
            for other in found[1:]:
                np.testing.assert_array_equal(found[0][path], other[path], err_msg=path)


@pytest.mark.slow
def test_starting_from_a_hugging_face_folder(runs, tmp_path: Path) -> None:
    base, _ = runs
    hf.save(tmp_path / "decoder", DECODER, base.state["params"])
    train = TrainConfig(steps=1, batch=8, importance_weight=0.0)
    started = loop.train(
        config(tmp_path, SMORA, start_from=str(tmp_path / "decoder"), train=train), QUIET
    )
    frozen = module.flatten(started.state["stats"])
    learned = module.flatten(base.state["params"])
    for path, array in learned.items():
        name = path if path in frozen else "/base/".join(path.rsplit("/", 1))
        np.testing.assert_array_equal(frozen[name], array)


VIT = ViTConfig(width=8, depth=1, heads=2, patch=4, mlp_ratio=1.0)


def test_pretrained_weights_of_another_model(tmp_path: Path) -> None:
    parts = module.create(lambda: DECODER.build(nnx.Rngs(0)))
    folder = tmp_path / "decoder"
    hf.save(folder, DECODER, parts.params)
    (tmp_path / "vit.npz").write_bytes(b"PK")
    cases = {
        # Equal shapes, other numbers.
        "heads": (replace(DECODER, heads=4, head_width=4), folder, "model.decoder.heads is 4, but"),
        "rope": (replace(DECODER, rope=RopeConfig(theta=5e5)), folder, "model.decoder.rope is"),
        "wide": (replace(DECODER, width=32), folder, "model.decoder.width is 32, but the model in"),
    }
    for name, (decoder, source, message) in cases.items():
        made = config(tmp_path, replace(SMORA, decoder=decoder), name=name, start_from=str(source))
        with pytest.raises(UserError, match=message):
            loop.train(made, QUIET)
    text = config(tmp_path, SMORA, start_from=str(tmp_path / "vit.npz"))
    with pytest.raises(UserError, match="vit.npz.*is damaged or another kind of file"):
        start.check_fits(str(text.start_from), text)
    vit = module.abstract(lambda: ViT(VIT, (8, 8), classes=2, rngs=nnx.Rngs(0)))
    shapes = module.flatten(vit.params)
    arrays = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    np.savez(tmp_path / "vit.npz", **to_augreg(arrays, VIT.heads)[0])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="but base reads text"):
        start.check_fits(str(text.start_from), text)
    images = replace(tiny.config(str(tmp_path)), start_from=str(folder))
    with pytest.raises(UserError, match="but tiny reads images"):
        start.check_fits(str(folder), images)


def test_a_configuration_is_trained_first_and_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(start.config_file, "exists", lambda name: name == "text/first")
    first = config(tmp_path, LanguageConfig(DECODER), name="first")
    monkeypatch.setattr(start.config_file, "load", lambda name: first)
    monkeypatch.setattr(start.config_file, "find", lambda name, folders: Path(f"{name}.py"))
    trained: list[Any] = []

    def train(config: Any, console: Any, file: Any) -> None:
        trained.append(config)

    wanted = config(tmp_path, SMORA, name="second", start_from="text/first")
    assert start.with_start(wanted, QUIET, train).start_from == str(tmp_path / "first")
    assert [c.name for c in trained] == ["first"]
    (tmp_path / "first").mkdir()
    line = {"step": 4, "split": "test", "lm/loss": 1.0}
    (tmp_path / "first" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    start.with_start(wanted, QUIET, train)
    assert len(trained) == 1, "a finished run is not repeated"
    assert start.with_start(replace(wanted, start_from=str(tmp_path)), QUIET, train).start_from


def test_configurations_of_text_survive_json(tmp_path: Path) -> None:
    for model in (SMORA, LanguageConfig(DECODER)):
        made = config(tmp_path, model)
        assert configs.from_json(configs.to_json(made)) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": tiny.config("x").data}, "reads text, but the data section of base gives images"),
        ({"model": tiny.model()}, "M3ViTConfig reads images, but the data section"),
        ({"tasks": ("depth",)}, "Task depth does not belong to text"),
        ({"data": replace(DATA, only=("copy", "fly"))}, "data.only"),
        ({"data": replace(DATA, name="jsonl")}, "data.train_file and data.test_file are needed"),
        ({"data": replace(DATA, train_file="x")}, "needs data.name jsonl"),
        ({"data": replace(DATA, length=4)}, "data.length is 4"),
        ({"data": replace(DATA, tokenizer="/nowhere")}, "nowhere"),
        ({"data": replace(DATA, name="jsonl", only=("copy",), **FILES)}, "leave it empty"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loop.train(config(tmp_path, SMORA, **changes), QUIET)


@pytest.mark.slow
def test_a_trained_model_continues_texts(runs) -> None:
    from moezoo.backbones.generate import Settings, generate, padded

    _, smora = runs
    parts = module.ModuleParts(smora.definition, smora.state["params"], smora.state["stats"])
    prompts = padded([list(b"reverse\nabc\n"), list(b"copy\nab\n")], pad=0)
    with jax.set_mesh(smora.setup.mesh):
        made = generate(parts, prompts.tokens_BT, Settings(new=3), mask_BT=prompts.mask_BT)
        model = module.merge(*parts)
        logits = model(prompts.tokens_BT, mask_BT=prompts.mask_BT).logits_BTV
    np.testing.assert_array_equal(made.tokens_BT[:, 0], logits[:, -1].argmax(-1))
    with pytest.raises(UserError, match="token 300"):
        generate(parts, [[300]], Settings(new=1))


@pytest.mark.slow
def test_a_run_answers_prompts_without_its_data(runs) -> None:
    from moezoo.backbones.generate import Settings, generate
    from moezoo.domains.text.generation import open_speaker
    from moezoo.domains.text.inference import complete, tokens_of

    _, smora = runs
    speaker = open_speaker(smora.directory)
    (answer,) = complete(speaker, ["reverse\nabc"], Settings(new=3))
    tokens = tokens_of(speaker, "reverse\nabc")
    assert tokens == [speaker.tokenizer.bos, *b"reverse\nabc\n"]
    parts = module.ModuleParts(smora.definition, smora.state["params"], smora.state["stats"])
    with jax.set_mesh(smora.setup.mesh):
        wanted = generate(parts, [tokens], Settings(new=3, stop=speaker.stop))
    ids = np.asarray(wanted.tokens_BT)[0, : int(wanted.lengths_B[0])]
    assert answer == speaker.tokenizer.decode(t for t in ids if t not in speaker.stop)


@pytest.mark.slow
def test_adapter_folders(runs, tmp_path: Path) -> None:
    from moezoo.backbones.generate import Settings
    from moezoo.domains.text.adapter import write_adapter, write_merged
    from moezoo.domains.text.data.tokenizer import ByteTokenizer
    from moezoo.domains.text.generation import open_speaker
    from moezoo.domains.text.inference import complete, tokens_of

    base, smora = runs
    said = write_adapter(smora.directory, tmp_path / "adapter")
    assert "7 layers in stacked form" in said
    decoder = module.merge(base.definition, base.state["params"], base.state["stats"])
    read = peft.read(tmp_path / "adapter", decoder)
    own = module.flatten(smora.state["params"])
    for path, factors in read.layers.items():
        np.testing.assert_array_equal(factors.down, own[f"{path}/update/down"])
        np.testing.assert_array_equal(factors.router["kernel"], own[f"{path}/update/router/kernel"])
    with pytest.raises(UserError, match="depend on tokens"):
        write_merged(smora.directory, tmp_path / "merged")
    with pytest.raises(UserError, match="no adapted layer"):
        write_adapter(base.directory, tmp_path / "none")
    assert "merged decoder" in write_merged(base.directory, tmp_path / "decoder")
    copy = hf.load(tmp_path / "decoder").parts.params
    jax.tree.map(np.testing.assert_array_equal, copy, base.state["params"])
    told = json.loads((tmp_path / "decoder" / "config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (257, 258), "those of the bytes"
    speaker = open_speaker(tmp_path / "decoder")
    assert tokens_of(speaker, "ab") == [257, *b"ab\n"] and speaker.stop == (258,), "as of the run"
    plain = speaker._replace(tokenizer=ByteTokenizer())
    answers = [complete(one, ["masu"], Settings(new=3)) for one in (speaker, plain)]
    assert answers[0] == answers[1]
    with pytest.raises(UserError, match="exists already"):
        write_merged(smora.directory, tmp_path / "decoder")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "decoder"}


@pytest.mark.slow
def test_tools_for_images_refuse_text(runs) -> None:
    from moezoo.deploy.produce import open_run

    with pytest.raises(
        UserError, match="a run on text, which has no single task to export: moezoo adapter"
    ):
        open_run(runs[1].directory, 4)


def test_a_base_has_its_data_in_the_same_place_and_its_errors_named(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(start.config_file, "exists", lambda name: name == "rooms/base")
    base = tiny.config("elsewhere", name="base")
    monkeypatch.setattr(start.config_file, "load", lambda name: base)
    monkeypatch.setattr(start.config_file, "find", lambda name, folders: Path(f"{name}.py"))
    trained: list[Any] = []

    def train(config: Any, console: Any, file: Any) -> None:
        trained.append(config)

    wanted = replace(tiny.config(str(tmp_path)), start_from="rooms/base")
    wanted = replace(wanted, data=replace(wanted.data, data_dir="here"))  # type: ignore[arg-type]
    start.with_start(wanted, QUIET, train)
    assert (trained[0].data.data_dir, trained[0].directory) == ("here", str(tmp_path))

    def fails(config, console, file):
        raise UserError("The disk is full.")

    with pytest.raises(UserError, match="starts from rooms/base, .* The disk is full. A run"):
        start.with_start(wanted, QUIET, fails)


def test_a_wrong_configuration_is_told_before_its_base_is_trained(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(start, "with_start", lambda *given: pytest.fail("too early"))
    wanted = config(tmp_path, SMORA, start_from="text/first", tasks=("depth",))
    with pytest.raises(UserError, match="depth"):
        loop.train(wanted, QUIET)
