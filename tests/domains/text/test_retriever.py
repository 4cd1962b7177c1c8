"""RouterRetriever: pilots, choice and search, by hand over a library of random adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.cli import library as command
from moezoo.domains.text import library as collecting
from moezoo.domains.text.data.example import plain
from moezoo.domains.text.library import BaseDecoder
from moezoo.domains.text.retriever import KnownQuery, Pilots, Retriever, ndcg, read_queries
from moezoo.errors import UserError
from moezoo.ops.prototypes import labelled_max
from moezoo.weights.library import Library, create
from moezoo.weights.library_bank import attach_merged
from tests.weights.libraries import decoder, member, sha


class Letters:
    """A tokenizer of the letters a to n."""

    vocabulary, pad, bos, eos = 20, 0, 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) - ord("a") for letter in text]


DOCUMENTS = ["ab", "cde", "fg", "hijk", "lmn", "aaf", "gnb", "kk", "dce", "mh", "bb", "el"]
SETS = (
    [KnownQuery("abc", (0, 5)), KnownQuery("fa", (2,)), KnownQuery("nl", (4, 11))],
    [KnownQuery("kh", (3, 7, 9)), KnownQuery("dd", (1, 8)), KnownQuery("hm", (9,))],
)
QUERIES = ["abf", "kkh", "lde"]


@pytest.fixture(scope="module")
def base() -> BaseDecoder:
    made = decoder()
    tokenizer: Any = Letters()
    return BaseDecoder("tiny", made, tokenizer, plain, sha(made))


@pytest.fixture(scope="module")
def held(base: BaseDecoder, tmp_path_factory: pytest.TempPathFactory) -> Library:
    members = [member(f"a{i}", i, scale=2.0) for i in range(3)]
    return create(tmp_path_factory.mktemp("library") / "lib", base.told, members)


def by_hand(base: BaseDecoder, held: Library, text: str, name: str | None) -> np.ndarray:
    """An embedding of length 1, text by text."""
    model = decoder()
    if name is not None:
        attach_merged(model, held, {name: 1.0})
    row = collecting.prompt_tokens(base, text)
    (vector,) = collecting.embeddings(base._replace(model=model), [row])
    return vector / np.linalg.norm(vector)


def gain(order: list[int], relevant: tuple[int, ...]) -> float:
    ideal = sum(1 / np.log2(i + 2) for i in range(len(relevant)))
    return sum(1 / np.log2(i + 2) for i, n in enumerate(order[:10]) if n in relevant) / ideal


def test_pilots_are_means_of_what_a_member_ranks_best(base: BaseDecoder, held: Library) -> None:
    retriever = Retriever(base, held)
    index = np.stack([by_hand(base, held, text, None) for text in DOCUMENTS])
    documents = retriever.embedded(DOCUMENTS)
    wanted = []
    for queries in SETS:
        groups: dict[int, list[np.ndarray]] = {}
        for query in queries:
            reached = []
            for name in held.names:
                scores = index @ by_hand(base, held, query.text, name)
                reached.append(gain(np.argsort(-scores).tolist(), query.relevant))
            row = collecting.prompt_tokens(base, query.text)
            (own,) = collecting.embeddings(base, [row])
            groups.setdefault(int(np.argmax(reached)), []).append(own)
        wanted += [(e, np.mean(groups[e], axis=0)) for e in sorted(groups)]
    pilots = retriever.pilots(SETS, documents)
    assert pilots.members_P.tolist() == [e for e, _ in wanted]
    assert len(set(pilots.members_P.tolist())) > 1
    np.testing.assert_allclose(
        pilots.vectors_PD, [vector for _, vector in wanted], rtol=1e-4, atol=1e-5
    )
    # The choice: the mean over a member's pilots, in the code the largest of them.
    chosen = retriever.chosen(QUERIES, pilots)
    single = retriever.chosen(QUERIES, pilots, labelled_max)
    for text, mean, most in zip(QUERIES, chosen, single, strict=True):
        own = by_hand(base, held, text, None)
        like = [own @ v / np.linalg.norm(v) for v in pilots.vectors_PD]
        by_member: dict[int, list[float]] = {}
        for e, value in zip(pilots.members_P.tolist(), like, strict=True):
            by_member.setdefault(e, []).append(value)
        assert mean == f"a{max(by_member, key=lambda e: float(np.mean(by_member[e])))}"
        assert most == f"a{max(by_member, key=lambda e: max(by_member[e]))}"
    # And the search: the query by its reader, the documents by the base.
    readers = ["a2", None, "a0"]
    found = retriever.search(QUERIES, readers, documents)
    for text, reader, scores in zip(QUERIES, readers, found, strict=True):
        own = by_hand(base, held, text, reader)
        np.testing.assert_allclose(scores, index @ own, rtol=1e-4, atol=1e-5)


def test_a_query_that_is_as_like_to_all_members_is_the_base_s(
    base: BaseDecoder, held: Library
) -> None:
    retriever = Retriever(base, held)
    same = Pilots(np.ones((3, 8), np.float32), np.array([0, 2, 2]))
    assert retriever.chosen(QUERIES, same) == [None] * 3
    alone = Pilots(np.ones((1, 8), np.float32), np.array([1]))
    assert retriever.chosen(QUERIES, alone) == ["a1"] * 3


def test_ndcg_counts_ten_ranks() -> None:
    scores = np.arange(12.0)[::-1]
    assert ndcg(scores, [0]) == 1 and ndcg(scores, [10]) == 0
    np.testing.assert_allclose(ndcg(scores, [1, 3]), gain(list(range(12)), (1, 3)))
    np.testing.assert_allclose(ndcg(scores, list(range(12))), 1.0)
    assert ndcg(np.zeros(3), [1]) == pytest.approx(1 / np.log2(3))


def test_documents_are_found_by_the_command(
    base: BaseDecoder,
    held: Library,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    (tmp_path / "docs.txt").write_text("\n".join(DOCUMENTS))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, queries in zip(files, SETS, strict=True):
        lines = ({"query": q.text, "relevant": q.relevant} for q in queries)
        file.write_text("\n\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("moezoo.domains.text.library.open_base", lambda folder: base)
    words = ["retrieve", str(held.folder), "x", "abf", "--documents", str(tmp_path / "docs.txt")]
    words += ["--examples", *map(str, files), "--count", "2"]
    command.main(words, "moezoo library")
    retriever = Retriever(base, held)
    documents = retriever.embedded(DOCUMENTS)
    (reader,) = retriever.chosen(["abf"], retriever.pilots(SETS, documents))
    best = np.argsort(-retriever.search(["abf"], [reader], documents)[0])[:2]
    wanted = [f"'abf', read by {reader}:", *(f"  {n}  {DOCUMENTS[n]}" for n in best)]
    assert capsys.readouterr().out.splitlines() == wanted
    for wrong, said in (
        ([*words[:-1], "0"], "at least 1"),
        ([*words[:3], "", *words[4:]], "is empty"),
        ([*words[: words.index("--examples") + 1]], "one or more examples"),
    ):
        with pytest.raises(UserError, match=said):
            command.main(wrong, "moezoo library")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"query": "a", "relevant": [3]}', "line 1.*document 3, but there are 3"),
        ('{"query": "a", "relevant": [0]}\n{"query": "a"}', "line 2"),
        ('{"query": "a", "relevant": []}', "line 1"),
        ('{"query": " ", "relevant": [0]}', "line 1.*query is empty"),
        ("query", "line 1.*not JSON"),
        ("\n", "contains no queries"),
    ],
)
def test_damaged_queries_are_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_queries(tmp_path / "a.jsonl", 3)
