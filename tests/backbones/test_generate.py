"""Generation against one uncached pass per token; sampling by its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.generate import (
    Generated,
    Settings,
    generate,
    greedy,
    nucleus,
    padded,
    sampled,
)
from moezoo.errors import UserError
from moezoo.nn import module
from tests.backbones.test_decoder import apply, random_parts

V, NEW, PAD = 13, 7, 5
CONFIG = DecoderConfig(vocabulary=V, width=12, depth=2, heads=4, groups=2, hidden=10, head_width=4)
PARTS = random_parts(CONFIG, seed=3)
PROMPTS = [[1, 7, 3, 9, 2], [4], [8, 8, 6]]


@pytest.fixture(scope="module")
def by_hand() -> list[list[int]]:
    """The most likely token again and again, every row alone and without a cache."""
    made = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NEW):
            # One shape for all lengths: what is behind a token does not reach it.
            tokens = np.asarray([text + [0] * (12 - len(text))], np.int32)
            logits = apply(PARTS.definition, PARTS.params, tokens, {})
            text.append(int(np.argmax(logits[0, len(text) - 1])))
        made.append(text[len(prompt) :])
    assert len({tuple(row) for row in made}) == 3
    return made


def rows(found: Generated) -> list[list[int]]:
    tokens, lengths = np.asarray(found.tokens_BT), np.asarray(found.lengths_B)
    assert all((row[n:] == PAD).all() for row, n in zip(tokens, lengths, strict=True))
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def test_prompts_are_filled_up_on_one_side() -> None:
    left, right = padded([[1, 2, 3], [4]], 0), padded([[1, 2, 3], [4]], 0, "right", length=2)
    assert left.tokens_BT.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert left.mask_BT.tolist() == [[True] * 3, [False, False, True]]
    assert right.tokens_BT.tolist() == [[1, 2], [4, 0]]
    assert right.mask_BT.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_text_is_that_without_cache_or_padding(by_hand: list, side) -> None:
    tokens, mask = padded(PROMPTS, PAD, side)
    assert rows(generate(PARTS, tokens, Settings(new=NEW, pad=PAD), mask_BT=mask)) == by_hand


def test_an_ensemble_says_what_its_summed_logits_say() -> None:
    """Members that read a text of their own, by hand: their logits are added up at every step."""
    texts = [[1, 7, 3], [4, 4, 4], [2, 9, 8], [8, 8, 6]]
    shares = np.array([[1.0, 0.3], [-0.5, 1.0]], np.float32)
    wanted = []
    for prompt, own in enumerate(shares):
        members = [list(text) for text in texts[2 * prompt :][:2]]
        for _ in range(3):
            read = np.asarray([text + [0] * (12 - len(text)) for text in members], np.int32)
            logits = apply(PARTS.definition, PARTS.params, read, {})[:, len(members[0]) - 1]
            token = int(np.argmax(own @ np.asarray(logits)))
            members = [[*text, token] for text in members]
        wanted += [members[0][3:]] * 2
    settings = Settings(new=3, pad=PAD)
    assert rows(generate(PARTS, texts, settings, shares_BM=shares)) == wanted
    assert wanted != rows(generate(PARTS, texts, settings))
    drawn = Settings(new=3, choose=sampled(5.0), pad=PAD)
    found = rows(generate(PARTS, texts, drawn, shares_BM=shares))
    assert found[0] == found[1] and found[2] == found[3]


def test_rows_end_at_their_stop_token(by_hand: list) -> None:
    def ended(row: list[int], stop: int) -> list[int]:
        return row[: row.index(stop) + 1] if stop in row else row

    # A token that ends some rows early and others later or never.
    stop = next(s for s in range(V) if len({len(ended(row, s)) for row in by_hand}) > 1)
    tokens, mask = padded(PROMPTS, PAD, "right")
    found = generate(PARTS, tokens, Settings(new=NEW, stop=(stop, V + 1), pad=PAD), mask_BT=mask)
    assert rows(found) == [ended(row, stop) for row in by_hand]


@pytest.mark.slow
def test_sampling_follows_its_key_and_settings(by_hand: list) -> None:
    tokens, mask = padded(PROMPTS, PAD)

    def text(choose, key: int) -> list[list[int]]:
        settings = Settings(new=NEW, choose=choose, pad=PAD)
        return rows(generate(PARTS, tokens, settings, mask_BT=mask, key=jax.random.key(key)))

    hot = sampled(temperature=3.0)
    assert text(hot, 0) == text(hot, 0) != text(hot, 1)
    # The likeliest token alone reaches so small a share.
    assert text(sampled(3.0, top_p=1e-6), 2) == by_hand


def test_nucleus_is_the_smallest_set_that_reaches_the_share() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20, V)).astype(np.float32)
    found = np.asarray(nucleus(jnp.asarray(logits), 0.7))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, kept in zip(probs, found, strict=True):
        assert row[kept].sum() >= 0.7 > row[kept].sum() - row[kept].min()
        assert row[kept].min() >= row[~kept].max()


def test_frequencies_of_sampled_tokens() -> None:
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05])), (20_000, 4))
    draws = np.asarray(sampled(temperature=0.5, top_p=0.9)(logits, jax.random.key(0)))
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    kept = squared / squared.sum() * np.array([1, 1, 0, 0])  # 0.25 and 0.09 of 0.365: 93 %
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 2e4, kept / kept.sum(), atol=0.015)
    assert int(greedy(logits[:1], jax.random.key(0))[0]) == 0


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: sampled(temperature=0.0), "temperature is 0.0; it must lie between"),
        (lambda: sampled(top_p=1.5), "top_p is 1.5; it must be above 0 and at most 1"),
        (lambda: Settings(new=0), "new is 0; at least one token must be made"),
        (lambda: Settings(new=10**12), "and 1,048,576 at most"),
        (lambda: sampled(temperature=float("inf")), "temperature is inf; it must lie between"),
        (lambda: sampled(temperature=float("nan")), "temperature is nan; it must lie between"),
        (lambda: generate(PARTS, [[1, 99]], Settings(1)), "token 99, the model knows 0 to 12"),
        (lambda: generate(PARTS, [[1]], Settings(1), shares_BM=[[1, 1]]), "share for every row"),
        (
            lambda: generate(PARTS, [[1], [1]], Settings(1), mask_BT=[[True], [False]]),
            "Prompt 1 has no token",
        ),
        (lambda: generate(PARTS, [1, 2], Settings(1)), r"must be \[rows, tokens\]"),
    ],
)
def test_bad_requests(attempt, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attempt()


def test_logits_that_are_not_finite_are_refused() -> None:
    """Of the prompt that has them, and not where a row has ended before."""
    params = module.flatten(PARTS.params)
    table = np.array(params["embed/table"])
    table[4] = np.inf
    broken = PARTS._replace(params=module.unflatten(params | {"embed/table": table}))
    tokens, mask = padded([[1, 7], [4]], PAD)
    with pytest.raises(UserError, match="logits of prompt 1 are not finite"):
        generate(broken, tokens, Settings(new=NEW, pad=PAD), mask_BT=mask)
