"""The plan of a training step for a pod: what is counted, and the command's manners."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.planning import command as plan_pod
from moezoo.planning import step as pod_step
from moezoo.planning.collectives import even_least_bytes
from moezoo.train import chips
from moezoo.train import config as configs
from moezoo.train.config import MeshConfig, TrainConfig
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]


def config(**sizes: int) -> configs.Config:
    made = tiny.config("unused", train=TrainConfig(steps=4, batch=16), tasks=("semseg", "depth"))
    return replace(
        made,
        mesh=MeshConfig(**sizes),
        data=replace(made.data, resolution=(16, 16)),
        model=replace(made.model, dispatch="all_to_all"),
    )


@pytest.fixture(scope="module")
def row() -> pod_step.StepRow:
    return pod_step.measure(config(data=2, fsdp=2, expert=2), "here", jax.devices()[:8])


@pytest.mark.slow
def test_a_step_for_other_devices_is_counted(row: pod_step.StepRow) -> None:
    assert row.chips == 8 and row.mesh == "data 2 x fsdp 2 x expert 2" and row.moe_layers == 1
    assert row.chip_bytes is None and row.fits is None
    assert row.memory_bytes > row.state_bytes > 0 and row.flops > 0 and row.weight_bytes > 0
    # 16 images, two tasks' rows each, 17 tokens of 16 features in float32, on 8 devices.
    tokens = 16 * 2 * 17 // 8
    least = 2 * even_least_bytes(tokens, 2, 4, 2, 4 * 16)
    np.testing.assert_allclose(row.least_token_bytes, least)
    assert row.token_bytes >= least and row.token_ratio == row.token_bytes / least
    assert {"all-to-all", "all-reduce"} <= row.collectives.keys()


@pytest.mark.slow
def test_the_state_is_what_training_would_hold(row: pod_step.StepRow) -> None:
    """Parameters with two moments of Adam each, on one device nothing is split."""
    from moezoo.train import mesh as meshes

    whole = config(data=1)
    mesh = meshes.make_mesh(whole.mesh, jax.devices()[:1])
    lowered = pod_step.train_step(whole, mesh)
    held = pod_step.own_bytes(lowered.state, lowered.shardings)
    parameters = module.count(lowered.state["params"])
    assert parameters == row.parameters
    assert held >= 12 * parameters > row.state_bytes


@pytest.mark.slow
def test_lines_and_verdicts(row: pod_step.StepRow) -> None:
    roomy, tight = (row._replace(chip_bytes=b, fits=f) for b, f in ((95e9, True), (1.0, False)))
    assert "it fits" in list(plan_pod.lines(roomy)) and "of 95 GB" in "\n".join(
        plan_pod.lines(roomy)
    )
    assert "it DOES NOT FIT" in list(plan_pod.lines(tight))
    known = chips.of_topology("v5p:8x8x8")
    assert known is not None and known.memory == 95e9 and chips.of_topology("v9:2") is None
    text = "\n".join(plan_pod.lines(row))
    assert "all-to-all         expert" in text and "of 4 experts each has" in text
    assert "at least" not in text, "nothing is known about these chips"


@pytest.mark.slow
def test_the_file_holds_the_configuration(row: pod_step.StepRow, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(plan_pod, "versions", lambda *names: {})
    plan_pod.write(tmp_path / "plan.json", config(), [row])
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["config"]["train"]["batch"] == 16 and result["row"]["chips"] == 8
    assert {"kind", "axes", "ici_bytes"} <= result["row"]["traffic"][0].keys()
    assert result["row"]["bound"]["seconds"] is None


@pytest.mark.slow
def test_the_command_ranks_meshes_of_gpus(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(plan_pod.configs, "load", lambda name, words: config())
    files = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    assert plan_pod.run(["any", "--topology", "h100:8", "--search", *files]) == 0
    said = capsys.readouterr().out
    assert "h100:8, train, batch 16:" in said and "data 2 x fsdp 2 x expert 2" in said
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) >= 8 and rows[0]["bound"]["mfu"] > 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5p:2x2x2"], "Name a configuration first"),
        (["rooms/m3vit_tiny"], "--topology is missing"),
        (["rooms/m3vit_tiny", "--topology"], "--topology needs a value"),
        (["rooms/m3vit_tiny", "--topology=x", "--json=/proc/none/a.json"], "/proc/none"),
        (["rooms/m3vit_tiny", "--topology", "x", "--json", "/proc/none/a.json"], "/proc/none"),
        (["rooms/m3vit_tinny", "--topology", "x"], "did you mean rooms/m3vit_tiny"),
        (["rooms/m3vit_tiny", "--topology", "x", "--step", "tran"], "did you mean train"),
        (["rooms/m3vit_tiny", "--topology", "x", "--source", "shape"], "did you mean shapes"),
        (["rooms/m3vit_tiny", "--topology", "h100:8", "--source", "compiled"], "leave it out"),
    ],
)
def test_bad_arguments(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_pod.run(words)


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[pod\]'"):
        plan_pod.run(["rooms/m3vit_tiny", "--topology", "v5p:2x2x2"])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install 'moezoo[pod]'")
@pytest.mark.claims
def test_the_command_compiles_for_a_pod(tmp_path: Path) -> None:
    words = ["rooms/m3vit_tiny", "--topology", "v5p:2x2x2", "--mesh.fsdp", "2"]
    words += ["--mesh.expert", "2", "--model.dispatch", "all_to_all"]
    words += ["--json", str(tmp_path / "plan.json")]
    command = [sys.executable, "tools/plan.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "it fits" in done.stdout and "dispatch ragged (tpu)" in done.stderr
    row = json.loads((tmp_path / "plan.json").read_text())["row"]
    assert row["fits"] and row["moe_layers"] == 1 and row["token_ratio"] >= 1.0
