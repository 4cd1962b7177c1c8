"""Bytes as tokens, and tokenizers of Hugging Face folders."""

from __future__ import annotations

import builtins
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.text.data.corpus import documents
from moezoo.domains.text.data.tokenizer import ByteTokenizer, HFTokenizer
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
    with pytest.raises(UserError, match="pad_token is \\[1\\], it must be a text"):
        configure(folder, eos_token="</s>", pad_token=[1])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json: name the folder"):
        HFTokenizer(folder)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", "{", "it is not JSON"),
        ("tokenizer_config.json", "[]", "it holds no JSON object"),
        ("tokenizer_config.json", DEEP, "it is nested too deep"),
        ("tokenizer_config.json", '{"eos_token": ' + DEEP, "it is nested too deep"),
        ("tokenizer_config.json", '{"eos_token": {"content": {}}}', "eos_token is .*must be a te"),
        ("tokenizer_config.json", '{"eos_token": {"text": "a"}}', "eos_token is .*must be a text"),
        ("tokenizer_config.json", '{"eos_token": true}', "eos_token is True, it must be a text"),
        ("tokenizer_config.json", '{"add_bos_token": "false"}', "add_bos_token is 'false', it mu"),
        ("special_tokens_map.json", '{"bos_token": 3}', "bos_token is 3, it must be a text"),
        ("special_tokens_map.json", '"a"', "it holds no JSON object"),
        ("tokenizer.json", '{"version": "1.0"}', "the tokenizers package cannot read it"),
        ("tokenizer.json", "{", "it is not JSON"),
        ("tokenizer.json", b'{"a": "\xff"}', "it is not JSON"),
        ("tokenizer.json", DEEP, "it is nested too deep"),
        ("tokenizer.json", '{"a":' * 100_000, "it is nested too deep"),
        ("tokenizer.json", "[]", "the tokenizers package cannot read it"),
        ("tokenizer.json", "", "it is not JSON"),
    ],
)
def test_files_of_other_forms_are_one_sentence(
    folder: Path, name: str, content: str | bytes, says: str
) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"{name}: {says}") as told:
        HFTokenizer(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


def changed(folder: Path, **parts: Any) -> HFTokenizer:
    """The folder's tokenizer with parts of its file replaced."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return HFTokenizer(folder)


def test_a_tokenizer_that_contradicts_itself(folder: Path) -> None:
    """The Rust side panics, which is no Exception."""
    lost = {"id": "<s>", "type_id": 0}
    form = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    form |= {"single": [{"SpecialToken": lost}, {"Sequence": {"id": "A", "type_id": 0}}]}
    with pytest.raises(UserError, match="tokenizer.json(: it is no| contradicts itself)"):
        changed(folder, post_processor=form)


def test_ids_beyond_what_any_model_has(folder: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(TOKENS[:-1])} | {"a": 2**31}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    with pytest.raises(UserError, match="has token 2147483648, but only 0 to 16777215 are read"):
        changed(folder, model=model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}' is a named pipe"):
        HFTokenizer(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}' is a device"):
        HFTokenizer(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=name):
        HFTokenizer(folder)


def test_marks_are_tokens_of_their_own(folder: Path) -> None:
    tokenizer = HFTokenizer(folder)
    assert tokenizer.mark("<pad>") == 2
    for word in ("hello", "<|im_end|>"):  # a word of the vocabulary, but not wherever it is
        with pytest.raises(
            UserError, match=f"would spell out the template's mark {re.escape(word)}"
        ):
            tokenizer.mark(word)
    with pytest.raises(UserError, match="Tokens are bytes, which would spell out"):
        ByteTokenizer().mark("<|im_end|>")


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
