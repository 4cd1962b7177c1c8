"""Gradients of prompts against those of the base's own matrices, and examples in groups by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.cli import library as command
from moezoo.domains.text.data.jsonl import InstructionFile
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.domains.text.example_groups import adapted_forms, split_examples
from moezoo.domains.text.gradients import PROJECTED, gradient_features
from moezoo.domains.text.library import BaseDecoder
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted
from moezoo.ops.prototypes import projected
from moezoo.weights.library import LayerForm
from moezoo.weights.library_bank import attach_fresh
from tests.weights.libraries import decoder

LAYERS = {"layers/0/attn/q": LayerForm(8, 8, 2, 0.5), "layers/0/mlp/down": LayerForm(6, 8, 2, 0.5)}
ROWS = [[1, 2, 3, 4], [5, 6], [7]]


def test_features_are_those_of_the_matrices_gradients() -> None:
    """At second factors of 0 the gradient of B is s A^t dL/dW; prompts are padded, this is not."""
    model, fresh = decoder(), decoder()
    attach_fresh(fresh, LAYERS)
    downs = {
        p: np.asarray(m.update.down.get_value()) for p, m in surgery.find(fresh, Adapted).items()
    }
    parts = module.split(model)

    def loss(params: Any, row: list[int]) -> Any:
        whole = module.merge(parts.definition, params, parts.stats)
        logs = jax.nn.log_softmax(whole(jnp.asarray([row])).logits_BTV[0, :-1])
        return -jnp.mean(logs[jnp.arange(len(row) - 1), jnp.asarray(row[1:])])

    found = gradient_features(model, LAYERS, ROWS)
    assert found.shape == (3, PROJECTED)
    for row, feature in zip(ROWS[:2], found, strict=False):
        grads = module.flatten(jax.grad(loss)(parts.params, row))
        own = [0.5 * downs[p].T @ np.asarray(grads[f"{p}/kernel"]) for p in sorted(LAYERS)]
        flat = jnp.asarray(np.concatenate([g.ravel() for g in own]))
        wanted = projected(flat, jax.random.key(0), PROJECTED)
        np.testing.assert_allclose(feature, wanted, rtol=1e-4, atol=1e-5)
    assert not found[2].any()  # a single token predicts nothing
    assert not surgery.find(model, Adapted)


def base() -> BaseDecoder:
    """A decoder of bytes, for texts, whose template is the text itself."""
    from dataclasses import replace

    from flax import nnx

    from moezoo.domains.text.data.example import plain
    from tests.weights.libraries import CONFIG

    made = replace(CONFIG, vocabulary=ByteTokenizer().vocabulary, length=64).build(nnx.Rngs(0))
    return BaseDecoder("bytes", made, ByteTokenizer(), plain, "")


def test_examples_are_in_groups_of_alike_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = [{"instruction": "aaaa" + "a" * (i % 2), "output": str(i)} for i in range(4)]
    lines += [{"inputs": "zzzz" + "z" * (i % 2), "targets": str(i), "task": "z"} for i in range(3)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = base()
    assert set(adapted_forms(made, 3)) and all(
        form.rank == 3 and path.startswith("layers/")
        for path, form in adapted_forms(made, 3).items()
    )
    monkeypatch.setattr("moezoo.domains.text.library.open_base", lambda folder: made)
    out = tmp_path / "parts"
    command.main(["split", "x", str(file), "--clusters", "2", "--out", str(out)], "moezoo library")
    assert "Wrote 7 examples" in capsys.readouterr().out
    groups = [InstructionFile(path) for path in sorted(out.iterdir())]
    first = [{group[i].turns[0].content[0] for i in range(len(group))} for group in groups]
    assert sorted(map(sorted, first)) == [["a"], ["z"]]
    (z,) = [group for group in groups if group[0].task == "z"]
    assert sorted(z[i].turns[1].content for i in range(3)) == ["0", "1", "2"]
    for wanted, said in (
        ((1, 2, tmp_path / "n"), "split nothing"),
        ((2, 0, tmp_path / "n"), "at least 1"),
        ((2, 2, out), "exists already"),
        ((6, 2, tmp_path / "n"), "4 different prompts"),
    ):
        with pytest.raises(UserError, match=said):
            split_examples(made, file, *wanted)
    assert not (tmp_path / "n").exists()
