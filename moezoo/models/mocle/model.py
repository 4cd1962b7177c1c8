"""MoCLE: the cluster of an instruction chooses one LoRA, and a universal one takes the rest.

Gou et al., "Mixture of Cluster-conditional LoRA Experts for Vision-language Instruction Tuning",
arXiv:2312.12379. A frozen layer W gets, for an instruction in cluster c with a learned vector e_c,

    p = softmax(G e_c / T),    y = W x + s p_max x A_max B_max + s (1 - p_max) x A_g B_g

G of each layer's own. The authors cluster instructions by k-means of sentence embeddings, before
training. Here clusters are of tasks: `cluster_of_task` says each task's, for example from the
groups of alike LoRAs that `moezoo library build --clusters` finds, so a prompt's cluster is its
task's. Where we differ from the code: the weight of the chosen LoRA is p as in the paper, in the
code it is multiplied in twice (`ops.prototypes.twice_weighted`); G is float32, there float16; noise
on its logits in training is left out, as is a bias.

What we ran: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Positive, Whole
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.language import AdaptedDecoderConfig, left_over
from moezoo.nn.condition_routers import ConditionRouter
from moezoo.nn.context import Context
from moezoo.nn.exploration import QUIET
from moezoo.nn.layers import fan_in_uniform, normal
from moezoo.nn.lowrank import LowRank
from moezoo.ops.exact import exact_product
from moezoo.ops.prototypes import chosen_and_universal
from moezoo.ops.routing import Select
from moezoo.ops.selection import Selected


def best_and_universal(temperature: float) -> Select:
    """MoCLE's weights of E experts and, behind them, the universal one: all k = E + 1.

    The last logit is nobody's.
    """

    def select(logits_NE: Array, k: int) -> Selected:
        probs_NE = jax.nn.softmax(logits_NE[:, :-1] / temperature, axis=-1)
        weights_NE = jnp.concatenate(chosen_and_universal(probs_NE), axis=1)
        experts_NE = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), logits_NE.shape)
        return Selected(experts_NE, weights_NE, weights_NE)

    return select


class ClusterRouter(ConditionRouter):
    """Each task's cluster, its vector, and a linear map to experts; clusters [C, M], kernel [M, E].

    A task that is in no cluster has a vector of zeros: equal logits.
    """

    def __init__(
        self,
        cluster_of_task: tuple[int, ...],
        width: int,
        experts: int,
        temperature: float,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(experts + 1, best_and_universal(temperature), QUIET)
        self.cluster_of_task = cluster_of_task
        shape = (max(cluster_of_task) + 1, width)
        self.clusters = nnx.Param(normal(rngs.params(), shape) * 50)  # of deviation 1, as PyTorch's
        init = partial(fan_in_uniform, fan_in=width)
        self.kernel = nnx.Param(init(rngs.params(), (width, experts)))

    def rows(self, context: Context, key: Array | None = None) -> Array:
        task_B = jnp.atleast_1d(jnp.asarray(context.task_B, jnp.int32))
        clusters = self.clusters.get_value().shape[0]
        hot_JC = jax.nn.one_hot(jnp.asarray(self.cluster_of_task), clusters)
        hot_BC = jax.nn.one_hot(task_B, len(self.cluster_of_task)) @ hot_JC
        vectors_BM = exact_product(hot_BC, self.clusters.get_value())
        logits_BE = exact_product(vectors_BM, self.kernel.get_value())
        return jnp.pad(logits_BE, ((0, 0), (0, 1)))


@dataclass(frozen=True)
class MoCLEConfig(AdaptedDecoderConfig):
    """A frozen decoder whose LoRAs are chosen by the cluster of the task, and a universal one."""

    card: ClassVar[Card] = Card(
        title="MoCLE",
        paper="Gou et al., 2023, arXiv:2312.12379",
        kind="on a frozen decoder a task's cluster picks one LoRA, a universal one takes the rest",
        parity="the published code's layers, with its doubled weight as a quirk",
        fixtures=("mocle",),
        trained=("text/mocle_tiny",),
        headline="exact match 0.538 on the nine tasks of text/smora_tiny, one seed",
    )

    cluster_of_task: tuple[Whole, ...] = (0, 0, 1, 1, 2, 2, 3, 3, 3)
    """The cluster of each task of the data, counted from 0."""
    loras: AxisSize = 4
    """LoRAs besides the universal one."""
    rank: AxisSize = 8
    """Rank of each."""
    cluster_width: AxisSize = 384
    """Features of a cluster's vector."""
    temperature: Positive = 0.1
    """Of the softmax over LoRAs; published: 0.05 or 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = set(self.cluster_of_task)
        if not found or found != set(range(len(found))):
            raise UserError(
                f"cluster_of_task is {self.cluster_of_task}: clusters are counted from 0, and each "
                "must have at least one task."
            )
        if self.loras < 2:
            raise UserError("loras is 1, which leaves clusters nothing to choose: take 2 or more.")

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach nothing, and why: all."""
        return balancing.none_of_them("clusters choose, so tokens cannot be balanced")

    def beyond(self, groups: Sequence[str]) -> str | None:
        # Equal logits, of which the first counts as the largest.
        said = f"in no cluster (model.cluster_of_task has {len(self.cluster_of_task)} tasks), so "
        said += f"they get LoRA 0 with weight 1/{self.loras} and the universal one with the rest"
        return left_over(groups, len(self.cluster_of_task), said)

    def router_computes(self) -> tuple[str, ...]:
        return "cluster_of_task", "temperature"

    def make_update(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> LowRank:
        """LoRAs of a layer, the universal one last, and their router."""
        told = (self.cluster_of_task, self.cluster_width, self.loras, self.temperature)
        router, count = ClusterRouter(*told, rngs=rngs), self.loras + 1
        made: dict[str, Any] = {"experts": count, "router": router, "dropout": self.dropout}
        made["scale"] = self.alpha / self.rank
        return LowRank(inputs, outputs, count * self.rank, **made, rngs=rngs)
