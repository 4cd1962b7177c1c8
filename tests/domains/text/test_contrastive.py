"""Contrastive training of embedding experts: its loss and batches by hand, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.cli import library as command
from moezoo.domains.text.contrastive import (
    ContrastiveOptions,
    adapted,
    batch_loss,
    batches,
    check,
    info_nce,
    trained,
)
from moezoo.domains.text.library import BaseDecoder, embeddings, member_of_peft, prompt_tokens
from moezoo.domains.text.retriever import KnownQuery, embedded_by, mean_gain
from moezoo.errors import UserError
from moezoo.nn import module

DOCUMENTS = ["a", "b", "c", "d", "e", "a b", "b c", "c d", "d e", "e a", "a c", "b d", "c e"]
QUERIES = [KnownQuery(" ".join("abcde"[(i + j) % 5] for j in range(3)), (i,)) for i in range(5)]
QUERIES += [KnownQuery("a a", (5, 9)), KnownQuery("b b", (6, 11)), KnownQuery("c c", (7, 12))]
OPTIONS = ContrastiveOptions(rank=2, alpha=4, steps=40, batch=8, lr=0.03, temperature=0.05, seed=0)


def test_the_loss_is_its_equation() -> None:
    rng = np.random.default_rng(0)
    likeness, also = rng.normal(size=(3, 3)), np.zeros((3, 3), bool)
    also[0, 2] = True  # query 0 has document 2 as an answer, too: it is no negative
    wanted = []
    for i in range(3):
        kept = [j for j in range(3) if not also[i, j]]
        scores = np.exp(likeness[i] / 0.1)
        wanted.append(-np.log(scores[i] / scores[kept].sum()))
    found = info_nce(jnp.asarray(likeness), jnp.asarray(also), 0.1)
    np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-5)


def test_batches_have_a_relevant_document_each_and_every_query_in_turn() -> None:
    rows = [[i + 3] for i in range(len(QUERIES))]
    index = np.eye(len(DOCUMENTS), dtype=np.float32)
    made = list(batches(QUERIES, rows, index, replace(OPTIONS, batch=4, steps=4)))
    seen = [[int(t) - 3 for t in batch.tokens_BT[:, 0]] for batch in made]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(8))
    for numbers, batch in zip(seen, made, strict=True):
        own = batch.documents_BD.argmax(1)
        for i, number in enumerate(numbers):
            assert own[i] in QUERIES[number].relevant
            also = [j != i and own[j] in QUERIES[number].relevant for j in range(4)]
            assert batch.also_BB[i].tolist() == also
        assert batch.mask_BT.sum(1).tolist() == [1] * 4


@pytest.mark.slow
def test_a_member_learns_to_search_and_is_read_back(
    base: BaseDecoder, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = embedded_by(base, DOCUMENTS)
    before, losses = mean_gain(base, QUERIES, index), []
    arrays = {p: np.asarray(a) for p, a in module.flatten(module.split(base.model).params).items()}
    # Fresh, the adapter adds nothing: by hand the loss of the base's own embeddings.
    rows = [prompt_tokens(base, query.text) for query in QUERIES]
    first = next(batches(QUERIES, rows, index, OPTIONS, base.tokenizer.pad))
    own = embeddings(base, [[int(t) for t in r[m]] for r, m in zip(*first[:2], strict=True)])
    cosines = (own / np.linalg.norm(own, axis=1, keepdims=True)) @ (
        first.documents_BD / np.linalg.norm(first.documents_BD, axis=1, keepdims=True)
    ).T
    wanted = info_nce(jnp.asarray(cosines), jnp.asarray(first.also_BB), 0.05)
    found = batch_loss(adapted(base, OPTIONS), first, 0.05)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    model = trained(base, QUERIES, index, OPTIONS, lambda step, loss: losses.append(loss))
    after = mean_gain(base._replace(model=model), QUERIES, index)
    assert len(losses) == 40 and losses[0] == pytest.approx(float(wanted), rel=1e-3)
    assert losses[-1] < 0.5 * losses[0] and after > before + 0.2
    for path, array in module.flatten(module.split(base.model).params).items():
        np.testing.assert_array_equal(array, arrays[path])
    (tmp_path / "all.txt").write_text("\n".join(DOCUMENTS))
    lines = [{"query": q.text, "relevant": list(q.relevant)} for q in QUERIES]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["contrast", str(folder), str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "own")]
    words += ["--documents", str(tmp_path / "all.txt"), "--rank", "2", "--alpha", "4"]
    words += ["--steps", "40", "--batch", "8", "--lr", "0.03"]
    command.main(words, "library")
    assert f"{before:.3f} before, {after:.3f} after" in capsys.readouterr().out
    made = member_of_peft(tmp_path / "own", base, ("letters",), None)
    path, held = next(iter(sorted(made.layers.items())))
    update: Any = module.flatten(module.split(model).params)
    np.testing.assert_allclose(held.down, update[f"{path}/update/down"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 1}, "--batch is 1: a query needs another one's document"),
        ({"rank": 0}, "--rank is 0"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(QUERIES, replace(OPTIONS, **changes))


def test_examples_without_a_negative_are_refused() -> None:
    with pytest.raises(UserError, match="same relevant document, or there is one example"):
        check([KnownQuery("a", (1,)), KnownQuery("b", (1,))], OPTIONS)
    with pytest.raises(UserError, match="nothing is a negative"):
        check([KnownQuery("a", (1, 2))], OPTIONS)
