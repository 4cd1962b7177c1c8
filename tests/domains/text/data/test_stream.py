"""Continuous text: every token is a target once, documents never mix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.text.data.corpus import Document
from moezoo.domains.text.data.stream import Continuous
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.errors import UserError
from tests.domains.text.data.test_encode import BYTES, NoBegin

TEXTS = st.lists(
    st.tuples(st.sampled_from("ba"), st.text("xyz", max_size=9)), min_size=1, max_size=8
)


@given(texts=TEXTS, length=st.integers(1, 12), tokenizer=st.sampled_from([BYTES, NoBegin()]))
def test_rows_are_cut_from_all_documents(
    texts: list[tuple[str, str]], length: int, tokenizer: ByteTokenizer
) -> None:
    documents = [Document(d, str(i), t) for i, (d, t) in enumerate(texts, 1)]
    ids, owner = [], []
    for number, document in enumerate(documents):
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        own = [*begin, *tokenizer.encode(document.text), tokenizer.eos]
        ids += own
        owner += [number] * len(own)
    if len(ids) < 2:
        return
    source = Continuous(documents, tokenizer, length, "toy", "train")
    assert source.info.tasks == tuple(sorted({d for d, _ in texts}))
    place = 0
    for index in range(len(source)):
        row = source.epoch(3)[index]
        number, position = 0, 0
        for t in range(length):
            if place == len(ids) - 1:
                expected = [tokenizer.pad, -1, 0, 0, 0]
            else:
                new = t == 0 or owner[place] != owner[place - 1]
                number, position = number + new, 0 if new else position + 1
                target = ids[place + 1] if owner[place] == owner[place + 1] else -1
                task = source.info.tasks.index(texts[owner[place]][0])
                expected = [ids[place], target, number, position, task]
                place += 1
            names = ("tokens", "targets", "segments", "positions", "task")
            assert [int(row[name][t]) for name in names] == expected
    assert place == len(ids) - 1
    assert all(values.dtype == np.int32 for values in source[0].values())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="The train split of toy contains no text"):
        Continuous([], BYTES, 4, "toy", "train")
    with pytest.raises(UserError, match="Unknown text domain 'a'"):
        Continuous([Document("a", "a", "abc")], BYTES, 4, "toy", "train", ("b",))
    given_tasks = Continuous([Document("a", "a", "abc")], BYTES, 4, "toy", "train", ("b", "a"))
    assert given_tasks.info.tasks == ("b", "a") and given_tasks[0]["task"].tolist() == [1] * 4
    with pytest.raises(IndexError):
        Continuous([Document("a", "a", "abc")], BYTES, 4, "toy", "train")[1]
