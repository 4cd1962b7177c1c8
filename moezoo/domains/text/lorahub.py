"""LoraHub: weights of a library's members that suit a few examples, searched without gradients.

Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
arXiv:2307.13269: with A = sum of w A_e and B = sum of w B_e, w minimises

    loss of the examples + 0.05 mean |w|,    |w| <= 1.5, beginning with 0

by a gradient-free optimiser (theirs is nevergrad's CMA-ES or so by its default rule; here an
evolution strategy of our own, of as many evaluations). The weights are constant then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.backbones.generate import padded
from moezoo.domains.text.data.encode import EncodedDocument, encode
from moezoo.domains.text.data.example import Turn
from moezoo.domains.text.library import BaseDecoder, check_library_base, copied
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.tasks.language import token_loss
from moezoo.weights import library_bank
from moezoo.weights.library import Library

LARGEST, PENALTY, EVALUATIONS = 1.5, 0.05, 40


def searched(
    loss: Callable[[np.ndarray], float], count: int, rng: np.random.Generator, evaluations: int
) -> np.ndarray:
    """The best weights [E] that an evolution strategy of one parent finds; 0 is evaluated first.

    The step grows by success and shrinks by failure, so that a fifth of the steps succeed.
    """
    best_E, step = np.zeros(count), 0.5
    least = loss(best_E)
    if not np.isfinite(least):  # nothing would ever be less
        raise UserError(f"Without any adapter the loss is {least}: the base or the library is bad.")
    for _ in range(evaluations - 1):
        tried_E = np.clip(best_E + step * rng.normal(size=count), -LARGEST, LARGEST)
        if (value := loss(tried_E)) < least:
            best_E, least, step = tried_E, value, step * 1.5
        else:
            step *= 1.5**-0.25
    return best_E


def composed(
    base: BaseDecoder,
    library: Library,
    examples: Sequence[tuple[str, str]],
    seed: int = 0,
    evaluations: int = EVALUATIONS,
) -> dict[str, float]:
    """Each member's weight for what (prompt, answer) pairs show.

    Raises UserError without an example, for a decoder that is not the library's, and where its own
    loss of the examples is no number.
    """
    if evaluations < 1:
        raise UserError(f"evaluations is {evaluations}: at least one set of weights is tried.")
    if not examples:
        raise UserError("LoraHub needs examples: give at least one prompt with its answer.")
    check_library_base(library, base)
    model = copied(base.model)
    make = library_bank.shares_routers(library.names)
    library_bank.attach_bank(model, library, library.names, make, "factors")
    parts = module.split(model)
    tokens_BT, answer_BT = _rows(base, examples)

    def loss(weights_E: np.ndarray) -> float:
        shares_1E = jnp.asarray(weights_E[None], jnp.float32)
        value = _loss(*parts, tokens_BT, answer_BT, shares_1E)
        return float(value) + PENALTY * float(np.abs(weights_E).mean())

    rng = np.random.default_rng(seed)
    found_E = searched(loss, len(library.names), rng, evaluations)
    return dict(zip(library.names, map(float, found_E), strict=True))


def _rows(base: BaseDecoder, examples: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] and, of the same shape, where an answer's tokens are."""
    documents = [_document(base, *pair) for pair in examples]
    longest = -(-max(len(d.tokens) for d in documents) // 16) * 16  # few shapes, few programs
    tokens_BT, _ = padded(
        [d.tokens.tolist() for d in documents], base.tokenizer.pad, "right", longest
    )
    answer_BT = np.zeros(tokens_BT.shape, bool)
    for row, document in zip(answer_BT, documents, strict=True):
        row[: len(document.answer)] = document.answer
    return tokens_BT, answer_BT


def _document(base: BaseDecoder, prompt: str, answer: str) -> EncodedDocument:
    pieces = base.template((Turn("user", prompt), Turn("assistant", answer)))
    document = encode(pieces, base.tokenizer, 2**20)
    assert document is not None  # no text is longer
    return document


@partial(jax.jit, static_argnums=0)
def _loss(
    definition: Any, params: Any, stats: Any, tokens_BT: Any, answer_BT: Any, shares_1E: Any
) -> jax.Array:
    """Mean -log probability of the answers' tokens; padding stands behind them and is not seen."""
    model = module.merge(definition, params, stats)
    context = Context(attributes_RA=shares_1E)
    logits_BTV = model.logits(model.features(tokens_BT, context).x_BTD, context)
    loss_BT = token_loss(logits_BTV[:, :-1], tokens_BT[:, 1:])
    asked_BT = answer_BT[:, 1:]
    return jnp.sum(jnp.where(asked_BT, loss_BT, 0.0)) / asked_BT.sum()
