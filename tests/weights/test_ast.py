"""AST in folders of Hugging Face models, without transformers: what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.backbones.ast import ASTConfig
from moezoo.domains.audio import pretrained
from moezoo.domains.audio.data import fbank
from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.domains.audio.pretrained import Spectrograms
from moezoo.domains.images.domain import DataConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.pretrained import Decoders
from moezoo.errors import UserError
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.train import start
from moezoo.train.config import UpcycleConfig
from moezoo.weights import ast
from moezoo.weights.ast import AST_NAMES
from moezoo.weights.names import to_theirs
from moezoo.weights.tensor_file import Planned, write

TINY = ASTConfig(
    frames=20, mel=8, patch=4, stride_time=3, stride_freq=2, width=8, depth=2, heads=2, hidden=12
)


def folder(path: Path, prefix: str = "", **changes: Any) -> Path:
    """A folder with random weights; `changes` are entries of its config.json."""
    rng = np.random.default_rng(0)
    ours = {p: rng.normal(size=s).astype(np.float32) for p, s in ast.shapes(TINY).items()}
    theirs = to_theirs(ours, AST_NAMES).arrays
    theirs = {prefix + name: np.ascontiguousarray(a) for name, a in theirs.items()}
    if prefix:
        theirs["classifier.dense.weight"] = np.zeros((3, 8), np.float32)
    path.mkdir()
    planned = {n: Planned(a.shape, a.dtype, lambda a=a: a) for n, a in theirs.items()}
    write(path / "model.safetensors", planned)
    values: dict[str, Any] = {name: getattr(TINY, own) for name, (own, _) in ast.FIELDS.items()}
    values |= {"model_type": ast.KIND, "layer_norm_eps": 1e-12}
    (path / "config.json").write_text(json.dumps(values | changes))
    return path


@pytest.mark.parametrize("prefix", ["", "audio_spectrogram_transformer."])
def test_a_folder_is_read_whole(prefix: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "ast", prefix, patch_size=[4, 4])
    assert ast.is_ast(made) and not ast.is_ast(tmp_path)
    assert not Decoders(TextDataConfig()).knows(made)
    assert ast.read_config(made) == TINY
    arrays = ast.load(made)
    assert {path: a.shape for path, a in arrays.items()} == ast.shapes(TINY)
    assert arrays["patch_embed/kernel"].shape == (4, 4, 1, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"hidden_act": "relu"}, "only 'gelu'"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"num_hidden_layers": 3}, "lacks blocks/2"),
        ({"num_hidden_layers": 1}, "does not ask for"),
        ({"max_length": 40}, "pos_embed of"),
        ({"model_type": "vit"}, "name another folder"),
        ({"num_mel_bins": 2}, "smaller than a patch"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "ast", **changes)
    with pytest.raises(UserError, match=words):
        ast.load(made)


def test_an_array_of_another_model(tmp_path: Path) -> None:
    made = folder(tmp_path / "ast", "other.")
    with pytest.raises(UserError, match=r"other\..* for which an AST has no place"):
        ast.load(made)


class Run:
    """What `check_fits` reads of a configuration."""

    name = "a_run"
    start_heads, start_without, upcycle = None, (), UpcycleConfig()
    data = AudioDataConfig(mel=8, rate=8000)

    def __init__(self, model: Any):
        self.model = model


def test_runs_begin_with_the_same_architecture_only(tmp_path: Path) -> None:
    made = folder(tmp_path / "ast")
    config: Any = Run(SoftMoAConfig(ast=TINY))
    start.check(made, config)
    start.check_fits(made, config)
    assert set(Spectrograms().arrays(made, config, {})) == set(ast.shapes(TINY))
    config = Run(SoftMoAConfig())
    with pytest.raises(UserError, match=r"model.ast.frames is 1024, but the model in .* has 20"):
        start.check_fits(made, config)
    images: Any = Run(VMoEConfig())
    images.data = DataConfig()
    with pytest.raises(UserError, match="an Audio Spectrogram Transformer, but a_run reads images"):
        start.check_fits(made, images)
    file = tmp_path / "vit.npz"
    file.touch()
    with pytest.raises(UserError, match="vit.npz' cannot be read as .npz"):
        start.check_fits(file, config)
    np.savez(file, **{"patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32)})
    with pytest.raises(UserError, match="vision transformer, but a_run reads audio"):
        start.check_fits(file, config)


def preprocessor(folder: Path, **values: Any) -> None:
    told = {"feature_extractor_type": "ASTFeatureExtractor", "num_mel_bins": 8}
    text = json.dumps(told | {"sampling_rate": 8000} | values)
    (folder / "preprocessor_config.json").write_text(text)


@pytest.mark.parametrize(
    ("values", "theirs"),
    [
        ({"mean": -6.8, "std": 5.5}, lambda logmel: (logmel + 6.8) / 11.0),
        ({"mean": 0.5, "std": 0.25, "do_normalize": True}, lambda logmel: (logmel - 0.5) / 0.5),
        ({"mean": -6.8, "std": 5.5, "do_normalize": False}, lambda logmel: logmel),
        ({}, fbank.normalise),
    ],
)
def test_its_own_preprocessing_is_read(values: dict, theirs: Any, tmp_path: Path) -> None:
    """Tokens of features normalised as here are those of features as it normalises them."""
    made = folder(tmp_path / "ast")
    logmel = np.random.default_rng(1).normal(-5, 4, (4, 4, 1))
    before = ast.load(made)
    preprocessor(made, **values)
    after = ast.load(made, pretrained.OURS)
    tokens = [
        np.einsum("ftc,ftcd->d", seen, arrays["patch_embed/kernel"]) + arrays["patch_embed/bias"]
        for arrays, seen in ((after, fbank.normalise(logmel)), (before, theirs(logmel)))
    ]
    np.testing.assert_allclose(*tokens, rtol=1e-5, atol=1e-5)
    assert all((after[p] == a).all() for p, a in before.items() if "patch_embed" not in p)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sampling_rate": 16_000}, "has sampling_rate 16000, .*: add --data.rate 16000"),
        ({"num_mel_bins": 128}, "has num_mel_bins 128, .*: add --data.mel 128"),
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, "feature_extractor_type is"),
        ({"mean": [1.0]}, "mean is .1.0., it must be a number"),
        ({"std": 0}, "std is 0, it must be from"),
        ({"std": float("nan")}, "std is nan"),
        ({"do_normalize": "no"}, "do_normalize is 'no', it must be true or false"),
        ({"do_normalize": None}, "do_normalize is None, it must be true or false"),
        ({"window": "hamming"}, "window is not known"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is not known"),
    ],
)
def test_preprocessing_that_cannot_be_had(values: dict, words: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "ast")
    preprocessor(made, **values)
    with pytest.raises(UserError, match=words):
        start.check_fits(made, Run(SoftMoAConfig(ast=TINY)))  # type: ignore[arg-type]
