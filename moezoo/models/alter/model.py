"""ALTER, a reconstruction from its abstract: an adapter of every task, then a gate over them.

Xie et al.: "Making Small Language Models Better Multi-task Learners with Mixture-of-Task-Adapters"
(ALTER), WSDM 2024, arXiv:2309.11042. Known from the abstract alone: small language models get a
mixture of task adapters in their layers, which is to hold what tasks know and what they share, and
are trained in two stages, so that adapters cooperate at a small cost. Equations, what the router
reads, losses and numbers are not known to us, and no code was found.

This file is therefore NOT the paper's method, but the smallest that its abstract describes: beside
the MLP of some layers of a frozen decoder an adapter of every task, which first ("adapters") learns
its own task alone, and then ("gate") stands still while a linear gate of each token learns to mix
them all, without being told the task:

    y = W_out h + sum_t w_t D_t(h)      w: the token's task in stage 1, softmax(g h) in stage 2

What we ran: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.fields import AxisSize, Whole, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import LanguageModel, StagedTraits, check_vocabulary, untaught
from moezoo.nn.domain_adapters import (
    DomainAdapters,
    DomainMixture,
    MLPGate,
    OwnAdapter,
    beside,
)
from moezoo.nn.injection import freeze

TRAINED = {"adapters": ("layers/*/adapters/*",), "gate": ("layers/*/decide/*",)}


@dataclass(frozen=True)
class ALTERConfig(StagedTraits):
    """A frozen decoder with an adapter of every task beside its MLPs."""

    system: ClassVar[str] = "ALTER"
    first_run: ClassVar[str] = "text/alter_adapters_tiny"
    card: ClassVar[Card] = Card(
        title="ALTER (reconstruction from the abstract)",
        paper="Xie et al., WSDM 2024, arXiv:2309.11042",
        kind="an adapter of every task beside a frozen decoder's MLPs, then a gate over all",
        parity="none: no code was found, and equations are not known",
        headline="exact match 0.37 after the first stage, the task told, 0.07 gated, one seed",
    )

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    stage: Literal["adapters", "gate"] = "gate"
    """adapters: each learns its own task; gate: they stand still, and a gate learns to mix them. A
    run of the second stage starts from one of the first."""
    tasks: AxisSize = 17
    """Tasks with an adapter, the data's in their order."""
    layers: tuple[Whole, ...] = (7, 11)
    """The layers with adapters, counted from 0."""
    bottleneck: AxisSize = 64
    """Hidden units of an adapter."""

    def __post_init__(self) -> None:
        check(self)
        outside = [layer for layer in self.layers if not 0 <= layer < self.decoder.depth]
        if outside or not self.layers or len(set(self.layers)) < len(self.layers):
            raise UserError(
                f"layers is {self.layers}; name different layers from 0 to "
                f"{self.decoder.depth - 1}."
            )
        if self.tasks < 2:
            raise UserError("tasks is 1, which leaves a gate nothing to choose: take 2 or more.")
        if self.decoder.experts.count:
            raise UserError("ALTER's adapters stand beside MLPs, but the decoder has experts.")

    def beyond(self, groups: Sequence[str]) -> str | None:
        # Later tokens choose, whatever their task.
        return untaught(groups, self.tasks) if self.stage == self.first_stage else None

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("every token mixes all adapters, so none is chosen")

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> ALTER:
        """The decoder; only what the stage trains is a parameter.

        Raises UserError as `LanguageConfig.build`.
        """
        check_vocabulary(self.decoder, tasks)
        return ALTER(self, rngs=rngs)


class ALTER(LanguageModel):
    """A decoder some of whose MLPs have adapters of all tasks beside them."""

    def __init__(self, config: ALTERConfig, *, rngs: nnx.Rngs):
        super().__init__(config.decoder, rngs=rngs)
        for number in config.layers:
            layer: Any = self.layers[number]
            layer.mlp = mixture(config, layer.mlp, rngs)
        freeze(self, trained=TRAINED[config.stage])

    @property
    def balance_losses(self) -> Mapping[str, Any]:
        """None: nothing is chosen."""
        return {}


def mixture(config: ALTERConfig, mlp: Any, rngs: nnx.Rngs) -> DomainMixture:
    """The MLP of one layer with its adapters, in the configured stage."""
    decoder = config.decoder
    sizes = (config.tasks, decoder.hidden, config.bottleneck, decoder.width)
    adapters = DomainAdapters(*sizes, dtype=jnp.dtype(decoder.dtype), rngs=rngs)
    decide: Any = OwnAdapter(config.tasks)
    if config.stage == "gate":
        decide = MLPGate(decoder.hidden, 1, config.tasks, layers=1, dropout=0.0, rngs=rngs)
    return DomainMixture(mlp, adapters, decide, beside)
