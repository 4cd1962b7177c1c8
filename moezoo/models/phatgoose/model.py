"""PHATGOOSE: a LoRA that is done learns a gate, and the gates of many route over all of them.

Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
arXiv:2402.05859. After a LoRA is trained it is frozen, and a vector v of each layer learns on the
same data when it helps:

    y = W x + sigmoid(v . x) s x A B

The vectors of all members of a library are its prototypes then: each token's two largest of
LN(v) . LN(x) / sqrt(D), softmax over these, outputs added up (route `phatgoose`). Start it from the
run of the LoRA, whose A and B it takes over: `--start-from runs/lora_sort`; v begins with zeros, so
that every token gets half of the update at first.

What we ran: README.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.fields import AxisSize
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import AdaptedDecoderConfig
from moezoo.nn.lowrank import LowRank
from moezoo.nn.routers import LinearRouter
from moezoo.ops.selection import Selection, sigmoid_share, sigmoid_weights, top_k


def _zeros(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)


HELPFUL = Selection(sigmoid_weights, top_k, sigmoid_share)


@dataclass(frozen=True)
class PhatgooseConfig(AdaptedDecoderConfig):
    """A frozen decoder with a frozen LoRA whose gate is trained."""

    card: ClassVar[Card] = Card(
        title="PHATGOOSE",
        paper="Muqeeth et al., ICML 2024, arXiv:2402.05859",
        kind="a frozen LoRA learns a gate per layer; the gates of a library route over all of it",
        parity="routing as in the code of the Arrow paper",
        fixtures=("arrow",),
        headline="exact match 0.07 on tasks seen over nine gated LoRAs; told the task 0.87",
    )

    gates_library: ClassVar[bool] = True
    learned_by: ClassVar[str] = "the run of a LoRA (text/library_member)"

    rank: AxisSize = 8
    """Rank of the LoRA that it starts from."""

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("there is a single LoRA")

    def make_update(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> LowRank:
        """A LoRA under a gate."""
        made: dict[str, Any] = {"select": HELPFUL, "init": _zeros}
        router = LinearRouter(inputs, 1, 1, **made, rngs=rngs)
        lora = partial(LowRank, inputs, outputs, self.rank, scale=self.alpha / self.rank)
        return lora(router=router, dropout=self.dropout, rngs=rngs)

    def still(self) -> tuple[str, ...]:
        return ("down", "up")
