"""Pretrained vision transformers for a configured model: what fits, and the options that help."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.pretrained import VisionTransformers
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.pretrained import Decoders
from moezoo.errors import UserError
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.train import config_file, start
from moezoo.train.overrides import parse
from tests.train import tiny
from tests.weights import vit_files
from tests.weights.vit_files import VIT_NAMES, folder, timm, transformers

FITS: dict[str, Any] = {"width": 12, "depth": 3, "heads": 3, "patch": 4, "mlp_ratio": 2.0}


def config(model: Any = None, **changes: Any) -> Any:
    model = model or tiny.model(**FITS, expert_ratio=2.0)
    made = tiny.config("unused", model=model, data=DataConfig(resolution=(16, 16)))
    return replace(made, **changes)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_files.write(tmp_path_factory.mktemp("vit") / "vit.safetensors", timm())


def refusal(path: Path, given: Any) -> str:
    with pytest.raises(UserError) as raised:
        start.check_fits(path, given)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def corrected(sentence: str, given: Any) -> Any:
    """The configuration with the options that a refusal prints."""
    command = sentence.partition(": add ")[2].partition(";")[0].rstrip(".")
    return parse(given, shlex.split(command))


def test_a_model_of_its_sizes(file: Path) -> None:
    start.check_fits(file, config(start_heads=3))


@pytest.mark.parametrize(
    ("model", "changes", "options"),
    [
        (tiny.model(**FITS, expert_ratio=2.0), {}, "--start_heads 1 --model.heads 1"),
        (tiny.model(**FITS, expert_ratio=2.0), {"start_heads": 4}, "--model.heads 4"),
        (
            tiny.model(**FITS, expert_ratio=2.0, stem="conv"),
            {"start_heads": 3},
            "--model.stem patch",
        ),
        (tiny.model(**FITS), {"start_heads": 3}, "--model.expert_ratio 2.0"),
        (
            tiny.model(stem="conv", patch=2),
            {"start_heads": 3, "data": DataConfig(resolution=(18, 10))},
            "--model.width 12 --model.depth 3 --model.stem patch --model.patch 4 --model.heads 3 "
            "--model.mlp_ratio 2.0 --model.expert_ratio 2.0 --data.resolution 16 8",
        ),
    ],
)
def test_the_options_that_it_needs(model, changes, options: str, file: Path) -> None:
    given = config(model, **changes)
    sentence = refusal(file, given)
    named = {word for word in options.split() if word.startswith("--")}
    assert named <= set(sentence.split()), sentence
    for part in options.split(" --"):
        assert part in sentence, sentence
    start.check_fits(file, corrected(sentence, given))


def test_models_that_cannot_take_all_of_it_need_to_be_told(file: Path) -> None:
    given = config(ModSquadConfig(**FITS, top_k=2, experts=4, head_channels=4), start_heads=3)
    sentence = refusal(file, given)
    assert "--start_without" in sentence and "attn" in sentence
    start.check_fits(file, corrected(sentence, given))


def test_registers_can_be_taken_or_left_out(file: Path, tmp_path: Path) -> None:
    arrays = timm() | {"reg_token": np.ones((1, 4, 12), "f")}
    path = vit_files.write(tmp_path / "vit.safetensors", arrays)
    given = config(start_heads=3)
    sentence = refusal(path, given)
    assert "no place for its register_tokens of [1, 4, 12]: add --model.registers 4" in sentence
    start.check_fits(path, corrected(sentence, given))
    start.check_fits(path, config(start_heads=3, start_without=("register_tokens",)))


def test_a_classifier(file: Path) -> None:
    model = VMoEConfig(**{**FITS}, experts=2, moe_every=2, moe_last=1)
    data = DataConfig(resolution=(16, 16))
    start.check_fits(file, config(model, tasks=("scene",), data=data, start_heads=3))


def test_files_that_lack_something_cannot_be_helped(tmp_path: Path) -> None:
    arrays = timm()
    del arrays["blocks.1.norm1.bias"]
    path = vit_files.write(tmp_path / "vit.safetensors", arrays)
    sentence = refusal(path, config(start_heads=3))
    assert "it lacks blocks/1/norm1/bias" in sentence and "Use another file" in sentence


def test_what_was_left_behind_is_said(file: Path) -> None:
    told = VisionTransformers().left_behind(file, config(start_without=("reg_token",)))
    assert "ignored: head" in told and "left out as asked: reg_token" in told
    assert "their normalisation of pixels is not told" in told


def test_heads_that_are_typed_are_those_of_the_file(file: Path, tmp_path: Path) -> None:
    name = "rooms/m3vit_tiny"
    typed = config_file.load(name, ["--start_from", str(file), "--model.heads", "6"])
    assert typed.start_heads == 6
    assert config_file.load(name, ["--model.heads=6", f"--start-from={file}"]).start_heads == 6
    for first in (str(tmp_path), "rooms/vit_dense_tiny"):  # runs know their own heads
        typed = config_file.load(name, ["--model.heads", "6", "--start_from", first])
        assert typed.start_heads is None
    assert config_file.load(name, ["--start_from", str(file)]).start_heads is None
    assert config_file.load(name, ["--model.heads", "6"]).start_heads is None


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "resnet", "bert"])
def test_folders_of_transformers_are_called_what_they_are(kind: str, tmp_path: Path) -> None:
    told = {"model_type": kind, "hidden_size": 12, "num_attention_heads": 3}
    made = folder(tmp_path / "m", transformers(timm(), VIT_NAMES), told)
    start.check(made, config())
    assert not Decoders(TextDataConfig()).knows(made)
    if kind in ("resnet", "bert"):
        assert f"whose config.json has model_type '{kind}'" in refusal(made, config())
    else:
        start.check_fits(made, config())


def test_options_for_vision_transformers_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sentence = refusal(run, config(start_without=("head",)))
    assert "start_heads and start_without are for pretrained networks of others" in sentence
