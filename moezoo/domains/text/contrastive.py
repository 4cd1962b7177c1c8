"""Training an embedding expert: a LoRA that brings queries near the documents that answer them.

RouterRetriever's members (Lee et al., arXiv:2409.02685; `retriever`): only queries are read with
the LoRA, so that all experts search one index that the base alone has made. With q a query's
embedding, d a document's, both of length 1, a batch of B queries with a relevant document each has

    loss = mean_i of -log( exp(q_i . d_i / T) / sum_j exp(q_i . d_j / T) )

(InfoNCE, van den Oord et al., arXiv:1807.03748) over the batch's own documents: the other queries'
are its negatives, but those that are relevant to a query too are none. The paper's recipe is rank
8, alpha 32, learning rate 1e-4 and batches of 256; its temperature is not known to us, and its
encoder is Contriever where ours is the mean of a decoder's last features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from moezoo.backbones.generate import padded
from moezoo.domains.text.library import BaseDecoder, copied, mean_features, prompt_tokens
from moezoo.domains.text.retriever import KnownQuery
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.injection import freeze, inject
from moezoo.nn.lowrank import LowRank, lora
from moezoo.ops.prototypes import of_unit_length

TARGETS = ("layers/*",)  # all linear layers of all blocks


@dataclass(frozen=True)
class ContrastiveOptions:
    """How an embedding expert is trained; defaults are those of `moezoo library contrast`."""

    rank: int
    alpha: float
    steps: int
    batch: int
    lr: float
    temperature: float
    seed: int


class QueryBatch(NamedTuple):
    """Queries' tokens [B, T] and mask, their documents' embeddings [B, D], and where document j
    answers query i as well [B, B], the diagonal left out."""

    tokens_BT: np.ndarray
    mask_BT: np.ndarray
    documents_BD: np.ndarray
    also_BB: np.ndarray


def info_nce(likeness_BB: Array, also_BB: Array, temperature: float) -> Array:
    """The mean loss of queries whose own document has their number, float32.

    likeness_BB: of query i and document j.   also_BB: bool, documents that are no negatives.
    """
    logits_BB = jnp.where(also_BB, -jnp.inf, likeness_BB.astype(jnp.float32) / temperature)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits_BB, axis=-1)))


def batches(
    queries: Sequence[KnownQuery],
    rows: Sequence[Sequence[int]],
    documents_ND: np.ndarray,
    options: ContrastiveOptions,
    pad: int = 0,
) -> Iterator[QueryBatch]:
    """Every step's batch: queries in a new order each time all were seen, of each one document.

    rows: the queries' tokens. A last batch that would be smaller is begun anew.
    """
    rng = np.random.default_rng(options.seed)
    size, longest = min(options.batch, len(queries)), -(-max(map(len, rows)) // 16) * 16
    order: list[int] = []
    for _ in range(options.steps):
        if len(order) < size:
            order = rng.permutation(len(queries)).tolist()
        chosen, order = order[:size], order[size:]
        documents = np.array([rng.choice(queries[i].relevant) for i in chosen])
        also_BB = np.array([np.isin(documents, queries[i].relevant) for i in chosen])
        np.fill_diagonal(also_BB, False)
        tokens_BT, mask_BT = padded([rows[i] for i in chosen], pad, "right", longest)
        yield QueryBatch(tokens_BT, mask_BT, documents_ND[documents], also_BB)


def trained(
    base: BaseDecoder,
    queries: Sequence[KnownQuery],
    documents_ND: np.ndarray,
    options: ContrastiveOptions,
    say: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """A decoder with the trained LoRA on it; the base stays as it is.

    documents_ND: the base's embeddings of all documents. say: told step and loss. Raises UserError
    where there is nothing to learn from, and where training diverged.
    """
    check(queries, options)
    model = adapted(base, options)
    parts = module.split(model)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(options.lr))
    params, state = parts.params, optimiser.init(parts.params)

    @jax.jit
    def step(params: Any, state: Any, batch: QueryBatch) -> tuple[Any, Any, Array]:
        def loss(params: Any) -> Array:
            return batch_loss(
                module.merge(parts.definition, params, parts.stats), batch, options.temperature
            )

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    rows = [prompt_tokens(base, query.text) for query in queries]
    made = batches(queries, rows, documents_ND, options, base.tokenizer.pad)
    for number, batch in enumerate(made, 1):
        params, state, value = step(params, state, batch)
        if not np.isfinite(found := float(value)):
            raise UserError(f"The loss of step {number} is {found}: take a lower --lr.")
        say(number, found)
    return module.merge(parts.definition, params, parts.stats)


def adapted(base: BaseDecoder, options: ContrastiveOptions) -> Any:
    """The base with a fresh LoRA, which alone is a parameter."""
    model, rngs = copied(base.model), nnx.Rngs(options.seed)

    def make(inputs: int, outputs: int) -> LowRank:
        return lora(inputs, outputs, options.rank, alpha=options.alpha, rngs=rngs)

    inject(model, TARGETS, make)
    freeze(model)
    return model


def batch_loss(model: Any, batch: QueryBatch, temperature: float) -> Array:
    """InfoNCE of a batch, by the cosines of queries read by `model` with documents."""
    queries_BD = mean_features(model, batch.tokens_BT, batch.mask_BT)
    likeness_BB = of_unit_length(queries_BD) @ of_unit_length(jnp.asarray(batch.documents_BD)).T
    return info_nce(likeness_BB, jnp.asarray(batch.also_BB), temperature)


def check(queries: Sequence[KnownQuery], options: ContrastiveOptions) -> None:
    """Raise UserError for options out of range, and for queries that have no negatives."""
    for name in ("rank", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    for name in ("alpha", "lr", "temperature"):
        value = getattr(options, name)
        if not (0 < value < float("inf")):
            raise UserError(f"--{name} is {value}; it must be above 0.")
    if options.batch < 2:
        raise UserError(f"--batch is {options.batch}: a query needs another one's document.")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}; it must lie between 0 and 2^32 - 1.")
    relevant = {document for query in queries for document in query.relevant}
    if len(queries) < 2 or len(relevant) < 2:
        raise UserError(
            "All examples have the same relevant document, or there is one example, so nothing is "
            "a negative: give several with different documents."
        )
