"""A decoder whose tasks decide what is added, merged for one of them: a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.text import adapter
from moezoo.domains.text.domain import TextDataConfig
from moezoo.errors import UserError
from moezoo.models.polytropon.model import PolyConfig
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted
from moezoo.weights import hf
from tests.models.tiny import filled

DECODER = DecoderConfig(vocabulary=259, width=8, depth=1, heads=2, groups=1, hidden=6, length=16)
DATA = TextDataConfig(name="instructions", length=16, only=("sort", "double"))


def test_the_merged_decoder_of_a_task_is_that_task_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PolyConfig(decoder=DECODER, tasks=2, skills=2, rank=2, heads=2, pace=1.0)
    parts = filled(lambda: config.build({"lm": 259}, (1, 16), nnx.Rngs(0)))

    def trained(run: Path) -> tuple[object, TextDataConfig]:
        return module.merge(parts.definition, parts.params, parts.stats), DATA

    monkeypatch.setattr(adapter, "language_model", trained)
    run, out = tmp_path / "run", tmp_path / "out"
    for task, message in ((None, "needs a task"), ("sorting", "sort")):
        with pytest.raises(UserError, match=message):
            adapter.write_merged(run, out, task)
        assert not out.exists()
    adapter.write_merged(run, out, "sort")
    got = module.flatten(hf.load(out).parts.params)
    # Tasks are numbered in the order of their names.
    model: Any = trained(run)[0]
    for path, layer in surgery.find(model, Adapted).items():
        kernel = np.asarray(layer.base.kernel.get_value())
        first, second = (layer.update.delta(layer.update.constant_gates(t)) for t in (0, 1))
        np.testing.assert_allclose(got[f"{path}/kernel"], kernel + second, rtol=1e-4, atol=1e-5)
        assert np.abs(first - second).max() > 1e-4
