"""DyT: a frozen vision transformer with adapters, whose MLPs skip tokens.

Zhao, Tang, Wu, Wang, Liu, You: "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT
Adaptation", NeurIPS 2024, arXiv:2403.11808. In every block one logit of a token decides whether the
frozen MLP computes it; a small adapter sees all tokens:

    x <- x + Attn(LN x)     y = x + m * MLP(LN x) + s * adapter(x)     m = [sigmoid(w x + b) > 1/2]

In training logistic noise is added to logits at temperature 5 and the choice is straight-through;
a loss draws the share of tokens that are kept to a target. The same network with all tokens kept
("complete") learns from the labels too, and the other learns from it.

What the paper claims: on VTAB-1K better scores than other ways of adapting at 71 % of the FLOPs
(abstract). Not verified.

Followed from the code: the variant that skips MLPs, with adapter and dispatcher reading the tokens
in front of the norm; the class token is always kept. Ours: several dense tasks read the same
tokens; the trunk's norms stay frozen, heads train. The paper's MoE-adapter is not in its code, and
what could be read leaves open what exactly is mixed: with `adapters` above 1 this file mixes the
outputs of so many adapters, by a softmax of each token's own - a reconstruction.

The mask alone saves nothing: `inference` "gathered" runs an MLP on as many rows as there is `room`
for, and skips what finds none. What we ran, and what came out: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.vit import Block
from moezoo.fields import AxisSize, NotNegative, Positive, Range, Share, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.macs import Half, Macs, mlp
from moezoo.models.shared.multitask import MultiTaskConfig, MultiTaskOutput, MultiTaskTrunk
from moezoo.nn.adapter_mixtures import BiasedRouter, DenseAdapters
from moezoo.nn.adapters import STARTS, ScaledAdapter, bottleneck_experts
from moezoo.nn.context import NO_TASK, Context, apply_linear
from moezoo.nn.embed import grid_of
from moezoo.nn.injection import freeze
from moezoo.nn.layers import drop_path
from moezoo.nn.token_skip import TokenDispatcher, skip_record
from moezoo.ops.divergence import Agreement, Divergence, towards
from moezoo.ops.token_skip import TokenChoice, always, budget_loss, on_kept, places

TRAINED = ("heads/*", "tam/*", "dispatch/*", "adapters/*")
AGREE: Agreement = towards


@dataclass(frozen=True)
class DyTConfig(MultiTaskConfig):
    """A vision transformer that is adapted and skips tokens; the defaults are the published ones
    for images."""

    card: ClassVar[Card] = Card(
        title="DyT",
        paper="Zhao et al., NeurIPS 2024, arXiv:2403.11808",
        kind="adapters on a frozen ViT; a dispatcher says which tokens the MLP skips",
        parity="the published code: gate, adapter, losses",
        fixtures=("dyt_mosa_mixda",),
        trained=("rooms/dyt_tiny",),
        headline="keeps 51 % of the tokens in MLPs, scores as without skipping; rooms, one seed",
    )

    bottleneck: AxisSize = 64
    """Hidden units of an adapter."""
    adapters: AxisSize = 1
    """Adapters of a block; several are mixed by a router of each token (a reconstruction)."""
    adapter_scale: Positive = 0.1
    """What adapters' outputs are multiplied by."""
    dropout: Share = 0.1
    """Share of a single adapter's hidden units that are set to 0 in training."""
    keep: Annotated[float, Range(above=0, most=1)] = 0.5
    """The share of tokens that training draws the MLPs to."""
    keep_weight: NotNegative = 2.0
    """Factor of the loss that does so; 0: the tasks alone decide."""
    keep_least: Share = 0.1
    """What a layer of an image should keep at least, by the same loss; 0: nothing."""
    temperature: Positive = 5.0
    """What noisy logits are divided by in training."""
    distillation: NotNegative = 1.0
    """Factor of the divergence from the predictions of the complete network."""
    inference: Literal["masked", "gathered"] = "masked"
    """masked: MLPs compute all tokens and what is skipped is set to 0; gathered: they compute a
    fixed number of rows, into which kept tokens are gathered."""
    room: Annotated[float, Range(above=0, most=1)] = 0.75
    """gathered: rows of an image, as a share of its tokens; the least certain go without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    idle_losses = balancing.nothing_chosen

    def halves(self, block: int, n: int) -> tuple[Half, Half]:
        """What attention and MLP of a block cost in one pass of n tokens, `keep` of them kept."""
        first, dense = super().halves(block, n)
        adapters = self.adapters * mlp(self.width, self.bottleneck, n)
        kept = round(self.kept_share * dense.products)
        router = n * self.width * (1 + (self.adapters if self.adapters > 1 else 0))
        return first, Half(kept + adapters, router)

    @property
    def kept_share(self) -> float:
        """The share of tokens that an MLP computes: what training is drawn to, or the room."""
        return self.room if self.inference == "gathered" else self.keep

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image, all `tasks` predicted in one call, at the share `keep` (or `room`)."""
        return super().macs(size, tasks)

    def rows(self, size: tuple[int, int]) -> int:
        """Rows that a gathered MLP computes of an image."""
        return places(self.seen(grid_of(size, self.patch)), self.room)

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> DyT:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        Raises UserError where sizes do not go together.
        """
        return DyT(self, tasks, image_size, rngs=rngs)


class MixedAdapters(nnx.Module):
    """scale * the outputs of N adapters, weighted by a softmax of each token's own."""

    def __init__(self, config: DyTConfig, dtype: Any, rngs: nnx.Rngs):
        sizes = (config.adapters, config.width, config.bottleneck)
        router = BiasedRouter(config.width, config.adapters, rngs=rngs)
        options: dict[str, Any] = {"activation": jax.nn.relu, "start": STARTS["identity"]}
        experts = bottleneck_experts(*sizes, dtype=dtype, rngs=rngs, **options)
        self.mixture, self.scale = DenseAdapters(router, experts), config.adapter_scale

    def __call__(self, x_BTD: Array, key: Array | None = None) -> Array:
        return self.scale * apply_linear(self.mixture, x_BTD, Context(), "mixture")


def adapter_of(config: DyTConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """The adapter of one block, or its mixture of several."""
    if config.adapters > 1:
        return MixedAdapters(config, dtype, rngs)
    options: dict[str, Any] = {"scale": config.adapter_scale, "dropout": config.dropout}
    return ScaledAdapter(config.width, config.bottleneck, dtype=dtype, rngs=rngs, **options)


# (MLP, normalised tokens, choice) -> what the MLP adds
Skip = Callable[[Any, Array, TokenChoice], Array]


def masked(mlp: Any, x_BTD: Array, kept: TokenChoice) -> Array:
    """All tokens are computed, what is skipped is 0; the gradient reaches the choice."""
    return mlp(x_BTD) * kept.keep_BT[..., None].astype(x_BTD.dtype)


def gathered(room: float) -> Skip:
    """Kept tokens are computed, as many as find one of the rows."""

    def skip(mlp: Any, x_BTD: Array, kept: TokenChoice) -> Array:
        return on_kept(mlp, x_BTD, kept, places(x_BTD.shape[1], room))

    return skip


def complete(mlp: Any, x_BTD: Array, kept: TokenChoice) -> Array:
    """Nothing is skipped."""
    return mlp(x_BTD)


class Encoded(NamedTuple):
    """Tokens behind all blocks, the choices of each, and their records by path."""

    x_BTD: Array
    choices: list[TokenChoice]
    records: dict[str, Any]


class DyT(MultiTaskTrunk):
    """All tasks read the same tokens, of which every MLP computes some."""

    def __init__(
        self,
        config: DyTConfig,
        tasks: Mapping[str, int],
        image_size: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, tasks, image_size, rngs=rngs)
        blocks, options = range(config.depth), {"temperature": config.temperature}
        self.dispatch = nnx.List(
            [TokenDispatcher(config.width, rngs=rngs, **options) for _ in blocks]
        )
        self.adapters = nnx.List([adapter_of(config, self.dtype, rngs) for _ in blocks])
        self.options = config
        freeze(self, trained=TRAINED)

    @property
    def balance_losses(self) -> Mapping[str, Any]:
        """None: the budget is a loss of its own."""
        return {}

    def agreement(self, divergence: Divergence, own: Array, whole: Array) -> Array:
        """The distillation from the complete network."""
        return self.options.distillation * AGREE(divergence, own, whole)

    def free(self, tokens: int) -> Array:
        """Which tokens may be skipped, bool [T]: patches."""
        place_T = jnp.arange(tokens)
        return (place_T > 0) & (place_T < tokens - self.config.registers)

    def encode(self, image_BHWC: Array, key: Array | None, skip: Skip) -> Encoded:
        """Tokens behind all blocks; `key` is for gates, dropout and stochastic depth."""
        choices: list[TokenChoice] = []
        records: dict[str, Any] = {}

        def step(block: Block, i: int, x_BTD: Array, key: Array | None) -> tuple[Array, dict]:
            # Numbers that a block's own uses of the key, 0 to 3, leave.
            gate, noise, depth = (
                None if key is None else jax.random.fold_in(key, n) for n in (4, 5, 2)
            )
            x_BTD = block.attend(x_BTD, NO_TASK, key).x_BTD
            kept = always(self.dispatch[i](x_BTD, gate), self.free(x_BTD.shape[1]))
            choices.append(kept)
            fed_BTD = skip(block.mlp, block.norm2(x_BTD), kept)
            adapted_BTD = self.adapters[i](x_BTD, noise)
            x_BTD = x_BTD + drop_path(fed_BTD, block.drop_path, depth) + adapted_BTD
            records[f"dispatch/{i}"] = skip_record(kept)
            return x_BTD, {}

        x_BTD = self.run(self.embed(image_BHWC), key, step=step)
        return Encoded(x_BTD, choices, records)

    def __call__(
        self,
        image_BHWC: Array,
        *,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Predict `tasks` (all by default) for float32 images; `key` acts in training only."""
        names, config = self.wanted(tasks), self.options
        if not train:
            skip = gathered(config.room) if config.inference == "gathered" else masked
            found = self.encode(image_BHWC, None, skip)
            tokens = {task: found.x_BTD for task in names}
            return self.decode(tokens, image_BHWC, False, found.records)
        found = self.encode(image_BHWC, key, masked)
        output = self.decode({task: found.x_BTD for task in names}, image_BHWC, True, found.records)
        return self._with_complete(output, found, image_BHWC, key)

    def _with_complete(
        self, output: MultiTaskOutput, found: Encoded, image_BHWC: Array, key: Array | None
    ) -> MultiTaskOutput:
        """With the predictions of the complete network, and the budget's loss."""
        config, names = self.options, output.predictions
        again = None if key is None else jax.random.fold_in(key, self.config.depth)
        whole_BTD = self.encode(image_BHWC, again, complete).x_BTD
        whole = self.decode({task: whole_BTD for task in names}, image_BHWC, True, {})
        keep_BLT = jnp.stack([kept.keep_BT for kept in found.choices], axis=1)
        keep_BLT = keep_BLT[..., 1 : keep_BLT.shape[-1] - self.config.registers]
        budget = budget_loss(
            keep_BLT, target=config.keep, weight=config.keep_weight, least=config.keep_least
        )
        more = {task: (*output.auxiliary.get(task, ()), whole.predictions[task]) for task in names}
        return output._replace(
            auxiliary=more,
            losses={"budget": budget},
            compared={task: (own, whole.predictions[task]) for task, own in names.items()},
        )
