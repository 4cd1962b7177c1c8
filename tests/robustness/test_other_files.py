"""Damaged files for ONNX Runtime in a folder: refused in words, or right, and never a crash unseen.

A child process checks them one after the other, because the runtime is native code.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import export, onnx_file
from moezoo.deploy.export import Content
from moezoo.deploy.manifest import Facts
from moezoo.deploy.task_path import task_path
from moezoo.domains.images.export import photos
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module
from tests.models.tiny import filled
from tests.tasks.tables import build

SIZE, CASES = (8, 8), 60
CHILD = """
import json, sys
from pathlib import Path
from moezoo.deploy.runtime import folder as files, other_forms
from moezoo.schema_check import FormatFault
place, cases = Path(sys.argv[1]), Path(sys.argv[2])
manifest = json.loads((place / "manifest.json").read_text())
golden = files.read_tensors(place / "golden.safetensors")
for case in sorted(cases.iterdir()):
    (place / "model.onnx").write_bytes(case.read_bytes())
    try:
        said = other_forms.check(place, manifest, golden)
        print(json.dumps(["right", said]), flush=True)
    except FormatFault as error:
        print(json.dumps(["refused", str(error)]), flush=True)
"""


@pytest.mark.slow
def test_damaged_onnx_files(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    config = ViTDenseConfig(width=8, depth=1, heads=2, patch=4, head_channels=4)
    made = module.merge(*filled(lambda: config.build({"semseg": 3}, SIZE, nnx.Rngs(0))))
    path, task = task_path(made, "semseg", photos(SIZE)), build("semseg", classes=3)
    given = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    content = Content(path, task, Facts(), {}, {}, given)
    folder = export.write(
        tmp_path / "made",
        content,
        more=lambda place: {"formats": {"onnx": onnx_file.write(place, path, task, given)}},
    )
    whole, cases = (folder / "model.onnx").read_bytes(), tmp_path / "cases"
    cases.mkdir()
    (cases / "000").write_bytes(whole)
    for number in range(1, CASES + 1):
        (cases / f"{number:03}").write_bytes(damaged(whole, random.Random(number)))
    words = [sys.executable, "-c", CHILD, str(folder), str(cases)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(said) == CASES + 1, f"case {len(said)} ended the process: {done.stderr[-300:]}"
    assert said[0][0] == "right"
    refused = [sentence for outcome, sentence in said if outcome == "refused"]
    assert len(refused) > CASES / 4
    assert all("\n" not in sentence and len(sentence) < 500 for sentence in refused)


def damaged(whole: bytes, random: random.Random) -> bytes:
    """A place of a file changed: bits, a piece gone, a piece twice, an end too soon."""
    at, size = random.randrange(len(whole)), random.randrange(1, 64)
    piece = whole[at : at + size]
    return random.choice(
        (
            whole[:at] + bytes([whole[at] ^ (1 << random.randrange(8))]) + whole[at + 1 :],
            whole[:at] + whole[at + size :],
            whole[:at] + piece + whole[at:],
            whole[:at],
            whole[:at] + random.randbytes(size) + whole[at + size :],
        )
    )
