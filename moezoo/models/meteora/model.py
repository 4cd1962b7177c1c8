"""MeteoRA: a gate in every linear layer chooses two of a library's LoRAs for each token.

Xu et al., "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models", arXiv:2405.13053. It
claims (abstract) to be as good as each task's own LoRA, and better on inputs that are several tasks
one after the other. A frozen linear layer W gets

    y = W x + s sum_(i in top-k) w_i x A_i B_i,    w = softmax over the kept (G x) / T

with G of each layer's own, and the loss asks every gate to know the task besides:

    next tokens + 50 mean over gates and tokens of -log softmax(G x)[task]

so LoRA number j becomes task j's. Where a `library` is given its LoRAs stand still and gates alone
are trained, as the paper says; without one, gates and LoRAs are trained together, as in the
released script, but from fresh LoRAs. Where we differ from the code:
- the temperature acts in training and generation alike; one of the code's three paths ignores it;
- a gate is compared with the task of its own token, there with the next one's, which is the same
  but where documents meet;
- the loss of next tokens covers what `--data.trained` says, there everything.

What we ran: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, FilePath, NotNegative, Positive
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.config import LibraryBank
from moezoo.models.shared.language import AdaptedDecoderConfig, OwnLosses, left_over
from moezoo.nn.lowrank import LowRank, check_choice, mixture, token_router
from moezoo.ops.prototypes import expert_cross_entropy
from moezoo.ops.routing import Select
from moezoo.ops.selection import Selected, top_k_then_softmax


def tempered(temperature: float) -> Select:
    """The k largest logits, softmax of these over a temperature."""

    def select(logits_NE: Array, k: int) -> Selected:
        return top_k_then_softmax(logits_NE / temperature, k)

    return select


@dataclass(frozen=True)
class GateLoss:
    """`weight` times the mean cross-entropy of all gates with the tokens' tasks.

    Tokens of tasks beyond the last LoRA have none.
    """

    weight: float

    def __call__(self, records: Mapping[str, Any]) -> dict[str, Array]:
        losses = []
        for record in records.values():
            logits_NE = record.routing.logits_NE
            known_N = record.routing.mask_N & (record.task_N < logits_NE.shape[-1])
            losses.append(expert_cross_entropy(logits_NE, jnp.where(known_N, record.task_N, -1)))
        return {"gate": self.weight * jnp.mean(jnp.stack(losses))}


@dataclass(frozen=True)
class MeteoRAConfig(AdaptedDecoderConfig):
    """A frozen decoder whose gates choose LoRAs that are each a task's."""

    card: ClassVar[Card] = Card(
        title="MeteoRA",
        paper="Xu et al., 2024, arXiv:2405.13053",
        kind="on a frozen decoder a gate in every layer, told the task in training, picks 2 LoRAs",
        parity="the published code's layers and gate loss",
        fixtures=("meteora",),
        trained=("text/meteora_tiny",),
        headline="exact match 0.135 with LoRAs that begin fresh: gates learn, LoRAs do not",
    )

    loras: AxisSize = 9
    """LoRAs of a layer, one for every task of the data."""
    rank: AxisSize = 8
    """Rank of each."""
    top_k: AxisSize = 2
    """LoRAs that are active for a token."""
    temperature: Positive = 1.0
    """Of the softmax over the kept logits; the authors take 15 to 30 for mixed inputs."""
    gate_weight: NotNegative = 50.0
    """Factor of the gates' cross-entropy with the tasks."""
    library: FilePath | None = None
    """Folder of a library (`moezoo library`) whose LoRAs stand still while gates learn to choose
    them; it has one member for every task of the data, and perhaps others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.top_k, self.loras)
        if self.top_k == 1 and self.gate_weight == 0:
            raise UserError(
                "top_k is 1 and gate_weight 0: a single LoRA's weight is always 1, so nothing "
                "would teach the gates; take a gate_weight above 0."
            )

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach these gates nothing, and why."""
        load = balancing.none_of_them("its gates have no noise, so loads have no gradient")
        return {"load": load["load"]} | balancing.of_tasks(tasks)

    def beyond(self, groups: Sequence[str]) -> str | None:
        said = f"no LoRA of their own (model.loras {self.loras}), so gates are not told about them"
        return left_over(groups, self.loras, said)

    def router_computes(self) -> tuple[str, ...]:
        return "top_k", "temperature"

    def make_update(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> LowRank:
        """LoRAs of a layer and their gate, which begins as PyTorch's linear layers do."""
        router = partial(token_router, select=tempered(self.temperature))
        own: dict[str, Any] = {"experts": self.loras, "k": self.top_k, "make_router": router}
        own |= {"alpha": self.alpha, "dropout": self.dropout}
        return mixture(inputs, outputs, self.loras * self.rank, **own, rngs=rngs)

    def still(self) -> tuple[str, ...]:
        return () if self.library is None else ("down", "up")

    def bank(self) -> LibraryBank | None:
        if self.library is None:
            return None
        return LibraryBank(self.library, self.loras, self.rank, self.alpha / self.rank)

    def judge(self) -> OwnLosses | None:
        return GateLoss(self.gate_weight) if self.gate_weight else None
