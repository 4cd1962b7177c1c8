"""AdapterFusion: an adapter of every task, trained alone; then attention mixes them for a new one.

Pfeiffer, Kamath, Rückle, Cho, Gurevych: "AdapterFusion: Non-Destructive Task Composition for
Transfer Learning", EACL 2021, arXiv:2005.00247. It claims (abstract) to be better than full
fine-tuning and than multi-task learning on sixteen tasks, by leaving what each task has learned
untouched. Two stages, on a frozen decoder: "adapters", in which each learns its own task behind the
MLPs, and "fusion", in which they stand still and every layer learns to attend to them
(`nn.fused_adapters`) without being told a task:

    y = h + sum_j s_j z_j V,    s = softmax_j(h Q . z_j K),    loss + 0.01 sum over layers |I - V|^2

Where we differ: the paper adapts an encoder (BERT), here it is a decoder; its adapters have ReLU or
swish, ours GELU; all adapters learn in one run, each from its own task's tokens, there in a run
each. From the paper's equations and the weight of the loss in the authors' library; their code was
not run.

What we ran: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.fields import AxisSize, NotNegative, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import LanguageModel, StagedTraits, check_vocabulary, untaught
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn.domain_adapters import DomainAdapters, OwnAdapter
from moezoo.nn.fused_adapters import FusedAdapters, FusionAttention, OneOf
from moezoo.nn.injection import freeze
from moezoo.nn.surgery import find

TRAINED = {"adapters": ("layers/*/adapters/*",), "fusion": ("layers/*/mix/*",)}


@dataclass(frozen=True)
class AdapterFusionConfig(StagedTraits):
    """A frozen decoder with an adapter of every task behind its MLPs."""

    system: ClassVar[str] = "AdapterFusion"
    first_run: ClassVar[str] = "text/adapter_fusion_adapters_tiny"
    card: ClassVar[Card] = Card(
        title="AdapterFusion",
        paper="Pfeiffer et al., EACL 2021, arXiv:2005.00247",
        kind="an adapter of every task behind a frozen decoder's MLPs, then attention over them",
        parity="none: tested against the equations",
        headline="exact match 0.34 after the first stage, the task told, 0.02 fused, one seed",
    )

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    stage: Literal["adapters", "fusion"] = "fusion"
    """adapters: each learns its own task; fusion: they stand still, and attention learns to mix
    them. A run of the second stage starts from one of the first."""
    tasks: AxisSize = 16
    """Tasks with an adapter: those of the first stage's data, in their order."""
    bottleneck: AxisSize = 48
    """Hidden units of an adapter; the paper has a sixteenth of the width."""
    identity: NotNegative = 0.01
    """fusion: factor of the loss that keeps values near the identity."""

    def __post_init__(self) -> None:
        check(self)
        if self.tasks < 2:
            raise UserError("tasks is 1, which leaves nothing to attend to: take 2 or more.")
        if self.decoder.experts.count:
            raise UserError("AdapterFusion stands behind MLPs, but the decoder has experts.")

    def beyond(self, groups: Sequence[str]) -> str | None:
        # Later tokens choose, whatever their task.
        return untaught(groups, self.tasks) if self.stage == self.first_stage else None

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("every token mixes all adapters, so none is chosen")

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> AdapterFusion:
        """The decoder; only what the stage trains is a parameter.

        Raises UserError as `LanguageConfig.build`.
        """
        check_vocabulary(self.decoder, tasks)
        return AdapterFusion(self, rngs=rngs)


class AdapterFusion(LanguageModel):
    """A decoder whose MLPs have adapters of all tasks behind them."""

    def __init__(self, config: AdapterFusionConfig, *, rngs: nnx.Rngs):
        super().__init__(config.decoder, rngs=rngs)
        self.options = config
        for layer in self.layers:
            layer.mlp = fused(config, layer.mlp, rngs)  # type: ignore[attr-defined]
        freeze(self, trained=TRAINED[config.stage])

    @property
    def balance_losses(self) -> Mapping[str, Any]:
        """None: nothing is chosen."""
        return {}

    def read(
        self, rows: Mapping[str, Array], *, key: Array | None = None, train: bool
    ) -> MultiTaskOutput:
        """As `LanguageModel.read`, and in the second stage's training how far values are from the
        identity."""
        output = super().read(rows, key=key, train=train)
        attention = find(self, FusionAttention).values()
        if not train or not attention or not self.options.identity:
            return output
        total = sum(layer.from_identity() for layer in attention)
        return output._replace(losses={"identity": self.options.identity * total})


def fused(config: AdapterFusionConfig, mlp: Any, rngs: nnx.Rngs) -> FusedAdapters:
    """The MLP of one layer with its adapters, in the configured stage."""
    width = config.decoder.width
    sizes = (config.tasks, width, config.bottleneck, width)
    adapters = DomainAdapters(*sizes, dtype=jnp.dtype(config.decoder.dtype), rngs=rngs)
    mix: Any = OneOf(OwnAdapter(config.tasks))
    if config.stage == "fusion":
        mix = FusionAttention(width, rngs=rngs)
    return FusedAdapters(mlp, adapters, mix)
