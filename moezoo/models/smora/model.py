"""SMoRA: every rank of a LoRA an expert, few of them active for a token.

Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task
Learning" (arXiv:2501.15103). What it claims, as far as could be read (abstract and summaries by
others): on Llama-2-7B with FLAN, 8 active of 64 ranks beat LoRA with all 64 ranks by 1.73 % and the
top-1 mixture of LoRAs by 6.13 %; finer blocks are better.

A frozen linear layer W gets y = W x + (alpha / k) B (g * A x): a sigmoid score per rank of the same
x, plus a bias, decides for k ranks; their g are score plus bias over their sum, times k. After each
training step a bias moves by `rate` towards equal use (loss-free balancing, arXiv:2408.15664).

Where published code and paper differ the code is followed ("published" gate), and the paper's
softmax is an option. Where we differ from the code:
- the bias is never trained by the optimiser (there it is, by an oversight), moves once per step
  from the choices of the global batch, whatever the number of devices and slices, under
  rematerialisation as well, and padding is not counted;
- blocks of ranks are scored, balanced and chosen as wholes;
- single tokens and rows of any shape work, and so does removing the update.

Plain LoRA, rsLoRA and mixtures of LoRAs are the same module with other sizes: a mixture of N LoRAs
of rank r is a bank of N * r ranks in blocks of r.

What we ran, and what came out: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from flax import nnx

from moezoo.errors import UserError
from moezoo.fields import AxisSize, NotNegative, Positive
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import AdaptedDecoderConfig
from moezoo.nn.lowrank import (
    LowRank,
    check_blocks,
    check_choice,
    check_gate,
    check_ranks,
    lora,
    mixture,
    rank_experts,
    rs_lora,
    token_router,
)
from moezoo.ops.routing import Select, softmax_then_top_k, softmax_then_top_k_renormalised
from moezoo.ops.selection import check_learns, renormalised_among


@dataclass(frozen=True)
class SMoRAConfig(AdaptedDecoderConfig):
    """A frozen decoder with low-rank updates; the defaults are the paper's, r = 64 and k = 8."""

    card: ClassVar[Card] = Card(
        title="SMoRA, LoRA, rsLoRA, mixtures of LoRAs",
        paper="Zhao et al., KDD 2026, arXiv:2501.15103",
        kind="on a frozen decoder every rank of a LoRA is an expert, few active for a token",
        parity="the published code, PEFT and transformers",
        fixtures=("smora", "peft_lora"),
        trained=("text/smora_tiny",),
        headline="exact match 0.557 ± 0.026 at 8 of 64 ranks, LoRA with 8 ranks 0.388 ± 0.038",
    )

    update: Literal["smora", "lora", "rslora", "mixture"] = "smora"
    """What is added to each layer."""
    ranks: AxisSize = 64
    """Ranks of a layer in all."""
    active: AxisSize = 8
    """smora: ranks that are active for a token."""
    block: AxisSize = 1
    """smora: ranks that are chosen together."""
    gate: Literal["published", "unbiased", "softmax", "score"] = "published"
    """smora: what a chosen rank weighs: score + bias over the sum, score over the sum, softmax over
    the chosen logits, or the bare score, the only one with which a single active block (block equal
    to active) trains its router."""
    rate: NotNegative = 1e-5
    """smora: how far a bias moves in a step."""
    loras: AxisSize = 8
    """mixture: LoRAs that share the ranks evenly."""
    top_k: AxisSize = 2
    """mixture: LoRAs that are active for a token; all of them make a soft mixture."""
    selection: Literal["auto", "softmax_then_top_k", "softmax_then_top_k_renormalised"] = "auto"
    """mixture: how weights come from logits; auto: renormalised, and where top_k is 1 not, because
    a weight that is always 1 teaches the router nothing."""
    alpha: Positive = 16.0
    """Scale of the update: alpha / ranks (lora), / sqrt(ranks) (rslora), / ranks of a LoRA
    (mixture), / block (smora, whose weights add up to 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.ranks, self.loras if self.update == "mixture" else 1)
        if self.update == "smora":
            self._check_smora()
        if self.update == "mixture":
            self._check_mixture()

    def _check_smora(self) -> None:
        check_blocks(self.ranks, self.active, self.block)
        check_gate(self.gate, self.active // self.block, f"active and block are {self.active}")

    def _check_mixture(self) -> None:
        check_choice(self.top_k, self.loras)
        said = f"top_k is {self.top_k}, loras {self.loras} and selection {self.selection}"
        check_learns(SELECTIONS[self.selection](self.top_k), self.top_k, self.loras, said)

    def variant(self) -> str | None:
        return {
            "lora": f"plain LoRA of rank {self.ranks} on a frozen decoder (arXiv:2106.09685)",
            "rslora": f"rsLoRA of rank {self.ranks} on a frozen decoder (arXiv:2312.03732)",
            "mixture": f"a mixture of {self.loras} LoRAs on a frozen decoder, {self.top_k} active "
            "for a token",
        }.get(self.update)

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach these routers nothing, and why (`balancing`)."""
        if self.update not in ROUTED:
            return balancing.none_of_them(f"update {self.update} has no experts to balance")
        # The other losses read weights or probabilities, which have a gradient without noise.
        load = balancing.none_of_them("its routers have no noise, so loads have no gradient")
        return {"load": load["load"]} | balancing.of_tasks(tasks)

    @classmethod
    def check_stored(cls, values: Mapping[str, Any]) -> None:
        """Raise UserError for a stored configuration of a mixture that weighed its LoRA by 1."""
        top_1 = values.get("update") == "mixture" and values.get("top_k") == 1
        if top_1 and "selection" not in values:
            raise UserError(
                "This run's mixture of LoRAs (update mixture, top_k 1) was trained by a version "
                "whose router could not learn: train it again."
            )

    def router_computes(self) -> tuple[str, ...]:
        return DECIDES.get(self.update, ())

    def make_update(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> LowRank:
        """What is added to a layer of these sizes."""
        options = {"alpha": self.alpha, "dropout": self.dropout, "rngs": rngs}
        return KINDS[self.update](self, inputs, outputs, options)


def _smora(config: SMoRAConfig, inputs: int, outputs: int, options: Any) -> LowRank:
    own = {"active": config.active, "block": config.block, "gate": config.gate}
    return rank_experts(inputs, outputs, config.ranks, rate=config.rate, **own, **options)


def _mixture(config: SMoRAConfig, inputs: int, outputs: int, options: Any) -> LowRank:
    router = partial(token_router, select=SELECTIONS[config.selection](config.top_k))
    own = {"experts": config.loras, "k": config.top_k, "make_router": router}
    return mixture(inputs, outputs, config.ranks, **own, **options)


def _lora(config: SMoRAConfig, inputs: int, outputs: int, options: Any) -> LowRank:
    return lora(inputs, outputs, config.ranks, **options)


def _rs_lora(config: SMoRAConfig, inputs: int, outputs: int, options: Any) -> LowRank:
    return rs_lora(inputs, outputs, config.ranks, **options)


# Selections of a mixture by name, each for the number of LoRAs at work.
SELECTIONS: dict[str, Callable[[int], Select]] = {
    "auto": renormalised_among,
    "softmax_then_top_k": lambda k: softmax_then_top_k,
    "softmax_then_top_k_renormalised": lambda k: softmax_then_top_k_renormalised,
}
# A further mixture of LoRAs is a class of `nn.lowrank` and an entry here; one whose router chooses
# stands in DECIDES, too, with what its router is decided by, so that its balance losses apply.
DECIDES = {"smora": ("active", "block", "gate"), "mixture": ("top_k", "selection")}
ROUTED = tuple(DECIDES)
KINDS: dict[str, Callable[[SMoRAConfig, int, int, Any], LowRank]] = {
    "smora": _smora,
    "mixture": _mixture,
    "lora": _lora,
    "rslora": _rs_lora,
}
