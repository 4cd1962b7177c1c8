"""Polytropon and multi-head routing: every task mixes the factors of a few LoRAs.

Ponti et al., "Combining Modular Skills in Multitask Learning" (arXiv:2202.13914), and Caccia et
al., "Multi-Head Adapter Routing for Cross-Task Generalization" (arXiv:2211.03831), which claims
(abstract) that heads are better than Poly at an equal budget, and that most of the gain is left
where shares are even (MHR-mu).

A frozen linear layer W gets y = W x + (alpha / r) x A B with, for head q of S,

    w_q = sigmoid(z_tq) / sum_e sigmoid(z_tqe),   A_q = sum_e w_qe A_qe,   B_q = sum_e w_qe B_qe

z_tq the task's logits in a table of the layer's own. S = 1 is Polytropon. Where papers and code
(mttl) differ the code is followed: shares are soft unless `noise` is "relaxed". Where we differ
from the code:
- the published optimiser gives the table a learning rate of its own; here its logits are `pace`
  times a kernel, which is the same under Adam;
- no 1e-8 is added to the sum of sigmoids, whose share is computed by logarithms;
- rows that choose nobody ("rounded") keep their shares instead of dividing 0 by 1e-12;
- A begins as PyTorch's linear layers do, there it is uniform in +-1/sqrt(3 D).

A task that the table lacks mixes all skills evenly, as the last row of the published table does.
What we ran: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.fields import AxisSize, Positive, Share, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import (
    LanguageModel,
    LanguageTraits,
    adapted_decoder,
    check_targets,
    check_vocabulary,
)
from moezoo.nn.lowrank import LowRank
from moezoo.nn.skill_tables import skill_mixture


@dataclass(frozen=True)
class PolyConfig(LanguageTraits):
    """A frozen decoder with skills that a table of tasks mixes; the defaults are Polytropon's."""

    card: ClassVar[Card] = Card(
        title="Polytropon, MHR",
        paper="Ponti et al., 2022, arXiv:2202.13914; Caccia et al., NeurIPS 2023, arXiv:2211.03831",
        kind="on a frozen decoder every task mixes the factors of a few LoRAs, by a learned table",
        parity="the published code and PEFT's Poly",
        fixtures=("poly_mhr",),
        headline="exact match 0.552 on the nine tasks of text/smora_tiny, one seed",
    )

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    tasks: AxisSize = 17
    """Rows of the table. Tasks of a higher number mix all skills evenly."""
    skills: AxisSize = 8
    """LoRAs of a layer."""
    rank: AxisSize = 4
    """Rank of each."""
    heads: AxisSize = 1
    """Parts of a layer's inputs and outputs with shares of their own: 1 is Polytropon, more MHR."""
    shares: Literal["sigmoid", "length", "rounded", "corrected", "last_shared"] = "sigmoid"
    """How shares come from logits: sigmoids over their sum, logits over their length, rounded
    sigmoids over their sum, sigmoids times sqrt(heads / skills), or with a last skill for all."""
    noise: Literal["none", "relaxed"] = "none"
    """What training does to logits: nothing, or relaxed Bernoulli samples at temperature 1."""
    pace: Positive = 100.0
    """How much faster than the skills the table learns under Adam; published: 0.1 to 0.001."""
    alpha: Positive = 16.0
    """Scale of the update: alpha / rank."""
    dropout: Share = 0.0
    """Share of the update's inputs that are set to 0 in training."""
    targets: tuple[str, ...] = ("layers/*",)
    """The linear layers that get an update, by path; * stands for anything."""
    base_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the frozen arrays; None: the decoder's param_dtype."""

    def __post_init__(self) -> None:
        check(self)
        check_targets(self.targets)
        if self.skills < 2:
            raise UserError("skills is 1, which leaves a table nothing to choose: take 2 or more.")

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("every task mixes all skills, so none is chosen")

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> LanguageModel:
        """The decoder with its updates; only they and their tables are parameters.

        Raises UserError for targets that fit no layer or the head, heads that do not divide one,
        and as `LanguageConfig.build`.
        """
        check_vocabulary(self.decoder, tasks)
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("tasks", "skills", "heads", "shares", "noise", "pace", "alpha", "dropout")
        }

        def make(inputs: int, outputs: int) -> LowRank:
            return skill_mixture(inputs, outputs, self.rank, **options, rngs=rngs)

        return adapted_decoder(self.decoder, self.targets, make, self.base_dtype, rngs)
