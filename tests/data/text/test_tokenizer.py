"""Bytes as tokens, and tokenizers of Hugging Face folders."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.data.text.corpus import documents
from moezoo.data.text.tokenizer import ByteTokenizer, HFTokenizer
from moezoo.errors import UserError


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < 256 for i in ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == text


def test_bytes_have_marks_of_their_own() -> None:
    tokenizer = ByteTokenizer()
    assert sorted({tokenizer.pad, tokenizer.bos, tokenizer.eos}) == [256, 257, 258]
    assert tokenizer.vocabulary == 259
    assert tokenizer.encode("a\n") == [97, 10]
    assert tokenizer.decode([0xC3]) == "\ufffd"


TOKENS = ["<s>", "</s>", "<pad>", "<unk>", "hello", "world", "a"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer of whole words and its special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(TOKENS[:4])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    return tmp_path


def configure(folder: Path, **names: Any) -> HFTokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return HFTokenizer(folder)


def test_a_folder_is_read(folder: Path) -> None:
    tokenizer = HFTokenizer(folder)
    assert (tokenizer.eos, tokenizer.pad, tokenizer.vocabulary) == (1, 2, len(TOKENS))
    assert tokenizer.bos is None  # this tokenizer puts nothing in front of a text
    ids = tokenizer.encode("hello world hello world</s>")  # neither truncated nor padded
    assert ids == [4, 5, 4, 5, 1]
    assert tokenizer.decode([0, 4, 5, 1, 2]) == "hello world"


def test_the_begin_token_is_used_where_the_folder_uses_it(folder: Path) -> None:
    from tokenizers import Tokenizer, processors

    assert configure(folder, bos_token="<s>", eos_token="</s>", add_bos_token=True).bos == 0
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(path)
    assert configure(folder, bos_token="<s>", eos_token="</s>").bos == 0
    assert HFTokenizer(folder).encode("a") == [6]
    assert configure(folder, bos_token="<s>", eos_token="</s>", add_bos_token=False).bos is None
    assert configure(folder, bos_token=None, eos_token="</s>").bos is None


def test_special_tokens_map_fills_in(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "a"}')
    tokenizer = configure(folder, eos_token=None, pad_token="<pad>")
    assert (tokenizer.eos, tokenizer.pad) == (1, 2)


def test_the_end_token_pads_where_there_is_no_pad(folder: Path) -> None:
    tokenizer = configure(folder, eos_token="</s>")
    assert tokenizer.pad == tokenizer.eos == 1


def test_pieces_of_words_come_back(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    texts = [document.text for document in documents("topics", "test", 30_000)]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = configure(tmp_path, eos_token="<end>")
    for text in [*texts, "ünïcode 🎈\n  and  blanks "]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eos]) == text
        assert max(ids) < tokenizer.vocabulary == 400
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode()) / 1.5


def test_bad_folders_are_explained(folder: Path) -> None:
    with pytest.raises(UserError, match="names no end token"):
        configure(folder, bos_token="<s>")
    with pytest.raises(UserError, match="names '<end>' as eos_token, which its tokenizer.json"):
        configure(folder, eos_token="<end>")
    with pytest.raises(UserError, match="names \\[1\\] as pad_token"):
        configure(folder, eos_token="</s>", pad_token=[1])
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not JSON"):
        HFTokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json holds no JSON object"):
        HFTokenizer(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="tokenizer.json is no tokenizer that"):
        HFTokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is not JSON: Expecting"):
        HFTokenizer(folder)
    (folder / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="tokenizer.json is not UTF-8"):
        HFTokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json: name the folder"):
        HFTokenizer(folder)


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[text\]'"):
        HFTokenizer(tmp_path)
