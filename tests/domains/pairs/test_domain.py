"""The data section of runs on pairs: words that are enough, shares, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moezoo.domains.images.data.rooms.labels import NUMBERS, counted
from moezoo.domains.images.data.rooms.names import NOUNS
from moezoo.domains.pairs import domain as pairs
from moezoo.domains.pairs.data import captions, mixture, parts
from moezoo.domains.pairs.data.words import PAD, split
from moezoo.domains.pairs.domain import PairsDataConfig, Shares
from moezoo.errors import UserError

DATA = PairsDataConfig(resolution=(8, 8), train=3, test=5)
EVERY = tuple(parts.TASKS)


def test_every_noun_in_every_number_has_its_words():
    words = captions.vocabulary()
    for noun in NOUNS:
        for count in range(1, len(NUMBERS) + 2):
            assert words.decode(words.encode(counted(noun, count))) == counted(noun, count)
            assert counted(noun, count) in captions.LISTED


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    data = replace(DATA, data_dir=str(tmp_path_factory.mktemp("data")))
    return {split: pairs.open_pairs(data, split) for split in ("train", "test")}


def test_captions_of_rooms_are_made_of_known_words(sources):
    words = pairs.words_of(DATA)
    for source in sources.values():
        for text in source.captions:
            assert words.decode(words.encode(text)) == text.lower()
            assert len(split(text)) <= captions.longest()
    assert {n: len(s) for n, s in sources.items()} == {"train": 3, "test": 5}


def test_evaluations_have_every_example_once_under_every_task(sources):
    source, words = sources["test"], pairs.words_of(DATA)
    given = (source, 5, words, 40, 4, EVERY)
    batches = list(mixture.evaluation(*given, range(4)))
    assert [list(b["valid"]) for b in batches] == [[True] * 4, [True, False, False, False]]
    assert set(batches[0]) == {*EVERY, "valid"}
    texts = [words.decode(row) for b in batches for row in b["retrieval"]["text"][b["valid"]]]
    assert texts == [text.lower() for text in source.captions]
    # The rows of one process are those of all.
    for whole, part in zip(batches, mixture.evaluation(*given, range(2, 4)), strict=True):
        for task in EVERY:
            for name, rows in part[task].items():
                np.testing.assert_array_equal(rows, whole[task][name][2:4])
    few = list(mixture.evaluation(source, 2, words, 40, 4, ("mlm",), range(4)))
    assert len(few) == 1 and few[0]["valid"].sum() == 2


def test_phrases_ask_for_what_their_own_image_has(sources):
    (batch,) = mixture.evaluation(
        sources["test"], 5, pairs.words_of(DATA), 40, 5, ("counts",), range(5)
    )
    part, words = batch["counts"], pairs.words_of(DATA)
    assert (part["asked"] <= part["there"]).all()
    for row, text in enumerate(part["text"]):
        asked = [captions.LISTED[i] for i in np.flatnonzero(part["asked"][row])]
        said = words.decode(text)
        assert set(said.split(" and ")) == set(asked) and 1 <= len(asked) <= captions.ASKED
        assert (text[len(split(said)) :] == PAD).all()


def test_shares_are_of_the_named_tasks_and_add_up():
    shares = Shares(scene=3.0, mlm=1.0, counts=0.0)
    assert shares.of(("scene", "mlm", "counts")) == {"scene": 0.75, "mlm": 0.25}


def test_a_form_needs_no_data():
    source = pairs.form_of(DATA)
    assert source[0]["image"].shape == (8, 8, 3)
    pairs.words_of(DATA).encode(source.captions[0])
    captions.read(source.captions[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"augment": ("scale",)}, "data.augment has 'scale', so it needs 'crop'"),
        ({"augment": ("erase",)}, "erase"),
        ({"resolution": (4, 64)}, "at least 8"),
        ({"train": 0}, "at least 1"),
    ],
)
def test_what_makes_no_data_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        pairs.check(replace(DATA, **changes), EVERY)


def test_texts_that_do_not_fit_are_told_before_training(tmp_path):
    with pytest.raises(UserError, match="data.length is 5; it must be at least"):
        pairs.open_pairs(replace(DATA, length=5, data_dir=str(tmp_path)), "test")
