"""Bytes are the same tokens through a Hugging Face folder; files of other tokenizers are copied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moezoo.domains.text.adapter import MARKS, letters, tokenizer_files
from moezoo.domains.text.data.tokenizer import ByteTokenizer, HFTokenizer
from moezoo.domains.text.domain import TextDataConfig
from moezoo.errors import UserError

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    for name, content in tokenizer_files(TextDataConfig()).items():
        (folder / name).write_bytes(content)
    return HFTokenizer(folder)


def test_every_byte_has_a_letter() -> None:
    assert len(set(letters())) == 256 and letters()[ord("a")] == "a"
    assert letters()[ord(" ")] == "\u0120" and letters()[ord("\n")] == "\u010a"


@given(st.text())
def test_texts_are_the_same_tokens(written: HFTokenizer, text: str) -> None:
    assume(not any(mark in text for mark in MARKS.values()))
    plain = ByteTokenizer()
    assert written.encode(text) == plain.encode(text)
    assert written.decode(plain.encode(text)) == text


@pytest.mark.parametrize("text", ["", " ", "  a\n\n b\t", "Köln 東京 🦆", "<|pad", "\x00\x7f"])
def test_texts_of_all_kinds(written: HFTokenizer, text: str) -> None:
    assert written.encode(text) == list(text.encode())
    assert written.decode(text.encode()) == text


def test_marks_are_the_same(written: HFTokenizer) -> None:
    plain = ByteTokenizer()
    names = ("vocabulary", "bos", "eos", "pad")
    assert [getattr(written, n) for n in names] == [getattr(plain, n) for n in names]
    assert written.decode([plain.bos, 104, 105, plain.eos]) == "hi"
    assert written.decode([0xC3]) == plain.decode([0xC3])


def test_a_folder_is_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "special_tokens_map.json").write_bytes(b"[]")
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    found = tokenizer_files(TextDataConfig(tokenizer=str(tmp_path)))
    assert found == {"tokenizer.json": b"{}", "special_tokens_map.json": b"[]"}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(UserError, match="chat_template.jinja' is a named pipe"):
        tokenizer_files(TextDataConfig(tokenizer=str(tmp_path)))
