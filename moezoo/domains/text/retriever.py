"""RouterRetriever: a library's adapters as embedding experts, one of which reads each query.

Lee, Soldaini, Cohan, Seo, Lo: "RouterRetriever: Routing over a Mixture of Expert Embedding Models",
arXiv:2409.02685. Documents are embedded by the base alone, so that all experts share one
index. For examples of every data set (queries whose documents are known) it is found which member
ranks best, by nDCG@10; those that a member wins in a data set become a pilot of its own, the mean
of the *base's* embeddings of them. A new query is embedded by the base, the member whose pilots are
most like it on average is chosen, and its embedding by that member searches the index:

    e = argmax_e mean over pilots p of e of sim(base(q), p),    search by base + LoRA_e of q

Nothing trains, so a further expert costs its adapter and its pilots. The published code takes the
single most similar pilot instead (`labelled_max`). The paper's encoder is Contriever with LoRAs
trained by a contrastive loss; here embeddings are the mean of the decoder's last features, cosines
compare them, and what members were trained for is the library's affair: `contrastive` trains such
members, a LoRA of language modelling is not expected to search well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo import regular
from moezoo.domains.text.library import (
    BaseDecoder,
    check_library_base,
    copied,
    embeddings,
    prompt_tokens,
)
from moezoo.errors import UserError
from moezoo.ops.prototypes import cosine, labelled_max, labelled_mean
from moezoo.schema_check import FormatFault, line, list_of, parse, table, whole
from moezoo.weights import library_bank
from moezoo.weights.library import Library

RANKS, AT_ONCE = 10, 32  # of nDCG@10; texts that are embedded at once
FORM = table(
    {"query": line(100_000), "relevant": list_of(whole(0, 10**9), 1, 10_000)},
    required=("query", "relevant"),
)
OverPilots = Callable[[Array, Array, int], Array]
GATHER: dict[str, OverPilots] = {"mean": labelled_mean, "max": labelled_max}


class KnownQuery(NamedTuple):
    """A query and the numbers of the documents that answer it, counted from 0."""

    text: str
    relevant: tuple[int, ...]


class Pilots(NamedTuple):
    """Means of base embeddings [P, D], and the place of the member [P] that each stands for."""

    vectors_PD: np.ndarray
    members_P: np.ndarray


def read_queries(file: Path, documents: int) -> list[KnownQuery]:
    """The queries of a file of JSON lines, {"query": "...", "relevant": [0, 7]}.

    Raises UserError, with file and line, for what is damaged or names a document that is not there.
    """
    content = regular.read(file, 64 * regular.MB, UserError, "name a file of JSON lines")
    found = []
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            value = parse(text)
            FORM(value, "")
            if not value["query"].strip():
                raise FormatFault("its query is empty")
            if max(value["relevant"]) >= documents:
                raise FormatFault(
                    f"it names document {max(value['relevant'])}, but there are {documents}, "
                    "counted from 0"
                )
        except FormatFault as error:
            raise UserError(f"{file}, line {number}: {error}.") from error
        found.append(KnownQuery(value["query"], tuple(sorted(set(value["relevant"])))))
    if not found:
        raise UserError(f"{file} contains no queries.")
    return found


def ndcg(scores_N: np.ndarray, relevant: Sequence[int]) -> float:
    """nDCG@10 of documents ranked by scores, each relevant or not; of equal scores the first."""
    best = np.argsort(-scores_N, kind="stable")[:RANKS]
    gains = 1 / np.log2(np.arange(RANKS) + 2)
    gained = gains[: len(best)][np.isin(best, relevant)].sum()
    return float(gained / gains[: len(relevant)].sum())


def embedded_by(encoder: BaseDecoder, texts: Sequence[str]) -> np.ndarray:
    """Embeddings [N, D] of texts, a few at a time."""
    rows = [prompt_tokens(encoder, text) for text in texts]
    pieces = (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))
    return np.concatenate([embeddings(encoder, piece) for piece in pieces])


def mean_gain(
    encoder: BaseDecoder, queries: Sequence[KnownQuery], documents_ND: np.ndarray
) -> float:
    """Mean nDCG@10 of queries that an encoder reads, over an index of document embeddings."""
    own_BD = jnp.asarray(embedded_by(encoder, [query.text for query in queries]))
    scores_BN = np.asarray(cosine(own_BD, jnp.asarray(documents_ND)))
    return float(np.mean([ndcg(s, q.relevant) for s, q in zip(scores_BN, queries, strict=True)]))


class Retriever:
    """A base and a library whose members embed queries.

    Raises UserError where the decoder is not the library's.
    """

    def __init__(self, base: BaseDecoder, library: Library):
        check_library_base(library, base)
        self.base, self.library = base, library

    def embedded(self, texts: Sequence[str], member: str | None = None) -> np.ndarray:
        """Embeddings [N, D] by the base, or by a member; documents are embedded by the base."""
        encoder = self.base
        if member is not None:
            model = copied(self.base.model)
            library_bank.attach_merged(model, self.library, {member: 1.0})
            encoder = self.base._replace(model=model)
        return embedded_by(encoder, texts)

    def pilots(self, data_sets: Sequence[Sequence[KnownQuery]], documents_ND: np.ndarray) -> Pilots:
        """A pilot for every member that is the best for queries of a data set; of equally good ones
        the library's first."""
        vectors, members = [], []
        for queries in data_sets:
            texts = [query.text for query in queries]
            reached_EB = np.stack(
                [
                    [ndcg(s, q.relevant) for s, q in zip(scores_BN, queries, strict=True)]
                    for scores_BN in self._scores(texts, documents_ND)
                ]
            )
            best_B, own_BD = reached_EB.argmax(0), self.embedded(texts)
            for member in np.unique(best_B):
                vectors.append(own_BD[best_B == member].mean(0))
                members.append(member)
        return Pilots(np.stack(vectors), np.asarray(members, np.int32))

    def _scores(self, texts: Sequence[str], documents_ND: np.ndarray) -> list[np.ndarray]:
        """Of every member the cosines [B, N] of queries with documents."""
        index = jnp.asarray(documents_ND)
        encoded = (self.embedded(texts, name) for name in self.library.names)
        return [np.asarray(cosine(jnp.asarray(own_BD), index)) for own_BD in encoded]

    def chosen(
        self, texts: Sequence[str], pilots: Pilots, gather: OverPilots = labelled_mean
    ) -> list[str | None]:
        """The member that reads each query; None, the base, where all members are as like to it."""
        likeness_BP = cosine(jnp.asarray(self.embedded(texts)), jnp.asarray(pilots.vectors_PD))
        members = len(self.library.names)
        scores_BE = np.asarray(gather(likeness_BP, jnp.asarray(pilots.members_P), members))
        known_E = np.isin(np.arange(members), pilots.members_P)
        even_B = (np.ptp(scores_BE[:, known_E], axis=1) == 0) & (known_E.sum() > 1)
        best = scores_BE.argmax(1)
        return [
            None if even else self.library.names[e] for e, even in zip(best, even_B, strict=True)
        ]

    def search(
        self, texts: Sequence[str], readers: Sequence[str | None], documents_ND: np.ndarray
    ) -> np.ndarray:
        """Cosines [B, N] of each query, embedded by its own reader, with the documents."""
        found_BN = np.empty((len(texts), len(documents_ND)), np.float32)
        for reader in dict.fromkeys(readers):
            places = [i for i, name in enumerate(readers) if name == reader]
            own_BD = jnp.asarray(self.embedded([texts[i] for i in places], reader))
            found_BN[places] = np.asarray(cosine(own_BD, jnp.asarray(documents_ND)))
        return found_BN


def retrieved(
    retriever: Retriever,
    texts: Sequence[str],
    documents: Sequence[str],
    data_sets: Mapping[Path, Sequence[KnownQuery]],
    gather: OverPilots,
    count: int,
) -> list[tuple[str | None, list[int]]]:
    """Who reads each query, and the numbers of the `count` documents that fit it best."""
    documents_ND = retriever.embedded(documents)
    pilots = retriever.pilots(list(data_sets.values()), documents_ND)
    readers = retriever.chosen(texts, pilots, gather)
    scores_BN = retriever.search(texts, readers, documents_ND)
    order_BN = np.argsort(-scores_BN, axis=1, kind="stable")[:, :count]
    return list(zip(readers, order_BN.tolist(), strict=True))
