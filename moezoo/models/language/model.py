"""The base of every mixture on text: a decoder whose parameters are all trained.

Llama or Qwen by its sizes (`backbones.decoder`), with experts in its MLPs Mixtral, Qwen2-MoE,
Qwen3-MoE, OLMoE, dots.llm1, GLM-4.5 or DeepSeek; it reads rows of packed documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.fields import check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import LanguageModel, LanguageTraits, Merging, check_vocabulary


@dataclass(frozen=True)
class LanguageConfig(LanguageTraits):
    """A decoder whose every parameter is trained."""

    card: ClassVar[Card] = Card(
        title="decoder for language",
        paper="",
        kind="a decoder trained whole, of three dense families or eight with experts; SMoRA's base",
        parity="transformers",
        fixtures=("smora",),
        trained=("text/skills_tiny",),
        headline="exact match 0.747 on the eight tasks of text/skills_tiny",
    )

    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        check(self)

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach this decoder nothing, and why (`balancing`)."""
        experts = self.decoder.experts
        if not experts.count:
            return balancing.nothing_chosen(self, tasks)
        load = balancing.none_of_them("its routers have no noise, so loads have no gradient")
        return {"load": load["load"]} | balancing.of_tasks(tasks)

    def merging(self) -> Merging:
        return "alone"

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> LanguageModel:
        """The freshly initialised model; `tasks` has the number of token ids as "lm".

        Raises UserError where the vocabulary is too small for them.
        """
        check_vocabulary(self.decoder, tasks)
        return LanguageModel(self.decoder, rngs=rngs)
