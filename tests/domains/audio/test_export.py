"""Runs on clips as exports: the full model's logits, and folders that read clips without moezoo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moezoo.backbones.ast import ASTConfig
from moezoo.deploy import certificate, export
from moezoo.deploy.manifest import Facts
from moezoo.deploy.produce import check_removable
from moezoo.deploy.runtime.load import ExportError, Predictor, load_export
from moezoo.deploy.task_path import task_path
from moezoo.domains.audio import runtime as sound
from moezoo.domains.audio.data import fbank
from moezoo.domains.audio.data.read import read
from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.domains.audio.export import ClipClassifier, ClipExports, frames_of, spectrograms
from moezoo.errors import UserError
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.nn import module
from tests.domains.audio.data.waves import wav_bytes
from tests.models.tiny import filled
from tests.tasks.tables import build
from tests.train import tiny

FRAMES, BANDS, RATE = 20, 12, 8_000
SIZES: dict[str, int] = {"frames": FRAMES, "mel": BANDS, "patch": 4, "stride_time": 4}
SIZES |= {"stride_freq": 4, "width": 8, "depth": 2, "heads": 2, "hidden": 16}
SMALL = SoftMoAConfig(ast=ASTConfig(**SIZES), experts=3, bottleneck=4)
TASKS = {"event": 5, "room": 3}
NAMES = ("dry", "small", "large")
ROOM = build("room", classes=3, names=NAMES)
ABOUT = Facts(labels=NAMES)
READS = spectrograms((FRAMES, BANDS), RATE, "average")
ALONE = """
import runpy, sys
for name in ("moezoo", "flax", "soundfile"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], None, "__main__")
"""
SAMPLES = (1800, 900, 300)  # of three clips; the model reads 20 frames, 1720 samples


def waves() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, size=n).astype(np.float32) for n in SAMPLES]


def clips() -> tuple[np.ndarray, np.ndarray]:
    """Features and true frames, as training has them."""
    made = [fbank.features(wave, FRAMES, BANDS, RATE) for wave in waves()]
    return np.stack([audio for audio, _ in made]), np.array([n for _, n in made], np.int32)


def built(config: SoftMoAConfig) -> Any:
    return module.merge(*filled(lambda: config.build(TASKS, (FRAMES, BANDS), nnx.Rngs(0))))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4))
def test_the_end_of_a_clip_is_seen(lengths: list[int], bands: int) -> None:
    rng = np.random.default_rng(sum(lengths))
    logmel = [rng.normal(size=(n, bands)).astype(np.float32) for n in lengths]
    for one in logmel:
        one[: len(one) // 2, 0] = 0.0  # silence in one band, or in the only one, is no end
    audio = np.stack([fbank.normalise(fbank.padded(one, 9)) for one in logmel])
    np.testing.assert_array_equal(frames_of(jnp.asarray(audio)), lengths)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"update": "dense_moa", "gates": "task", "sharing": "one"},
        pytest.param({"padding": "seen"}, marks=pytest.mark.slow),
        pytest.param({"sharing": "one"}, marks=pytest.mark.slow),
        pytest.param({"update": "linear"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_path_gives_the_full_models_logits(changes: dict[str, Any]) -> None:
    model = built(replace(SMALL, **changes))
    audio, frames = clips()
    path = task_path(ClipClassifier(model), "room", READS)
    wanted = jax.jit(lambda x, n: model(x, frames_B=n).predictions["room"])(audio, frames)
    np.testing.assert_allclose(path(audio).logits, wanted, rtol=1e-5, atol=1e-5)
    assert np.ptp(wanted, axis=0).min() > 1e-3, "clips differ"
    assert path.exact and not any("event" in name for name in path.weights)
    apart = certificate.apart(ClipClassifier(model), path, audio)
    assert apart["largest_difference"] <= 1e-5 and apart["clips"] == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = task_path(ClipClassifier(built(SMALL)), "room", READS)
    content = export.Content(path, ROOM, ABOUT, {"name": "test"}, {}, clips()[0][:2])
    return export.write(tmp_path_factory.mktemp("export") / "room", content)


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return load_export(folder)


def test_the_export_reads_waveforms(folder: Path, predictor: Predictor) -> None:
    assert predictor.self_check() <= 1e-5
    audio, _ = clips()
    np.testing.assert_array_equal(predictor.prepare(waves()), audio)
    outputs = predictor(waves())
    assert outputs["logits"].shape == (3, 3) and outputs["violations"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(predictor(audio)["logits"], outputs["logits"], atol=1e-6)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"]["audio"]["shape"] == ["b", FRAMES, BANDS]
    steps = [step["step"] for step in manifest["preprocess"]]
    assert steps == ["mono", "resample", "log_mel", "pad", "normalise"]
    assert manifest["task"]["labels"] == list(NAMES)
    programs = {"predict.py", "drawing.py", "sound.py", "fbank.py", "decode.py", "wav.py"}
    assert programs < set(manifest["files"])
    assert "photo.py" not in manifest["files"], "nothing that clips have no use for"


def test_the_folder_reads_clips_without_moezoo(folder: Path, tmp_path: Path) -> None:
    """A stereo file of another rate, by a fresh interpreter that has only the folder."""
    stereo = np.repeat(waves()[0][:, None], 2, axis=1)
    soundfile.write(tmp_path / "clip.wav", stereo, 2 * RATE, subtype="FLOAT")
    block = tmp_path / "alone.py"
    lines = "import runpy, sys\nfor name in ('moezoo', 'flax', 'soundfile'): sys.modules[name]=None"
    block.write_text(
        f"{lines}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], None, '__main__')"
    )
    words = [sys.executable, "-I", block, folder / "predict.py", "clip.wav", "--out", "picture.png"]
    done = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "room of clip.wav" in done.stdout, done.stderr
    shown = np.asarray(Image.open(tmp_path / "picture.png"))
    assert shown.shape == (4 * BANDS + 24, 4 * FRAMES, 3) and shown[: 4 * BANDS].std() > 10


STEPS = [{"step": "mono", "how": "average"}, {"step": "resample", "rate": RATE}]
STEPS += [{"step": "pad", "frames": FRAMES}]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT"])
@pytest.mark.parametrize("how", ["average", "first"])
def test_files_are_read_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtype: str, how: str
) -> None:
    file = tmp_path / "a.wav"
    both = np.random.default_rng(0).uniform(-0.9, 0.9, (500, 2))
    soundfile.write(file, both, 2 * RATE, subtype=subtype)
    steps = [{"step": "mono", "how": how}, *STEPS[1:]]
    mono = (lambda wave: wave[:, 0]) if how == "first" else (lambda wave: wave.mean(axis=1))
    wanted = read(file, RATE, mono)
    for installed in (soundfile, None):
        monkeypatch.setitem(sys.modules, "soundfile", installed)
        np.testing.assert_array_equal(sound.read(file, steps), wanted)


def test_of_a_long_file_only_what_the_model_reads_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.flac"
    long = np.random.default_rng(0).uniform(-0.9, 0.9, 10 * RATE)
    soundfile.write(file, long, RATE)
    found = sound.read(file, STEPS)
    assert len(found) == fbank.samples_of(FRAMES, RATE)
    features = (FRAMES, BANDS)
    whole = sound.prepare([sound.read(file, STEPS[:2])], features, STEPS)
    np.testing.assert_array_equal(sound.prepare([found], features, STEPS), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 268_435_399}, "asks for 268435399 samples per second"),
        ({"rate": "x"}, "asks for x samples"),
        ({"frames": -1}, "keeps -1 frames"),
        ({"how": "last"}, "mixes by 'last'"),
    ],
)
def test_steps_without_sense_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(9_000), RATE)
    steps = [{k: changes.get(k, v) for k, v in step.items()} for step in STEPS]
    with pytest.raises(ExportError, match=message):
        sound.read(tmp_path / "a.wav", steps)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav_bytes(b"", told=0, size=0), "has no samples"),  # was an UnboundLocalError of SciPy
        (wav_bytes(b"12345678", told=0, size=100), "is cut off"),
        (wav_bytes(np.full(900, 9e3, "<f4").tobytes(), 3, 32), "where 1 is full scale"),
        (wav_bytes(np.full(900, np.inf, "<f4").tobytes(), 3, 32), "not finite"),
        (wav_bytes(b"12345678", rate=1), "has 1 samples per second"),
        (wav_bytes(b"12345678", code=0x7777), "cannot be read|install soundfile"),
    ],
)
@pytest.mark.parametrize("installed", [soundfile, None])
def test_damaged_files_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: Any,
    content: bytes,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", installed)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ExportError, match=rf"a.wav' .*({message})"):
        sound.read(tmp_path / "a.wav", STEPS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, FRAMES, BANDS)), "Features must be float32"),
        (np.zeros((1, FRAMES, BANDS + 1), np.float32), "Features must be float32"),
        (np.zeros((0, FRAMES, BANDS), np.float32), "Features must be float32"),
        ([], "no clip"),
        ([np.zeros(10, np.float32)], "10 samples is too short"),
        ([np.full(900, np.nan, np.float32)], "not finite"),
        ([np.full(900, 2e4, np.float32)], "samples up to 20000 where 1 is full scale"),
        ([np.zeros((900, 2), np.float32)], "must be a waveform"),
        ([np.zeros(900, np.int16)], "must be a waveform"),
    ],
)
def test_other_clips_are_refused(predictor: Predictor, given: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        predictor(given)


@pytest.mark.parametrize("installed", [soundfile, None])
def test_files_that_are_no_sound_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Any
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", installed)
    (tmp_path / "text.wav").write_text("no sound")
    os.mkfifo(tmp_path / "pipe.wav")
    said = "cannot be read as" if installed else "is no WAV file: for FLAC, .* install soundfile"
    for name, words in (
        ("text.wav", said),
        ("missing.wav", "is missing"),
        ("pipe.wav", "is a named pipe"),
        (".", "is a folder"),
    ):
        with pytest.raises(ExportError, match=words):
            sound.read(tmp_path / name, STEPS)
    with pytest.raises(ExportError, match="0 steps 'resample'"):
        sound.prepare([np.zeros(900, np.float32)], (FRAMES, BANDS), STEPS[:1])
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    with pytest.raises(ExportError, match="has no samples"):
        sound.read(tmp_path / "empty.wav", STEPS)


def test_a_missing_part_of_the_folder_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "fbank.py").unlink()
    with pytest.raises(ExportError, match="fbank.py is missing"):
        load_export(tmp_path / "copy")


def test_channels_are_mixed_as_the_data_set_does() -> None:
    for data, how in (
        (AudioDataConfig(), "average"),
        (AudioDataConfig(name="urbansound8k"), "first"),
    ):
        made = ClipExports(replace(tiny.config("runs"), data=data)).input
        assert made.preprocess[:2] == (
            {"step": "mono", "how": how},
            {"step": "resample", "rate": data.rate},
        )


def test_fewer_experts_are_refused(tmp_path: Path) -> None:
    clips = replace(tiny.config(tmp_path), data=AudioDataConfig(), model=SMALL)
    for update, why in [("soft_moa", "its mixtures ask all of them"), ("linear", "it has none")]:
        with pytest.raises(UserError, match=f"because {why}: export the task as it is"):
            check_removable(replace(clips, model=replace(SMALL, update=update)))
