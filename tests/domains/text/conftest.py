"""A tiny base with a tokenizer of words, and a library of it, for tests of routes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moezoo.domains.text import library as collecting
from moezoo.domains.text.gradients import gradient_features
from moezoo.domains.text.library import BaseDecoder, open_base
from moezoo.nn import module
from moezoo.weights import hf
from moezoo.weights.library import Library, create, forms
from tests.weights.libraries import CONFIG, decoder, member

PROMPTS = ["a b", "c", "d e a"]
WORDS = ["<end>", "<s>", "\n", "a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny decoder, with a tokenizer of words."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    parts = module.split(decoder())
    hf.save(path, CONFIG, parts.params | parts.stats)
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="e")  # noqa: S106
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"eos_token": "<end>", "bos_token": "<s>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseDecoder:
    return open_base(folder)


@pytest.fixture(scope="module")
def held(base: BaseDecoder, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Three members whose embeddings are those of a prompt each: of the prompts in PROMPTS."""
    rows = [collecting.prompt_tokens(base, prompt) for prompt in PROMPTS]
    vectors = collecting.embeddings(base, rows)
    members = [
        member(f"a{i}", i, scale=2.0, tasks=(f"t{i}",), embedding_M=vectors[i]) for i in range(3)
    ]
    found = gradient_features(base.model, forms(members[0]), rows, base.tokenizer.pad)
    members = [one._replace(gradient_M=v) for one, v in zip(members, found, strict=True)]
    return create(tmp_path_factory.mktemp("library") / "lib", base.told, members, clusters=2)
