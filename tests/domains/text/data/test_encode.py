"""Templates, encoding, cutting and which tokens the loss is taken on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.text.data.encode import (
    PROMPT,
    EncodedDocument,
    TrainedTokens,
    answers_only,
    encode,
    encode_all,
    ends,
    everything,
)
from moezoo.domains.text.data.example import Chat, Instruction, TextPiece, Turn, chatml, plain
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.errors import UserError
from tests.domains.text.data.samples import Listed, chat_folder

BYTES = ByteTokenizer()
TURNS = (
    Turn("system", "S"),
    Turn("user", "Q"),
    Turn("assistant", "A"),
    Turn("user", "R"),
    Turn("assistant", "B"),
)


class NoBegin(ByteTokenizer):
    """Bytes for documents that begin without a mark."""

    bos = None  # type: ignore[assignment]


def shown(ids: Iterable[int]) -> str:
    marks = {BYTES.bos: "^", BYTES.eos: "$", BYTES.pad: "_"}
    return "".join(marks.get(int(i)) or chr(i) for i in ids)


def test_the_plain_template() -> None:
    document = encode(plain(TURNS), BYTES, 100)
    assert document is not None
    assert shown(document.tokens) == "^S\nQ\nA$R\nB$"
    assert shown(document.tokens[answers_only(document)]) == "A$B$"
    assert everything(document).all()
    assert document.tokens.dtype == np.int32 and document.answer.dtype == bool
    question = Instruction("Do", "this", "done", "t").turns
    assert plain(question) == [TextPiece("Do\nthis\n", False), TextPiece("done", True, end=True)]
    assert plain(Instruction("Do", "", "done", "t").turns)[0].text == "Do\n"


MARKED = {259: "[", 260: "]"}  # <|im_start|> and <|im_end|>


@pytest.mark.parametrize("eos", ["<|end|>", "<|im_end|>"])
@pytest.mark.parametrize("bos", [True, False])
def test_chatml_ends_every_turn_in_the_same_token(tmp_path: Path, eos: str, bos: bool) -> None:
    """With a base model's tokenizer, whose own end token is another, as with a chat model's."""
    tokenizer = chat_folder(tmp_path, eos_token=eos, add_bos_token=bos)
    document = encode(chatml(TURNS), tokenizer, 1000)
    assert document is not None
    marks = {BYTES.bos: "^", BYTES.eos: "$", **MARKED}
    text = "".join(marks.get(int(i)) or chr(i) for i in document.tokens)
    assert text == "^" * bos + ("[system\nS]\n[user\nQ]\n[assistant\nA]\n[user\nR]\n[assistant\nB]")
    learned = document.tokens[answers_only(document)]
    assert [int(i) for i in learned] == [ord("A"), 260, ord("B"), 260]
    assert everything(document).all()
    # One text with the marks written out, as Hugging Face's own template makes it, is the same.
    written = text[bos:].replace("[", "<|im_start|>").replace("]", "<|im_end|>")
    assert document.tokens[bos:].tolist() == tokenizer.encode(written)
    stop = ends(chatml, tokenizer)
    assert stop == ((260, 258) if eos == "<|end|>" else (260,))


TEMPLATES = {"plain": plain, "chatml": chatml}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("trained", [answers_only, everything])
@pytest.mark.parametrize("eos", ["<|end|>", "<|im_end|>"])
def test_what_is_learned_ends_in_what_stops(
    tmp_path: Path, template: str, trained: TrainedTokens, eos: str
) -> None:
    """Every answer's end token is learned, and generation stops at it."""
    tokenizer = chat_folder(tmp_path, eos_token=eos)
    document = encode(TEMPLATES[template](TURNS), tokenizer, 1000)
    assert document is not None
    stop = ends(TEMPLATES[template], tokenizer)
    learned = trained(document)
    for answer in (b"A", b"B"):
        (at,) = np.flatnonzero(document.tokens == answer[0])[-1:]
        assert learned[at : at + 2].all() and document.tokens[at + 1] == stop[0]
    assert stop[0] == (260 if template == "chatml" or eos == "<|im_end|>" else 258)


def test_tokenizers_without_the_marks_are_refused(tmp_path: Path) -> None:
    """They spelled them out, in 113 tokens instead of 51."""
    examples = Listed([Instruction("a", "", "b", "t")])
    half = chat_folder(tmp_path / "half", ["<|im_start|>"])
    none = chat_folder(tmp_path / "none", [])
    for tokenizer, word in ((BYTES, "im_start"), (none, "im_start"), (half, "im_end")):
        for ask in (
            lambda tokenizer=tokenizer: encode_all(examples, tokenizer, 100, chatml),
            lambda tokenizer=tokenizer: ends(chatml, tokenizer),
        ):
            with pytest.raises(UserError, match=rf"spell out the template's mark <\|{word}\|>"):
                ask()
    assert ends(plain, BYTES) == (BYTES.eos,)
    assert ends(lambda turns: [TextPiece("b", True)], BYTES) == (BYTES.eos,)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>"])
def test_turns_that_hold_a_mark_are_refused(role: str, mark: str) -> None:
    """They would be another conversation than the one that is written."""
    turns = (Turn(role, f"a{mark}\n"), *TURNS)
    with pytest.raises(UserError, match=rf"A turn of the {role} has {re.escape(mark)} in its te"):
        chatml(turns)
    assert plain(turns)[0].text.startswith("a<|im_")


PIECES = st.lists(st.tuples(st.text("abc", max_size=12), st.booleans()), max_size=5)


@given(
    pieces=PIECES,
    last=st.text("xyz", max_size=12),
    longest=st.integers(2, 60),
    tokenizer=st.sampled_from([BYTES, NoBegin()]),
)
def test_what_is_cut(
    pieces: list[tuple[str, bool]], last: str, longest: int, tokenizer: ByteTokenizer
) -> None:
    """The beginning and the end of the prompt stay, the last answer always does, whole."""
    given_pieces = [TextPiece(text, answer) for text, answer in pieces] + [
        TextPiece("?", False),
        TextPiece(last, True, end=True),
    ]
    whole = encode(given_pieces, tokenizer, 10**6)
    found = encode(given_pieces, tokenizer, longest)
    assert whole is not None
    prompt = shown(whole.tokens)[: -len(last) - 1]
    if len(whole.tokens) <= longest:
        assert found is not None and shown(found.tokens) == shown(whole.tokens)
        np.testing.assert_array_equal(found.answer, whole.answer)
        assert found.joint == 0
        return
    room = longest - len(last) - 1
    if room < PROMPT:
        assert found is None
        return
    assert found is not None and len(found.tokens) == longest
    left, right = found.joint, room - found.joint
    assert 0 <= left - right <= 1
    assert shown(found.tokens) == prompt[:left] + prompt[len(prompt) - right :] + last + "$"
    assert shown(found.tokens[answers_only(found)]) == last + "$"
    np.testing.assert_array_equal(np.flatnonzero(~everything(found)), [left])


def test_an_example_must_end_with_an_answer() -> None:
    for pieces in ([], [TextPiece("a", True), TextPiece("b", False)]):
        with pytest.raises(ValueError, match="must be an answer"):
            encode(pieces, BYTES, 10)


def test_all_examples_in_flat_arrays() -> None:
    examples = Listed(
        [
            Instruction("one", "x", "1", "b"),
            Instruction("long answer", "x", "9" * 30, "a"),
            Instruction("two", "abcdefghijklmnopqrst", "22", "a"),
        ]
    )
    documents = encode_all(examples, BYTES, 15)
    assert len(documents) == 2 and documents.refused == 1
    assert shown(documents[0].tokens) == "^one\nx\n1$"
    assert shown(documents[1].tokens) == "^two\nabpqrst\n22$"
    assert len(documents[1].tokens) == documents.longest == 16
    assert documents.tasks == ("a", "b")
    np.testing.assert_array_equal(documents.task_N, [1, 0])
    np.testing.assert_array_equal(documents.sizes_N, [8, 15])
    assert documents[1].joint > 0 and documents[0].joint == 0
    for index, example in ((0, examples[0]), (1, examples[2])):
        alone = encode(plain(example.turns), BYTES, 16)
        assert alone is not None
        np.testing.assert_array_equal(alone.tokens, documents[index].tokens)
        np.testing.assert_array_equal(alone.answer, documents[index].answer)
        assert alone.joint == documents[index].joint
    assert (documents.vocabulary, documents.pad) == (259, 256)


def test_nothing_that_fits_is_an_error() -> None:
    examples = Listed([Instruction("a", "", "b" * 50, "t")])
    with pytest.raises(
        UserError, match="None of 1 examples has an answer that fits in rows of 20 tokens"
    ):
        encode_all(examples, BYTES, 20)


def test_a_template_is_any_function() -> None:
    examples = Listed([Instruction("a", "", "b", "t")])
    document = encode_all(examples, BYTES, 20, lambda turns: [TextPiece(turns[-1].content, True)])[
        0
    ]
    assert shown(document.tokens) == "^b"


def test_conversations_are_encoded_like_instructions() -> None:
    class Chats(Listed):
        def __getitem__(self, index: int) -> Chat:  # type: ignore[override]
            return Chat(TURNS, "t")

    document = encode_all(Chats([Instruction("", "", "", "t")]), BYTES, 50)[0]
    assert isinstance(document, EncodedDocument) and shown(document.tokens) == "^S\nQ\nA$R\nB$"
