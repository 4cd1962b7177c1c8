"""Words, captions taken apart, and batches of tasks that say what the captions say."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.data.source import ArraySource, Info
from moezoo.domains.images.data.rooms.names import SCENES
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.domains.pairs.data import captions, mixture, parts
from moezoo.domains.pairs.data.words import END, MASK, PAD, START, Vocabulary
from moezoo.errors import UserError

TEXTS = [
    "A living room with a window, two plants and a stack of books, in daylight.",
    "An office with a desk and three chairs, in lamplight.",
    "A bedroom with a bed, in lamplight.",
    "A playroom with a ball and boxes, in daylight.",
]
WORDS = Vocabulary.of([*TEXTS, *SCENES, "a room"])
LENGTH = 22


def source(texts=TEXTS) -> ArraySource:
    info = Info("rooms", "train", (2, 2), ("scene",), {}, kinds=KINDS)
    kinds = [SCENES.index(captions.read(t).scene) for t in TEXTS]
    image = np.arange(len(TEXTS) * 12, dtype=np.uint8).reshape(-1, 2, 2, 3)
    return ArraySource(info, {"image": image, "scene": np.array(kinds, np.uint8)}, texts)


def mixed(sizes: int = 4, **changes) -> mixture.Mixture:
    weights = changes.pop("weights", dict.fromkeys(parts.TASKS, 1.0))
    given = {"seed": 3, "weights": weights, "sizes": dict.fromkeys(parts.TASKS, sizes)} | changes
    return mixture.Mixture(source(), WORDS, LENGTH, **given)


def first(name: str, **changes) -> dict[str, np.ndarray]:
    found, batch = mixed(weights={name: 1.0}, **changes).batch(0)
    assert found == name
    return batch


def test_words_come_back():
    for text in TEXTS:
        assert WORDS.decode(WORDS.encode(text)) == text.lower()
    assert WORDS.decode([START, WORDS.encode("bed")[0], END, WORDS.encode("desk")[0]]) == "bed"
    np.testing.assert_array_equal(WORDS.rows(["bed", "a bed"])[0, 1:], [PAD])


def test_unknown_words_and_long_texts_are_named():
    with pytest.raises(UserError, match="'zebra' of 'a zebra'"):
        WORDS.encode("a zebra")
    with pytest.raises(UserError, match="room for 3"):
        WORDS.rows(["a bed", TEXTS[0]], 3)


def test_captions_are_taken_apart():
    said = captions.read(TEXTS[0])
    assert said == ("living room", ("a window", "two plants", "a stack of books"), "in daylight")
    assert captions.without_scene(TEXTS[1]) == "A room with a desk and three chairs, in lamplight."
    with pytest.raises(UserError, match="is not a caption of rooms"):
        captions.read("Something else.")


def test_captions_are_asked_word_by_word():
    batch = first("caption")
    for text, targets in zip(batch["text"], batch["targets"], strict=True):
        asked = targets[targets != parts.NOTHING]
        np.testing.assert_array_equal(text[: len(asked)], [START, *asked[:-1]])
        assert asked[-1] == END and WORDS.decode(asked) in [t.lower() for t in TEXTS]


def test_hidden_words_are_the_captions():
    batch = first("mlm")
    whole = np.where(batch["targets"] != parts.NOTHING, batch["targets"], batch["text"])
    assert sorted(WORDS.decode(row) for row in whole) == sorted(t.lower() for t in TEXTS)
    hidden = batch["text"] == MASK
    np.testing.assert_array_equal(hidden, batch["targets"] != parts.NOTHING)
    assert hidden.any(axis=1).all() and not hidden.all()


@pytest.mark.parametrize("name", ["scene", "text_scene"])
def test_the_right_candidate_is_the_room_of_the_caption(name):
    batch = first(name)
    names = parts.candidates(name, WORDS)
    rooms = [WORDS.decode(names[i]) for i in batch["label"]]
    assert sorted(rooms) == sorted(captions.read(t).scene for t in TEXTS)
    if "text" in batch:
        texts = [WORDS.decode(row) for row in batch["text"]]
        wanted = {captions.without_scene(t).lower(): captions.read(t).scene for t in TEXTS}
        assert [wanted[t] for t in texts] == rooms


def test_pairs_belong_together_and_all_words_are_candidates():
    batch = first("retrieval")
    of = {t.lower(): i for i, t in enumerate(TEXTS)}
    order = [of[WORDS.decode(row)] for row in batch["text"]]
    means = batch["image"].reshape(4, -1).mean(axis=1)  # images grow brighter with their number
    assert list(np.argsort(means)) == list(np.argsort(order))
    assert parts.candidates("retrieval", WORDS) is None
    assert parts.candidates("mlm", WORDS).shape == (len(WORDS), 1)


def test_a_batch_is_a_function_of_seed_and_step_and_rows_are_its_rows():
    for step in range(6):
        name, whole = mixed().batch(step)
        again, part = mixed().batch(step, [1, 3])
        assert again == name
        for key in whole:
            np.testing.assert_array_equal(part[key], whole[key][[1, 3]])
    assert [mixed(seed=4).task(s) for s in range(20)] != [mixed().task(s) for s in range(20)]


def test_tasks_are_drawn_by_weight():
    made = mixed(weights={"mlm": 3.0, "retrieval": 1.0})
    drawn = [made.task(step) for step in range(2000)]
    assert abs(drawn.count("mlm") / 2000 - 0.75) < 0.03


def test_bad_mixtures_are_explained():
    with pytest.raises(UserError, match="task on pairs 'poetry'"):
        mixed(weights={"poetry": 1.0})
    with pytest.raises(UserError, match="weight of task mlm is 0"):
        mixed(weights={"mlm": 0})
    with pytest.raises(UserError, match="at least one task"):
        mixed(weights={})
    with pytest.raises(UserError, match="no captions"):
        mixture.Mixture(source(()), WORDS, LENGTH, {"mlm": 1}, {"mlm": 1.0}, 0)
