"""Answers of a Hugging Face folder: templates, stop tokens, and the obvious loop over logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.generate import Settings, greedy
from moezoo.data.text.tokenizer import HFTokenizer
from moezoo.deploy.complete import choice, complete, open_speaker, tokens_of
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights import hf

WORDS = ["<end>", "<s>", "user", "a", "b", "c", "d", "e", "<|im_start|>", "<|im_end|>"]
SIZES = {"width": 8, "depth": 1, "heads": 2, "groups": 1, "hidden": 8, "length": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders") / "decoder"
    config = DecoderConfig(vocabulary=len(WORDS), **SIZES)
    params = module.split(config.build(nnx.Rngs(0))).params
    rng = np.random.default_rng(0)
    large = {k: rng.standard_normal(v.shape) for k, v in module.flatten(params).items()}
    hf.save(path, config, module.unflatten({k: v.astype(np.float32) for k, v in large.items()}))
    words = models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="e")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"eos_token": "<end>", "bos_token": "<s>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def by_hand(folder: Path, tokens: list[int], new: int, stop: int) -> list[int]:
    """The whole text through the model for every token, without a cache."""
    model = module.merge(*hf.load(folder).parts)
    made: list[int] = []
    for _ in range(new):
        logits = np.asarray(model(np.array([tokens + made])).logits_BTV)[0, -1]
        if int(logits.argmax()) == stop:
            break
        made.append(int(logits.argmax()))
    return made


@pytest.mark.slow
def test_answers_are_those_of_the_loop_by_hand(folder: Path) -> None:
    speaker = open_speaker(folder)
    prompts = ["a b c", "d"]
    found = complete(speaker, prompts, Settings(new=5))
    tokenizer = HFTokenizer(folder)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = tokens_of(speaker, prompt)
        assert tokens == [1, *tokenizer.encode(prompt)]
        assert answer == tokenizer.decode(by_hand(folder, tokens, 5, tokenizer.eos))


def test_a_template_puts_what_stands_before_an_answer(folder: Path) -> None:
    assert len(tokens_of(open_speaker(folder, "chatml"), "a")) > len(
        tokens_of(open_speaker(folder, "plain"), "a")
    )


def test_bad_prompts_and_names(folder: Path) -> None:
    with pytest.raises(UserError, match="template 'alpaca'"):
        open_speaker(folder, "alpaca")
    with pytest.raises(UserError, match="A prompt is empty"):
        complete(open_speaker(folder), [""], Settings(new=1))


def test_what_is_drawn() -> None:
    assert choice(0.0, 1.0) is greedy and choice(0.7, 0.9) is choice(0.7, 0.9)
    with pytest.raises(UserError, match="nothing is drawn"):
        choice(0.0, 0.9)
    for temperature in (-1.0, float("nan")):
        with pytest.raises(UserError, match="must be above 0"):
            choice(temperature, 1.0)
