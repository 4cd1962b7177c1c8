"""Mod-Squad: experts in attention and in MLPs, one router per task, experts shared by few tasks.

Chen, Shen, Ding, Chen, Zhao, Learned-Miller, Gan: "Mod-Squad: Designing Mixture of Experts As
Modular Multi-Task Learners", CVPR 2023, arXiv:2212.08066.

Heads of attention and MLPs are stacks of experts; every task has a router of its own in each of
these layers, and a learned vector that is added to the tokens before every block. A loss that
rewards mutual information between tasks and experts (`train.mutual_information_weight`) makes
each task use few experts and all experts be used, so that the part of the network that one task
needs can be cut out afterwards (`moezoo prune --usage`).

    g = softmax(x W_t)      y = sum over the K largest g_e of g_e E_e(x)
    loss = sum_t L_t - w I(T; E),   I = sum over t, e of p(t, e) log(p(t, e) / (p(t) p(e)))

E_e is an MLP, or a head's query and output maps beside shared keys and values; p(t, e) is the mean
g_e over the tokens of task t, times the task's share of the tokens.

What the paper claims: better means over 13 Taskonomy tasks and over PASCAL-Context than a dense
multi-task ViT and than multi-task MoE without that loss, and single-task sub-networks that keep
the accuracy. We have not verified its tables: no weights were published, and files are missing
from the published code.

Followed from the code: the "twice" layout (even blocks have attention experts and a plain MLP,
odd ones plain attention and MLP experts), heads of twice the usual width everywhere, one shared
head of keys and values, softmax over all experts before the top-k without renormalisation, no
biases in attention experts. All tasks of a step run in one batch whose rows carry their task: with
the task's vector added before the first block nothing but the patches is shared.

Our choices: up-convolution heads instead of the paper's linear ones; vectors of tasks begin small
like positions (the code begins at deviation 1, which drowns the image); probabilities are
probabilities (the code adds 1e-4 to each); no noise at evaluation (a slip of its noisy variant).
The two first are `reference_quirks` "task_vector_init" and "smoothed_probabilities".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.vit import Block, dense_mlp
from moezoo.errors import UserError
from moezoo.fields import AxisSize, NotNegative, Ratio
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.macs import Half, attention, chosen_experts
from moezoo.models.shared.multitask import MultiTaskConfig, TaskPasses
from moezoo.nn.attention import Attention
from moezoo.nn.context import Context, TaskBias
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import trunc_normal
from moezoo.nn.moa import HeadExperts, MoA, keys_and_values
from moezoo.nn.moe import MoE, Record
from moezoo.nn.routers import MultiGateRouter, NoisyMultiGateRouter
from moezoo.nn.support import HeadSupportConfig
from moezoo.ops import exchange
from moezoo.ops.routing import SELECTIONS, softmax_then_top_k
from moezoo.ops.selection import check_learns

QUIRKS: tuple[str, ...] = ("smoothed_probabilities", "task_vector_init")

# Which halves of the block with this index consist of experts: (attention, MLP).
LAYOUTS: dict[str, Callable[[int], tuple[bool, bool]]] = {
    "twice": lambda block: (block % 2 == 0, block % 2 == 1),
    "attention": lambda block: (block % 2 == 0, False),
    "mlp": lambda block: (False, block % 2 == 1),
    "both": lambda block: (True, True),
}


@dataclass(frozen=True)
class ModSquadConfig(MultiTaskConfig):
    """Mod-Squad; the defaults are ViT-small with the experts of the published code.

    Its totals of parameters (34.17 M small, 195.80 M base) follow from no numbers that we know.
    """

    card: ClassVar[Card] = Card(
        title="Mod-Squad",
        paper="Chen et al., CVPR 2023, arXiv:2212.08066",
        kind="experts in attention and in MLPs, one router per task, mutual-information loss",
        parity="the published code: attention experts, blocks, losses, pruning rule",
        fixtures=("modsquad",),
        trained=("rooms/mod_squad_tiny",),
        headline="mIoU 0.417 on rooms, one seed; no dense comparison",
    )

    heads: AxisSize = 12
    """Attention heads; where they are experts, those that a token chooses."""
    head_experts: AxisSize = 24
    """Heads that a token chooses from where they are experts."""
    head_ratio: Ratio = 2.0
    """Width of all heads together over the width."""
    experts: AxisSize = 16
    """Experts of an MLP."""
    top_k: AxisSize = 4
    """MLP experts that a token goes to."""
    expert_ratio: Ratio = 1.0
    """Hidden width of an MLP expert over the width; top_k times it is the MLP ratio it replaces."""
    layout: Literal["twice", "attention", "mlp", "both"] = "twice"
    """twice: experts in the attention of even blocks and in the MLP of odd ones; attention, mlp:
    only those; both: in both halves of every block."""
    noise: Literal["none", "learned"] = "none"
    """Noise on router logits in training, of learned size."""
    router_std: NotNegative = 0.02
    """Deviation of fresh routers."""
    dispatch: str = "auto"
    """How tokens reach their experts, as in M3ViT."""
    support: HeadSupportConfig = HeadSupportConfig()
    """The experts that a task may choose from, frozen at one step of training. The paper removes
    what a task hardly uses after training instead (moezoo prune --usage)."""
    reference_quirks: tuple[Literal["smoothed_probabilities", "task_vector_init"], ...] = ()
    """Accidents of the published code to repeat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for chosen, experts in (("top_k", "experts"), ("heads", "head_experts")):
            k, most = getattr(self, chosen), getattr(self, experts)
            if not 1 <= k <= most:
                raise UserError(f"{chosen} is {k}; it must be between 1 and {experts}, {most}.")
        if self.expert_hidden < 1 or self.head_width < 1:
            raise UserError(
                f"expert_ratio is {self.expert_ratio} and head_ratio {self.head_ratio}; experts "
                "and heads need at least one unit."
            )
        for chosen, experts in self.choices.items():
            said = f"{chosen} is {getattr(self, chosen)} and {experts} {getattr(self, experts)}"
            k, most = getattr(self, chosen), getattr(self, experts)
            check_learns(softmax_then_top_k, k, most, said)
        exchange.by_name(self.dispatch)
        if self.qk_norm != "none":
            raise UserError(
                f"qk_norm is {self.qk_norm}, but attention here has no norms on queries and keys: "
                "leave it out."
            )
        if self.attention == "cudnn" and "heads" in self.choices:
            raise UserError(
                "attention is cudnn, but heads that are experts have plain products only: take "
                "auto or plain."
            )
        self._check_supports()

    def _check_supports(self) -> None:
        of_mlps, of_heads = self.support.of_mlps, self.support.of_heads
        if self.support.step and not (of_mlps.experts or of_heads.experts):
            self.support.check(self.top_k, self.experts)
        of_mlps.check(self.top_k, self.experts)
        of_heads.check(self.heads, self.head_experts, "model.head_experts")

    def check_steps(self, steps: int) -> None:
        """UserError where training ends before the supports are frozen."""
        self.support.check_steps(steps)

    @property
    def choices(self) -> dict[str, str]:
        """What is chosen in this layout: the number of chosen -> the number to choose from."""
        halves = zip(*(LAYOUTS[self.layout](block) for block in range(self.depth)), strict=True)
        kinds = (("heads", "head_experts"), ("top_k", "experts"))
        return dict(kind for kind, blocks in zip(kinds, halves, strict=True) if any(blocks))

    def halves(self, block: int, n: int) -> tuple[Half, Half]:
        """What attention and MLP of a block cost in one pass of n tokens."""
        d, inner = self.width, self.heads * self.head_width
        first, second = Half(attention(d, inner, n)), super().halves(block, n)[1]
        experts = LAYOUTS[self.layout](block)
        if experts[0]:
            products = (2 * d * inner + 2 * d * self.head_width) * n + 2 * n * n * inner
            first = Half(products, n * self.head_experts * d)
        if experts[1]:
            second = chosen_experts(d, self.expert_hidden, self.top_k, self.experts, n)
        return first, second

    def passes(self, block: int, tasks: int) -> tuple[int, int]:
        """One per task: the first thing that an image meets is a task's router."""
        return tasks, tasks

    def computes(self) -> dict[str, Any]:
        """Nothing besides shapes: `head_ratio` makes other heads of other shape."""
        return {}

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach these routers nothing, and why (`balancing`)."""
        noise = None if self.noise == "learned" else "set model.noise learned"
        loads = [
            balancing.of_loads(noise, getattr(self, chosen), getattr(self, experts))
            for chosen, experts in self.choices.items()
        ]
        idle = loads[0] if loads and all(loads) else {}
        return idle | balancing.of_tasks(tasks)

    @property
    def expert_hidden(self) -> int:
        """Hidden units of one MLP expert."""
        return int(self.width * self.expert_ratio)

    @property
    def head_width(self) -> int:
        """Units of one head."""
        return int(self.width * self.head_ratio) // self.heads

    def make_attention(self, tasks: int, block: int, rngs: nnx.Rngs) -> nnx.Module:
        """The attention of one block, with routers for so many tasks where it has experts."""
        dtype = jnp.dtype(self.dtype)
        if not LAYOUTS[self.layout](block)[0]:
            options: dict[str, Any] = {"way": self.attention, "dtype": dtype, "rngs": rngs}
            return Attention(self.width, self.heads, head_width=self.head_width, **options)
        heads = HeadExperts(self.head_experts, self.width, self.head_width, dtype=dtype, rngs=rngs)
        router = self.router(tasks, self.head_experts, self.heads, rngs)
        router.within(self.support.of_heads.make(tasks, self.head_experts))
        return MoA(router, heads, exchange.by_name(self.dispatch), keys_and_values(heads, rngs))

    def make_mlp(self, tasks: int, block: int, rngs: nnx.Rngs) -> nnx.Module:
        """The MLP of one block, with routers for so many tasks where it has experts."""
        if not LAYOUTS[self.layout](block)[1]:
            return dense_mlp(self, rngs)
        sizes = (self.experts, self.width, self.expert_hidden)
        experts = MLPExperts(*sizes, dtype=jnp.dtype(self.dtype), rngs=rngs)
        router = self.router(tasks, self.experts, self.top_k, rngs)
        router.within(self.support.of_mlps.make(tasks, self.experts))
        return MoE(router, experts, exchange.by_name(self.dispatch))

    def router(self, tasks: int, experts: int, k: int, rngs: nnx.Rngs) -> MultiGateRouter:
        """Fresh routers of one layer."""
        smoothed = "smoothed_probabilities" in self.reference_quirks
        return ROUTERS[self.noise](
            tasks,
            self.width,
            experts,
            k,
            select=SELECTIONS["smoothed_softmax_then_top_k" if smoothed else "softmax_then_top_k"],
            init=partial(trunc_normal, std=self.router_std),
            rngs=rngs,
        )

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> ModSquad:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return ModSquad(self, tasks, image_size, rngs=rngs)


ROUTERS: dict[str, Callable[..., MultiGateRouter]] = {
    "none": MultiGateRouter,
    "learned": NoisyMultiGateRouter,
}


def unit_normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Deviation 1: what the published code's task vectors begin with."""
    return jax.random.normal(key, shape, jnp.float32)


class ModSquad(TaskPasses):
    """One pass per task, as published, in one batch whose rows carry their task."""

    def __init__(
        self,
        config: ModSquadConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            config,
            tasks,
            image_size,
            make_mlp=partial(config.make_mlp, len(tasks)),
            make_attention=partial(config.make_attention, len(tasks)),
            rngs=rngs,
        )
        quirk = "task_vector_init" in config.reference_quirks
        init = unit_normal if quirk else trunc_normal
        self.task_bias = TaskBias(len(tasks), config.width, init=init, rngs=rngs)

    def encode(
        self, image_BHWC: Array, ids: Sequence[int], key: Array | None, records: dict[str, Record]
    ) -> Array:
        """Tokens of B*J rows, row b*J + j for image b and task `ids[j]`. Fills `records`."""
        x_BTD = self.embed(image_BHWC)
        context = Context(ids[0])  # one task: a static number, so its program knows no other
        if len(ids) > 1:
            context = Context(jnp.tile(jnp.asarray(ids, jnp.int32), x_BTD.shape[0]))
            x_BTD = jnp.repeat(x_BTD, len(ids), axis=0)

        def step(block: Block, i: int, x_BTD: Array, key: Array | None) -> tuple[Array, dict]:
            x_BTD = self.task_bias(x_BTD, context)  # again before every block, as published
            x_BTD, looked = block.attend(x_BTD, context, key)
            x_BTD, fed = block.feed(x_BTD, block.norm2(x_BTD), x_BTD, context, key)
            return x_BTD, {"attn": looked, "mlp": fed}

        return self.run(x_BTD, key, records, step)
