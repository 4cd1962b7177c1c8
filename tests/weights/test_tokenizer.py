"""Tokenizers: a tiny byte-pair one made on the spot, and our own of bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.weights.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, read_tokenizer

TEXTS = ["a low lower", "lowest of the low, naïve ☃", ""]
SPECIAL = ["<s>", "</s>", "<pad>"]


def make(folder: Path, **named: object) -> Path:
    """A byte-pair tokenizer and the files beside it, with padding and a template switched on."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 5, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.enable_padding(length=50)
    inner.enable_truncation(2)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(scope="module")
def from_file(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    make(folder, **named)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    return read_tokenizer(folder)


@pytest.fixture(params=["bytes", "file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("from_file")


def test_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.size for i in ids)
        assert tokenizer.decode(ids) == text
    around = [tokenizer.id_of("bos"), *tokenizer.encode("low"), tokenizer.id_of("eos")]
    assert tokenizer.decode(around) == "low"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_one_side(tokenizer: Tokenizer, side) -> None:
    found = tokenizer.encode_batch(TEXTS, before=["bos"], after=["eos"], side=side)
    assert found.tokens_BT.dtype == np.int32 and found.mask_BT.dtype == bool
    longest = max(len(tokenizer.encode(text)) for text in TEXTS) + 2
    assert found.tokens_BT.shape == found.mask_BT.shape == (3, longest)
    for row, mask, text in zip(*found, TEXTS, strict=True):
        wanted = [tokenizer.id_of("bos"), *tokenizer.encode(text), tokenizer.id_of("eos")]
        assert row[mask].tolist() == wanted
        assert mask[-1 if side == "left" else 0] and (row[~mask] == tokenizer.id_of("pad")).all()
    assert tokenizer.decode_batch(found.tokens_BT) == TEXTS
    assert tokenizer.decode_batch(found.tokens_BT, [0, 0, 0]) == ["", "", ""]


def test_a_length_cuts_and_fills(tokenizer: Tokenizer) -> None:
    found = tokenizer.encode_batch(TEXTS, length=4)
    assert found.tokens_BT.shape == (3, 4)
    whole = tokenizer.encode(TEXTS[1])
    assert len(whole) > 4 and found.tokens_BT[1].tolist() == whole[:4]
    assert not found.mask_BT[2].any()


def test_byte_tokens() -> None:
    bytes_ = ByteTokenizer()
    assert bytes_.encode("é") == [0xC3, 0xA9]
    assert (bytes_.id_of("bos"), bytes_.id_of("eos"), bytes_.id_of("pad")) == (256, 257, 258)
    assert bytes_.size == 259 and bytes_.decode([0xC3, 257]) == "�"


def test_special_tokens_by_file_and_by_argument(from_file: FileTokenizer, tmp_path: Path) -> None:
    assert from_file.special == {"bos": 0, "eos": 1, "pad": 2}
    make(tmp_path, bos_token="<s>")
    assert read_tokenizer(tmp_path, pad="</s>").special == {"bos": 0, "pad": 1}


def test_missing_special_tokens(tmp_path: Path) -> None:
    make(tmp_path, bos_token="<s>")
    tokenizer = read_tokenizer(tmp_path)
    equal = tokenizer.encode_batch(["low", "low"])
    assert equal.mask_BT.all()  # nothing to pad, nothing needed
    with pytest.raises(UserError, match=r'tokenizer.json has no pad token: .*pad="</s>"'):
        tokenizer.encode_batch(TEXTS)
    with pytest.raises(UserError, match="has no eos token"):
        tokenizer.encode_batch(["low"], after=["eos"])
    make(tmp_path, eos_token="<end>")
    with pytest.raises(UserError, match="has no token '<end>', which is to be its eos"):
        read_tokenizer(tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    with pytest.raises(UserError, match="There is no .*tokenizer.json"):
        read_tokenizer(tmp_path)
    make(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is not JSON"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="tokenizer.json is no tokenizer"):
        read_tokenizer(tmp_path)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[text\]'"):
        read_tokenizer("anywhere")
