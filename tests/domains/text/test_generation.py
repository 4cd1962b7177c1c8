"""Answers of a Hugging Face folder: templates, stop tokens, and the obvious loop over logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.generate import Settings, greedy
from moezoo.domains.text.adapter import TEMPLATE, begin_and_end, published_beside, trained_beside
from moezoo.domains.text.data.tokenizer import HFTokenizer
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.generation import choice, open_speaker, speech_of_folder, speech_of_run
from moezoo.domains.text.inference import asks_for_task, complete, tokens_of
from moezoo.errors import UserError
from moezoo.front.catalogue import configuration
from moezoo.nn import module
from moezoo.train.start import parts_of
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
    tokenizer.add_special_tokens(WORDS[-2:])
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
    begin = WORDS.index("<|im_start|>")
    made = tokens_of(open_speaker(folder, "chatml"), "a")
    assert made[:4] == [1, begin, WORDS.index("user"), WORDS.index("a")]
    assert made[4:6] == [begin + 1, begin]  # and the unknown word "assistant"
    assert tokens_of(open_speaker(folder, "plain"), "a") == [1, WORDS.index("a")]


def test_answers_stop_at_the_templates_end_mark(folder: Path, tmp_path: Path) -> None:
    """And at the tokens that the folder itself names, or else the tokenizer's end token."""
    end, mark = WORDS.index("<end>"), WORDS.index("<|im_end|>")
    stops = {None: (end,), "plain": (end,), "chatml": (mark, end)}
    assert {name: open_speaker(folder, name).stop for name in stops} == stops
    shutil.copytree(folder, named := tmp_path / "named")
    (named / "generation_config.json").write_text('{"eos_token_id": [5, 0]}')
    stops = {None: (5, end), "plain": (end, 5), "chatml": (mark, end, 5)}
    assert {name: open_speaker(named, name).stop for name in stops} == stops


def test_a_merged_decoder_names_what_ends_its_answers(folder: Path, tmp_path: Path) -> None:
    tokenizer = HFTokenizer(folder)
    data = TextDataConfig(tokenizer=str(folder))
    assert begin_and_end(data, tokenizer) == {"bos_token_id": 1, "eos_token_id": 0}
    wanted = [WORDS.index("<|im_end|>"), 0]
    given = begin_and_end(replace(data, template="chatml"), tokenizer)
    assert given == {"bos_token_id": 1, "eos_token_id": wanted}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert hf.stop_tokens(tmp_path) == tuple(wanted)


def test_a_folder_written_from_a_run_is_asked_by_its_template(folder: Path, tmp_path: Path) -> None:
    """And keeps it where it is written again."""
    end, mark = WORDS.index("<end>"), WORDS.index("<|im_end|>")
    data = TextDataConfig(tokenizer=str(folder), template="chatml")
    shutil.copytree(folder, merged := tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | trained_beside(data).more))
    assert speech_of_folder(merged).stop == (mark, end) == speech_of_run(data).stop
    speakers = [open_speaker(merged), open_speaker(folder, "chatml")]
    assert tokens_of(speakers[0], "a") == tokens_of(speakers[1], "a")
    assert speech_of_folder(merged, "plain").stop == (end, mark)  # a given one counts more
    assert published_beside(merged).more[TEMPLATE] == "chatml"
    (merged / "config.json").write_text(json.dumps(config | {TEMPLATE: ["chatml"]}))
    with pytest.raises(UserError, match="moezoo_template in .*merged"):
        open_speaker(merged)


def test_a_folder_without_the_marks_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, bare := tmp_path / "bare")
    text = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(json.dumps(text | {"added_tokens": []}))
    assert open_speaker(bare, "plain").stop == (WORDS.index("<end>"),)
    with pytest.raises(UserError, match="would spell out the template's mark <.im_start.>"):
        tokens_of(open_speaker(bare, "chatml"), "a")


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
        with pytest.raises(UserError, match="must lie between"):
            choice(temperature, 1.0)


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("alter_adapters_tiny", True),
        ("mixda_domains_tiny", True),
        ("adapter_fusion_adapters_tiny", True),
        ("mocle_tiny", True),
        ("smora_tiny", False),
    ],
)
def test_models_whose_tasks_decide_ask_for_one(name: str, asks: bool) -> None:
    assert asks_for_task(module.merge(*parts_of(configuration(f"text/{name}")))) == asks
