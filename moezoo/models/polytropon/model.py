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

Few-shot adaptation begins with such a model (`start_from`) and trains a part of it: `trained` table
is MHR-z, a new table on skills that are held, `trained` skills is MHR-mu, skills under even shares.
What we ran: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flax import nnx

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Positive
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import AdaptedDecoderConfig, left_over
from moezoo.nn.lowrank import LowRank
from moezoo.nn.skill_tables import EvenRouter, skill_mixture


@dataclass(frozen=True)
class PolyConfig(AdaptedDecoderConfig):
    """A frozen decoder with skills that a table of tasks mixes; the defaults are Polytropon's."""

    card: ClassVar[Card] = Card(
        title="Polytropon, MHR",
        paper="Ponti et al., 2022, arXiv:2202.13914; Caccia et al., NeurIPS 2023, arXiv:2211.03831",
        kind="on a frozen decoder every task mixes the factors of a few LoRAs, by a learned table",
        parity="the published code and PEFT's Poly",
        fixtures=("poly_mhr",),
        trained=("text/polytropon_tiny",),
        headline="exact match 0.552 on the nine tasks of text/smora_tiny, one seed",
    )

    learned_by: ClassVar[str] = "a run of model.trained all (text/polytropon_tiny)"

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

    trained: Literal["all", "table", "skills"] = "all"
    """What is trained: all; the table alone (MHR-z; take tasks 1, so that it begins fresh); or the
    skills alone, under even shares without a table (MHR-mu)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skills < 2:
            raise UserError("skills is 1, which leaves a table nothing to choose: take 2 or more.")

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("every task mixes all skills, so none is chosen")

    def beyond(self, groups: Sequence[str]) -> str | None:
        if self.trained == "skills":  # without a table
            return None
        said = f"no row of the table (model.tasks {self.tasks}), so they mix all skills evenly"
        return left_over(groups, self.tasks, said)

    def make_update(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> LowRank:
        """Skills of a layer and their table; UserError for heads that do not divide the layer."""
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("tasks", "skills", "heads", "shares", "noise", "pace", "alpha", "dropout")
        }
        if self.trained == "skills":
            options["router"] = EvenRouter(self.heads * self.skills, self.heads)
        return skill_mixture(inputs, outputs, self.rank, **options, rngs=rngs)

    def router_computes(self) -> tuple[str, ...]:
        return "heads", "shares", "pace"

    def still(self) -> tuple[str, ...]:
        return ("down", "up") if self.trained == "table" else ()
