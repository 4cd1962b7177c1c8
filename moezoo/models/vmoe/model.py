"""V-MoE: a vision transformer for classification whose MLPs are, in some blocks, experts.

Riquelme, Puigcerver, Mustafa, Neumann, Jenatton, Susano Pinto, Keysers, Houlsby: "Scaling Vision
with Sparse Mixture of Experts", NeurIPS 2021, arXiv:2106.05974; with the two routings that followed
it in the same code base: experts that choose their tokens (Zhou et al., arXiv:2202.09368) and Soft
MoE (Puigcerver et al., arXiv:2308.00951).

Tokens choose: y = sum over the top k of g(x)_e MLP_e(x), with g = softmax(W x + eps) and
eps of deviation 1/E; an expert has C = ceil(factor k N / E) slots and drops what comes after.
Experts choose: each takes the C tokens that give it the highest weight of that softmax. Soft MoE:
slots are mixtures of all tokens, tokens mixtures of all slots' outputs (`ops.soft`).

What the paper claims (trained on JFT-300M, 32 experts, k = 2): V-MoE-H/14 with experts in its last
5 odd blocks reaches 88.23 % on ImageNet after fine-tuning (dense ViT-H/14: 88.08 %), L/16 with
every second block 87.41 % (87.12 %); a model of 15 billion parameters 90.35 %; and at reduced
capacity batch priority keeps what the order of positions loses. Numbers of parameters of this file
equal the paper's (tests); its accuracies need a data set that was never published.

Where code and paper differ the code is followed: the softmax is taken over all experts before the
top k and not renormalised, "last n" means the last n of the odd blocks, the load loss has one
threshold for all experts, GELU is its tanh approximation. Away from the code: experts start
different from each other (`reference_quirks` "one_start" makes them equal), capacities are not
rounded up to a multiple of 4 unless asked, experts that choose look at one image at a time, so that
its answer does not depend on its neighbours, and there is no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.vit import MakeMLP, Trunk, ViTConfig
from moezoo.errors import UserError
from moezoo.fields import AxisSize, Depth, NotNegative, Ratio, Whole
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.config import ModelTraits
from moezoo.models.shared.macs import Half, Macs, attention, chosen_experts, mlp, stem
from moezoo.models.shared.multitask import MultiTaskOutput, wanted
from moezoo.nn.attention import AttentionPool, MakeNorm, first_token, mean_token
from moezoo.nn.batch_routers import ExpertsChooseRouter
from moezoo.nn.embed import Positions, grid_of, sincos2d
from moezoo.nn.experts import MLPExperts, one_start
from moezoo.nn.layers import MLP, LayerNorm, Linear, ScaleNorm, gelu, tanh_gelu, trunc_normal, zeros
from moezoo.nn.moe import MoE, Record
from moezoo.nn.routers import LinearRouter
from moezoo.nn.soft import SoftMoE, SoftRouter
from moezoo.nn.support import SupportConfig
from moezoo.ops import balance, exchange
from moezoo.ops.capacity import Stacked, by_position, by_probability, capacity, expert_capacity
from moezoo.ops.expert import Backend
from moezoo.ops.groups import group_of_rows, mean_over_groups, per_group_of_rows
from moezoo.ops.routing import SELECTIONS, Noise, Routing, constant_noise, no_noise
from moezoo.ops.selection import check_learns

ACTIVATIONS = {"tanh_gelu": tanh_gelu, "gelu": gelu}
PRIORITIES = {"position": by_position, "probability": by_probability}
ROUNDINGS = {"ceil": math.ceil, "round": round}
QUIRKS = ("one_start",)


@dataclass(frozen=True)
class VMoEConfig(ViTConfig, ModelTraits):
    """V-MoE; the defaults are V-MoE-B/16 with experts in every second block."""

    card: ClassVar[Card] = Card(
        title="V-MoE, expert choice, Soft MoE",
        paper="Riquelme et al., NeurIPS 2021, arXiv:2106.05974",
        kind="experts in a classifier's MLPs, chosen by token, by expert or as soft slots",
        parity="the published code",
        fixtures=("vmoe",),
        trained=("rooms/vmoe_tiny",),
        headline="accuracy 0.413 on rooms, dense 0.395, one seed",
    )
    per_pixel: ClassVar[bool] = False

    routing: Literal["tokens_choose", "experts_choose", "soft"] = "tokens_choose"
    """Tokens choose experts (V-MoE), experts choose tokens, or slots mix all tokens (Soft MoE)."""
    experts: AxisSize = 32
    """Experts of an MoE block, each as large as the MLP it replaces."""
    top_k: AxisSize = 2
    """Experts that a token goes to."""
    moe_every: Depth = 2
    """Every so many blocks the last one has experts: 2 means blocks 1, 3, 5, ..."""
    moe_last: Whole | None = None
    """Of those blocks only the last so many; None: all of them, 0: a dense ViT."""
    moe_blocks: tuple[Whole, ...] = ()
    """The blocks with experts one by one, instead of moe_every and moe_last."""
    selection: Literal["softmax_then_top_k", "softmax_then_top_k_renormalised"] = (
        "softmax_then_top_k"
    )
    """How weights come from logits where tokens choose; a network upcycled from a dense one wants
    them renormalised. That needs a top_k from 2 on: routers learn nothing from a weight of 1."""
    noise_std: NotNegative | None = None
    """Noise on router logits in training, divided by the number of experts (not in Soft MoE); None:
    1, and 0 in Soft MoE."""
    dispatch: str = "capacity"
    """How tokens reach the experts they choose: capacity may drop choices; auto, reference, blocks
    and ragged do not; with mesh.expert > 1 also gather, all_to_all or ragged_all_to_all."""
    capacity_factor: Ratio = 1.05
    """Slots of an expert over an even share of choices, or of tokens where experts choose."""
    capacity_rounding: Literal["ceil", "round"] = "ceil"
    """How a capacity becomes whole."""
    capacity_multiple_of: AxisSize = 1
    """Capacities are raised to a multiple of this; the published code: 4."""
    priority: Literal["position", "probability"] = "position"
    """Who takes slots first: earlier tokens, or those surest of an expert (batch priority)."""
    group_images: AxisSize = 8
    """Images whose tokens share the experts' slots and have a balance loss together; fewer where
    a device's images are no multiple of it. Experts that choose see one image at a time."""
    slots: AxisSize | None = None
    """Slots per expert in Soft MoE; None: from the capacity factor."""
    router_std: NotNegative = 0.02
    """Deviation of fresh routers."""
    activation: Literal["tanh_gelu", "gelu"] = "tanh_gelu"
    """Inside MLPs and experts: GELU by its tanh approximation, as published, or exact."""
    support: SupportConfig = SupportConfig()
    """Where tokens choose: the experts of a layer that stay, frozen at one step of training."""
    reference_quirks: tuple[Literal["one_start"], ...] = ()
    """Accidents of the published configurations to repeat."""
    width: AxisSize = 768
    """Features of a token."""
    heads: AxisSize = 12
    """Attention heads; they divide the width."""
    pool: Literal["token", "mean", "attention"] = "token"
    """What is classified: a class token, the mean of all tokens, or an attention pool."""
    positions: Literal["learned", "sincos2d"] = "learned"
    """Positions of the patches."""
    qk_norm: Literal["none", "layer"] = "none"
    """Norm of each head's queries and keys; here without a bias."""
    representation: AxisSize | None = None
    """Width of a tanh layer before the classifier, as in pre-training; None: no such layer."""
    head_bias: float = 0.0
    """What the classifier's bias starts from; its matrix starts from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        exchange.by_name(self.dispatch)
        self._check_numbers()
        self._check_choice()
        self.support.check(self.top_k, self.experts)

    def check_steps(self, steps: int) -> None:
        """UserError where training ends before the supports are frozen."""
        self.support.check_steps(steps)

    def _check_choice(self) -> None:
        """UserError for a choice that would teach routers nothing, and for options of another."""
        if self.routing != "soft" and self.slots is not None:
            raise UserError(
                f"slots is {self.slots} and routing {self.routing}, but slots are Soft MoE's: take "
                "routing soft, or set capacity_factor."
            )
        if self.routing != "tokens_choose" and self.selection != "softmax_then_top_k":
            raise UserError(
                f"selection is {self.selection} and routing {self.routing}, but only where tokens "
                "choose is there a selection: leave it out, or take routing tokens_choose."
            )
        if self.routing != "tokens_choose" and self.support.experts:
            raise UserError(
                f"support.experts is {self.support.experts} and routing {self.routing}, but only "
                "tokens that choose have a support: leave it out, or take routing tokens_choose."
            )
        if self.routing == "soft" or not self.blocks_with_experts:
            return
        k = self.top_k if self.routing == "tokens_choose" else self.experts
        said = f"top_k is {k}, experts {self.experts} and selection {self.selection}"
        check_learns(SELECTIONS[self.selection], k, self.experts, said)

    def _check_numbers(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise UserError(
                f"top_k is {self.top_k}; it must be between 1 and the number of experts, "
                f"{self.experts}."
            )
        if not 1 <= self.moe_every <= self.depth:
            raise UserError(
                f"moe_every is {self.moe_every}; it must be between 1 and the depth, {self.depth}."
            )
        have = len(range(self.moe_every - 1, self.depth, self.moe_every))
        if self.moe_last is not None and self.moe_last > have:
            raise UserError(
                f"moe_last is {self.moe_last}, but with depth {self.depth} and moe_every "
                f"{self.moe_every} there are {have} blocks to choose from."
            )
        if len(set(self.moe_blocks)) < len(self.moe_blocks) or not set(self.moe_blocks) <= set(
            range(self.depth)
        ):
            raise UserError(
                f"moe_blocks is {self.moe_blocks}; with depth {self.depth} it names different "
                f"blocks from 0 to {self.depth - 1}."
            )

    @property
    def blocks_with_experts(self) -> tuple[int, ...]:
        """The indices of the blocks with experts, ascending."""
        if self.moe_blocks:
            return tuple(sorted(self.moe_blocks))
        candidates = range(self.moe_every - 1, self.depth, self.moe_every)
        last = len(candidates) if self.moe_last is None else self.moe_last
        return tuple(candidates[len(candidates) - last :])

    @property
    def noise(self) -> float:
        """The deviation of router noise, the default filled in."""
        if self.noise_std is None:  # as published: Soft MoE's mixtures need no exploration
            return 0.0 if self.routing == "soft" else 1.0
        return self.noise_std

    def make_mlp(self, tokens: int) -> MakeMLP:
        """The blocks' MLPs and MoE layers for images of so many tokens."""

        def make(block: int, rngs: nnx.Rngs) -> nnx.Module:
            if block in self.blocks_with_experts:
                return ROUTINGS[self.routing](self, tokens, rngs)
            options: dict[str, Any] = {"dtype": jnp.dtype(self.dtype), "rngs": rngs}
            activation = ACTIVATIONS[self.activation]
            return MLP(self.width, self.mlp_hidden, activation=activation, **options)

        return make

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that could teach these routers nothing, and why (`balancing`).

        A configuration may keep those of V-MoE where its experts are exchanged for other layers.
        """
        idle = balancing.all_but(("importance", "load", "switch"), "V-MoE")
        if self.routing != "tokens_choose" or not self.blocks_with_experts:
            return idle | {"switch": f"no token chooses experts here: {balancing.LEAVE}"}
        noise = None if self.noise else "set model.noise_std"
        return idle | balancing.of_loads(noise, self.top_k, self.experts)

    def routed(self, n: int) -> Half:
        """What a layer with experts costs on n tokens, by dropless experts where tokens choose."""
        d, hidden = self.width, self.mlp_hidden
        if self.routing == "tokens_choose":
            return chosen_experts(d, hidden, self.top_k, self.experts, n)
        if self.routing == "experts_choose":
            slots = self.experts * min(slots_of(self, n), n)
            return Half(mlp(d, hidden, slots), n * self.experts * d)
        slots = self.experts * (self.slots or slots_of(self, n))
        # Tokens are compared with slots, mixed into them and out of them.
        return Half(mlp(d, hidden, slots) + 2 * n * slots * d, n * slots * d)

    def balance_losses(self, tokens: int) -> Mapping[str, Callable[[Routing], Array]]:
        """The losses that keep experts busy, by name; none where experts choose or slots mix."""
        if self.routing != "tokens_choose":
            return {}
        return _losses_by_group(tokens, self.group_images)

    def tokens(self, image_size: tuple[int, int]) -> int:
        """T, the class token included where there is one, and registers."""
        return self.seen(grid_of(image_size, self.patch), int(self.pool == "token"))

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image classified for all `tasks`."""
        height, width = grid_of(size, self.patch)
        n, d = self.tokens(size), self.width
        routed, dense = self.routed(n), Half(mlp(d, self.mlp_hidden, n))
        encoder, routers = stem(self, height * width), 0
        for block in range(self.depth):
            half = routed if block in self.blocks_with_experts else dense
            encoder += attention(d, d, n) + half.products
            routers += half.router
        if self.pool == "attention":
            n = height * width  # registers are gone by then, and there is no class token
            encoder += 2 * d * d * (n + 1) + 2 * n * d + 2 * d * self.mlp_hidden
        read = self.representation or d
        heads = (0 if self.representation is None else d * read) + read * sum(tasks.values())
        return Macs(encoder, routers, heads)

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> VMoE:
        """The classifier for `{task name: classes}` of images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return VMoE(self, tasks, image_size, rngs=rngs)

    # The code base's own sizes; its small one is not DeiT's.

    @classmethod
    def small(cls, **changes: Any):
        """V-MoE-S: width 512, 8 blocks."""
        return replace(cls(width=512, depth=8, heads=8), **changes)

    @classmethod
    def base(cls, **changes: Any):
        """V-MoE-B: width 768, 12 blocks."""
        return replace(cls(), **changes)

    @classmethod
    def large(cls, **changes: Any):
        """V-MoE-L: width 1024, 24 blocks."""
        return replace(cls(width=1024, depth=24, heads=16), **changes)

    @classmethod
    def huge(cls, **changes: Any):
        """V-MoE-H: width 1280, 32 blocks."""
        return replace(cls(width=1280, depth=32, heads=16, patch=14), **changes)


def _tokens_choose(config: VMoEConfig, tokens: int, rngs: nnx.Rngs) -> MoE:
    router = LinearRouter(
        config.width,
        config.experts,
        config.top_k,
        select=SELECTIONS[config.selection],
        noise=_noise(config.noise),
        init=partial(trunc_normal, std=config.router_std),
        rngs=rngs,
    )
    router.within(config.support.make(1, config.experts))  # all tasks share their tokens
    return MoE(router, _experts(config, rngs), _dispatch(config, tokens))


def _experts_choose(config: VMoEConfig, tokens: int, rngs: nnx.Rngs) -> MoE:
    slots = min(slots_of(config, tokens), tokens)  # an expert cannot take a token twice
    router = ExpertsChooseRouter(
        config.width,
        config.experts,
        slots,
        group=tokens,
        noise=_noise(config.noise),
        init=partial(trunc_normal, std=config.router_std),
        rngs=rngs,
    )
    return MoE(router, _experts(config, rngs), _with_slots(tokens, 1, slots=slots))


def _soft(config: VMoEConfig, tokens: int, rngs: nnx.Rngs) -> SoftMoE:
    slots = config.slots or slots_of(config, tokens)
    router = SoftRouter(config.width, config.experts, slots, noise_std=config.noise, rngs=rngs)
    return SoftMoE(router, _experts(config, rngs))


ROUTINGS: dict[str, Callable[[VMoEConfig, int, nnx.Rngs], nnx.Module]] = {
    "tokens_choose": _tokens_choose,
    "experts_choose": _experts_choose,
    "soft": _soft,
}


def slots_of(config: VMoEConfig, tokens: int) -> int:
    """Slots per expert for so many tokens that experts choose from, or mix."""
    rounding = ROUNDINGS[config.capacity_rounding]
    factor, multiple = config.capacity_factor, config.capacity_multiple_of
    return expert_capacity(tokens, config.experts, factor, rounding, multiple)


def _experts(config: VMoEConfig, rngs: nnx.Rngs) -> MLPExperts:
    return MLPExperts(
        config.experts,
        config.width,
        config.mlp_hidden,
        activation=ACTIVATIONS[config.activation],
        dtype=jnp.dtype(config.dtype),
        init=one_start(trunc_normal) if "one_start" in config.reference_quirks else trunc_normal,
        rngs=rngs,
    )


# Functions are part of a definition: cached, so that equal models have equal definitions.
@cache
def _noise(std: float) -> Noise:
    return constant_noise(std) if std else no_noise


def _dispatch(config: VMoEConfig, tokens: int) -> Backend:
    if config.dispatch != "capacity":
        return exchange.by_name(config.dispatch)
    return _with_slots(
        tokens,
        config.group_images,
        factor=config.capacity_factor,
        rounding=ROUNDINGS[config.capacity_rounding],
        multiple_of=config.capacity_multiple_of,
        priority=PRIORITIES[config.priority],
    )


@cache
def _with_slots(tokens: int, images: int, **options: Any) -> Backend:
    """Slots for the tokens of every `images` images by themselves."""

    def make(stacked: Stacked) -> Backend:
        return per_group_of_rows(capacity(stacked=stacked, **options), tokens, images)

    return exchange.with_capacity(make)


@cache
def _losses_by_group(tokens: int, images: int) -> Mapping[str, Callable[[Routing], Array]]:
    spread = balance.cv_squared_population
    losses = {
        "importance": partial(balance.importance_loss, amount=balance.prob_sums, spread=spread),
        "load": partial(balance.load_loss, amount=balance.smooth_load_one_threshold, spread=spread),
        "switch": balance.switch_loss,
    }

    def by_group(loss: Callable[[Routing], Array]) -> Callable[[Routing], Array]:
        def mean(routing: Routing) -> Array:
            size = group_of_rows(routing.mask_N.shape[0], tokens, images)
            return mean_over_groups(loss, size)(routing)

        return mean

    return {name: by_group(loss) for name, loss in losses.items()}


class VMoE(Trunk):
    """A classifier; several tasks on whole images read the same pooled tokens."""

    config: VMoEConfig

    def __init__(
        self,
        config: VMoEConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        if not tasks:
            raise UserError("A classifier needs a task, for example: --tasks scene.")
        for task, classes in tasks.items():
            if classes < 1:
                raise UserError(f"Task {task} has {classes} classes; it needs at least 1.")
        self.tasks, self.row = tuple(tasks), config.tokens(image_size)
        super().__init__(
            config,
            image_size,
            make_mlp=config.make_mlp(self.row),
            class_token=zeros if config.pool == "token" else None,
            fixed_positions=POSITIONS[config.positions],
            make_norm=NORMS[config.qk_norm],
            rngs=rngs,
        )
        self.norm = LayerNorm(config.width)
        self.pool = POOLS[config.pool](config, rngs)
        width = config.representation or config.width
        pre_logits = None
        if config.representation is not None:
            pre_logits = Linear(config.width, width, dtype=self.dtype, rngs=rngs)
        self.pre_logits = pre_logits
        # From 0, as published: at first every class is as probable as its bias says, whatever the
        # trunk gives.
        self.heads = nnx.Dict(
            {task: Linear(width, n, init=zeros, rngs=rngs) for task, n in tasks.items()}
        )
        for head in self.heads.values():
            head.bias.set_value(jnp.full(head.bias.shape, config.head_bias))

    @property
    def balance_losses(self) -> Mapping[str, Callable[[Routing], Array]]:
        """The losses that the trainer may add, by name."""
        return self.config.balance_losses(self.row)

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Logits [B, classes] of `tasks` (all by default), float32.

        `key` is for router noise and stochastic depth and acts in training only.
        """
        names = wanted(self.tasks, tasks)
        records: dict[str, Record] = {}
        x_BTD = self.run(self.embed(image_BHWC), key if train else None, records)
        x_BD = self.pool(self.norm(x_BTD))
        if self.pre_logits is not None:
            x_BD = jnp.tanh(self.pre_logits(x_BD))
        x_BD = x_BD.astype(jnp.float32)  # losses are float32 whatever the trunk computes in
        return MultiTaskOutput({task: self.heads[task](x_BD) for task in names}, {}, records)


def _attention_pool(config: VMoEConfig, rngs: nnx.Rngs) -> AttentionPool:
    return AttentionPool(
        config.width,
        config.heads,
        config.mlp_hidden,
        activation=ACTIVATIONS[config.activation],
        make_norm=NORMS[config.qk_norm],
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


POOLS: dict[str, Callable[[VMoEConfig, nnx.Rngs], Callable[[Array], Array]]] = {
    "token": lambda config, rngs: first_token,
    "mean": lambda config, rngs: mean_token,
    "attention": _attention_pool,
}
POSITIONS: dict[str, Positions | None] = {"learned": None, "sincos2d": sincos2d}
NORMS: dict[str, MakeNorm | None] = {"none": None, "layer": ScaleNorm}
