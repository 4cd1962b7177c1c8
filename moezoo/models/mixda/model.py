"""MixDA: adapters of domains beside a frozen decoder's MLPs, then a gate over them and a task.

Diao, Xu, Xu, Wang, Zhang: "Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to
Pre-trained Language Models Memories", ACL 2023, arXiv:2306.05406. Two stages. First ("domain") the
adapters of a few layers learn their domains' texts, and on other texts to give what the frozen
network gives, so that nothing old is lost there. Then ("task") they stand still; a gate mixes them
with the network, and a small adapter behind it learns the task (`nn.domain_adapters`):

    stage 1   lm(text) + w mean_j |D_j(h) - W_out h|^2 on general text
    stage 2   y = sum_j w_j D_j(h) + w_{J+1} W_out h,   y + U silu(V y)

What the paper claims (table 2, RoBERTa-large, averages): 52.2 against 48.9 of full fine-tuning and
48.7 of a Pfeiffer adapter. Not verified.

The paper adapts an encoder whose gate reads the last position of a text. On a causal decoder each
token decides. In its first stage one adapter learns one domain at a time; here all do at once, and
the domain of a text's task says which (`domains`): its adapter and the network have half each, so
that the mixture is convex as in the second stage, while general text passes through the network
alone and teaches adapters by imitation only.

What we ran, and what came out: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.fields import AxisSize, NotNegative, Share, Whole, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import LanguageModel, StagedTraits, check_vocabulary
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn.adapters import Bottleneck
from moezoo.nn.domain_adapters import (
    DomainAdapters,
    DomainMixture,
    DomainRecord,
    DomainTable,
    MLPGate,
    TaskAdapter,
)
from moezoo.nn.injection import freeze
from moezoo.nn.surgery import find

TRAINED = {
    "domain": ("layers/*/adapters/*",),
    "task": ("layers/*/decide/*", "layers/*/mlp/adapter/*"),
}


@dataclass(frozen=True)
class MixDAConfig(StagedTraits):
    """A frozen decoder with adapters of domains; the defaults are the published sizes."""

    system: ClassVar[str] = "MixDA"
    first_stage: ClassVar[str] = "domain"
    first_run: ClassVar[str] = "text/mixda_domains_tiny"
    card: ClassVar[Card] = Card(
        title="MixDA",
        paper="Diao et al., ACL 2023, arXiv:2306.05406",
        kind="adapters of domains beside a frozen decoder's MLPs, which are a choice themselves",
        parity="the published code: gate, adapters, mixture",
        fixtures=("dyt_mosa_mixda",),
        trained=("text/mixda_domains_tiny",),
        headline="two domains: exact match 0.015, old instructions still 0.750, one seed",
    )

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    stage: Literal["domain", "task"] = "task"
    """domain: adapters learn their domains; task: they stand still, gate and task adapters learn.
    A run of the second stage starts from one of the first."""
    layers: tuple[Whole, ...] = (7, 11)
    """The layers with adapters, counted from 0."""
    domains: tuple[Whole, ...] = (1,)
    """The domain of each of the data's tasks, in their order, counted from 1; 0: general text.
    Tasks that are not named are general. Their largest is the number of domains."""
    bottleneck: AxisSize = 256
    """Hidden units of a domain's adapter."""
    imitation: NotNegative = 2.0
    """domain: factor of the loss that adapters give what the MLP gives on general text."""
    gate_hidden: AxisSize = 768
    """Hidden units of the gate's layers."""
    gate_dropout: Share = 0.2
    """Share of the gate's inputs that are set to 0 in training."""
    reduction: AxisSize = 16
    """Width over the hidden units of the task's adapter."""

    def __post_init__(self) -> None:
        check(self)
        outside = [layer for layer in self.layers if not 0 <= layer < self.decoder.depth]
        if outside or not self.layers or len(set(self.layers)) < len(self.layers):
            raise UserError(
                f"layers is {self.layers}; name different layers from 0 to "
                f"{self.decoder.depth - 1}."
            )
        known = set(self.domains) - {0}
        if known != set(range(1, len(known) + 1)) or not known:
            raise UserError(
                f"domains is {self.domains}; domains are numbered from 1 without a gap, and there "
                "must be one."
            )
        if self.decoder.experts.count:
            raise UserError("MixDA's adapters stand beside MLPs, but the decoder has experts.")
        if self.decoder.layers == "scanned" and self.decoder.depth != len(self.layers):
            raise UserError(
                "Only some layers have adapters, so they are no repetition of one: take "
                "model.decoder.layers unrolled."
            )
        if self.reduction > self.decoder.width:
            raise UserError(
                f"reduction is {self.reduction}, more than the width {self.decoder.width}: the "
                "task's adapter needs a hidden unit."
            )

    @property
    def count(self) -> int:
        """J, the number of domains."""
        return max(self.domains)

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("every token mixes all adapters, so none is chosen")

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> MixDA:
        """The decoder; only what the stage trains is a parameter.

        Raises UserError as `LanguageConfig.build`.
        """
        check_vocabulary(self.decoder, tasks)
        return MixDA(self, rngs=rngs)


class MixDA(LanguageModel):
    """A decoder some of whose MLPs are mixtures of domains."""

    def __init__(self, config: MixDAConfig, *, rngs: nnx.Rngs):
        super().__init__(config.decoder, rngs=rngs)
        self.options = config
        for number in config.layers:
            layer: Any = self.layers[number]
            layer.mlp = MAKE[config.stage](config, layer.mlp, rngs)
        freeze(self, trained=TRAINED[config.stage])

    @property
    def balance_losses(self) -> Mapping[str, Any]:
        """None: nothing is chosen."""
        return {}

    def read(
        self, rows: Mapping[str, Array], *, key: Array | None = None, train: bool
    ) -> MultiTaskOutput:
        """As `LanguageModel.read`, and in the first stage's training the imitation on general
        text."""
        output = super().read(rows, key=key, train=train)
        if not train or self.options.stage != "domain" or not self.options.imitation:
            return output
        tables = find(self, DomainTable)
        (table, *_) = tables.values()
        terms = [imitation(record, table) for record in output.records.values()]
        return output._replace(losses={"imitation": self.options.imitation * sum(terms)})


def imitation(record: Any, table: DomainTable) -> Array:
    """The mean over general tokens of how far adapters are from the MLP; 0 where there are none."""
    found: DomainRecord = record
    general_N = found.routing.mask_N & (table.of_tokens(found.task_N) == 0)
    total = jnp.sum(jnp.where(general_N, found.imitation_N, 0.0))
    return total / jnp.maximum(jnp.sum(general_N), 1)


def adapters_of(config: MixDAConfig, rngs: nnx.Rngs) -> DomainAdapters:
    """Fresh adapters of one layer."""
    decoder = config.decoder
    sizes = (config.count, decoder.hidden, config.bottleneck, decoder.width)
    return DomainAdapters(*sizes, dtype=jnp.dtype(decoder.dtype), rngs=rngs)


def by_domain(config: MixDAConfig, mlp: Any, rngs: nnx.Rngs) -> nnx.Module:
    """The first stage's MLP."""
    return DomainMixture(mlp, adapters_of(config, rngs), DomainTable(config.domains, config.count))


def by_gate(config: MixDAConfig, mlp: Any, rngs: nnx.Rngs) -> nnx.Module:
    """The second stage's MLP, with the task's adapter behind it."""
    decoder = config.decoder
    gate = MLPGate(
        decoder.hidden,
        config.gate_hidden,
        config.count + 1,
        dropout=config.gate_dropout,
        rngs=rngs,
    )
    mixture = DomainMixture(mlp, adapters_of(config, rngs), gate)
    hidden = decoder.width // config.reduction
    options: dict[str, Any] = {"activation": jax.nn.silu, "dtype": jnp.dtype(decoder.dtype)}
    return TaskAdapter(mixture, Bottleneck(decoder.width, hidden, rngs=rngs, **options))


MAKE = {"domain": by_domain, "task": by_gate}
