"""Adapter folders of runs: what they say of the run's system."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from flax import nnx

from moezoo.domains.text import adapter
from moezoo.models.smora.model import SMoRAConfig
from tests.weights.libraries import CONFIG


def test_a_stacked_folder_says_how_its_routers_weigh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMoRAConfig(decoder=CONFIG, ranks=4, active=2, gate="softmax")
    model = config.build({"lm": 20}, (1, 1), nnx.Rngs(0))
    run = SimpleNamespace(model=config, start_from="runs/base")
    monkeypatch.setattr(adapter, "language_model", lambda run: (model, None))
    monkeypatch.setattr(adapter, "read_config", lambda run: run)
    said = adapter.write_adapter(run, tmp_path / "out")  # type: ignore[arg-type]
    assert "in stacked form" in said
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["system"]["name"] == "SMoRAConfig" and told["system"]["gate"] == "softmax"
    assert told["base_model_name_or_path"] == "runs/base"
