"""Conditional MoE: one encoder for images and texts, its linear maps chosen by a condition.

Zhu, Zhu, Wang, Wang, Li, Wang, Dai: "Uni-Perceiver-MoE: Learning Sparse Generalist Models with
Conditional MoEs", NeurIPS 2022, arXiv:2206.04674, on Uni-Perceiver (arXiv:2112.01522).

Every input and every candidate for its target, an image, a text or an image with a text, is read by
the same transformer; the prediction is the candidate of highest cosine similarity, with a learned
temperature. In every second block a linear map is a mixture of experts, y = (sum_e g_e W_e) x; the
condition that g depends on is the token, its context, its modality, the task, or attributes of task
and token (`levels.py`).

What the paper claims (base size, no fine-tuning, dense to attribute MoE): ImageNet 79.2 to 80.3 %,
COCO caption BLEU-4 32.0 to 33.2, COCO retrieval 64.9/50.7 to 64.6/51.6, Kinetics-400 74.5 to 76.8;
fewer conflicts between tasks, and new tasks without training. Its comparison of the five levels is
not in the public code, which has the attribute level alone: the others follow the text, and the
form of the context's summary is ours.

Followed from the code: experts are linear maps, merged before the product; qkv and attention's
output share a decision, so do the two layers of the MLP; attributes pass a linear layer and a
LayerNorm; noise of deviation 1/E; top-2 weights renormalised, top-1 weights not; no balance loss;
Xavier, layer scale 1e-3, stochastic depth 0.1, pre-norm. Away from it: top-1 works (there it
returned nothing), no dead gates, exact masks instead of -1e4; the norm of tokens and the map in
front of the comparison are options (`released`). Our choices: texts are bytes unless the data
brings its own words, captions are predicted at the token before, the vocabulary's candidates are
encoded alone.

What we ran, and what came out: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.conditional import ConditionalEncoder, xavier
from moezoo.errors import UserError
from moezoo.fields import AxisSize, Depth, NotNegative, Range, Ratio, Share, check
from moezoo.models.conditional_moe.conditions import (
    ROOMS,
    ConditionTable,
    Mixed,
    check_mixed,
    one_condition,
    table_of,
)
from moezoo.models.conditional_moe.levels import (
    LOCATIONS,
    balance_losses,
    check_choice,
    context_of,
    idle_losses,
    makes,
)
from moezoo.models.conditional_moe.tokens import (
    EncoderFeatures,
    EncoderInputs,
    Modality,
    Tokenisers,
    text_begins,
    visible,
)
from moezoo.models.shared.card import Card
from moezoo.models.shared.config import ModelTraits
from moezoo.models.shared.macs import Macs, dense_trunk
from moezoo.nn.attention import first_token, mean_token
from moezoo.nn.context import Context
from moezoo.nn.embed import grid_of
from moezoo.nn.exploration import policy
from moezoo.nn.layers import LayerNorm, Linear
from moezoo.nn.routers import EXACT
from moezoo.ops import exchange, soft

COLDEST = 0.01  # Temperatures below make gradients of a softmax over similarities too steep.
# How much wider than a token what a router of tokens sees is; decisions of rows are made for good.
SEEN = {"token": 1, "context": 2}
LevelName = Literal["dense", "token", "context", "modality", "task", "attribute"]


@dataclass(frozen=True)
class ConditionalMoEConfig(ModelTraits):
    """Conditional MoE; the defaults are Uni-Perceiver-MoE's base size."""

    card: ClassVar[Card] = Card(
        title="Conditional MoE (Uni-Perceiver-MoE)",
        paper="Zhu et al., NeurIPS 2022, arXiv:2206.04674",
        kind="linear maps mixed by token, context, modality, task or attributes",
        parity="the published code: gates, merged maps, encoder layers",
        fixtures=("uniperceiver_moe",),
        trained=("rooms/conditional_moe_tiny",),
        headline="mean score 0.519 ± 0.003 on rooms, dense 0.498 ± 0.006",
    )
    reads: ClassVar[str] = "pairs"
    per_pixel: ClassVar[bool] = False

    level: LevelName = "attribute"
    """Who shares a decision; dense: there are no experts."""
    width: AxisSize = 768
    """Features of a token."""
    depth: Depth = 12
    """Blocks."""
    heads: AxisSize = 12
    """Attention heads; they divide the width."""
    patch: AxisSize = 16
    """Side of the square of pixels that becomes one token."""
    stem: Literal["patch", "conv"] = "patch"
    """What makes patches tokens: a linear map, or convolutions."""
    mlp_ratio: Ratio = 4.0
    """Hidden width of an MLP over the width."""
    experts: AxisSize = 8
    """Linear maps in the place of each one."""
    top_k: AxisSize = 2
    """Maps that are mixed; the weights of several add up to 1, one alone has its probability."""
    location: Literal["odd", "four", "all", "none"] = "odd"
    """Blocks with experts: 0, 2, 4, ... (the published name), 0, 4, 8, ..., all, or none."""
    mlp_gates: Literal["shared", "separate"] = "shared"
    """One decision for both layers of an MLP, or one each."""
    gate_activation: Literal["none", "gelu"] = "none"
    """What stands between linear layer and LayerNorm in routers of rows."""
    noise: Literal["none", "vmoe", "rsample", "jitter"] = "vmoe"
    """How training disturbs routers."""
    noise_std: NotNegative = 1.0
    """Deviation of the noise "vmoe" times the number of experts; factor of that of "rsample"."""
    layer_scale: float = 1e-3
    """What the factors of residual branches start from."""
    drop_path: Share = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    vocabulary: Annotated[int, Range(1, 2**24)] = 260
    """Token ids of texts, of any tokenizer; 260 are 256 bytes, pad, bos, eos, mask."""
    text_length: AxisSize = 128
    """Positions of a text."""
    text_std: NotNegative = 0.02
    """Deviation that embeddings of tokens start from; what patches become is near 1."""
    token_norm: Literal["none", "layer"] = "none"
    """What every token passes before the first block."""
    projection: Literal["none", "linear"] = "none"
    """What stands between the last norm and the comparison."""
    epsilon: NotNegative = 1e-6
    """What normalisations add to a variance; PyTorch's layers have 1e-5."""
    pool: Literal["special", "mean"] = "special"
    """What stands for a sequence as a whole: its special token, or the mean of all tokens."""
    temperature: Annotated[float, Range(COLDEST)] = 0.07
    """What the learned temperature starts from."""
    conditions: tuple[str, ...] = ROOMS
    """The attributes of every side of every task (moezoo.models.conditional_moe.conditions)."""
    dispatch: str = "auto"
    """How tokens reach their experts at the levels token and context, as in M3ViT."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, routers and normalisations stay float32."""

    def __post_init__(self) -> None:
        check(self)
        if self.mlp_hidden < 1:
            raise UserError(f"mlp_ratio is {self.mlp_ratio}; the MLP needs a hidden unit.")
        if self.width % self.heads:
            raise UserError(f"heads is {self.heads}; it must divide the width {self.width}.")
        if not 1 <= self.top_k <= self.experts:
            raise UserError(
                f"top_k is {self.top_k}; it must be between 1 and experts, {self.experts}."
            )
        policy(self.noise, self.noise_std)
        exchange.by_name(self.dispatch)
        table_of(self.conditions)
        check_choice(self)

    def whole(self) -> str:
        """Why no expert can be removed: `models.shared.config.ModelTraits`."""
        if self.level == "dense":
            return "it has none"
        if self.level in ("token", "context"):
            return "layers share the routers"
        return "they are merged into one matrix"

    def macs(self, size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
        """One image compared with as many candidates as `tasks` have, which are encoded already.

        What a condition mixes is merged; where tokens decide, each has its `top_k` maps.
        """
        height, width = grid_of(size, self.patch)
        n, d = height * width + 1, self.width
        sizes: Any = self
        encoder, routers = dense_trunk(sizes, height * width, n), 0
        encoder += n * d * d if self.projection == "linear" else 0
        if self.level in SEEN:
            blocks = sum(map(LOCATIONS[self.location], range(self.depth)))
            maps = n * d * (4 * d + 2 * self.mlp_hidden)
            encoder += blocks * (self.top_k - 1) * maps
            decisions = 3 if self.mlp_gates == "separate" else 2
            summary = 2 * n * d if self.level == "context" else 0
            each = n * SEEN[self.level] * d * self.experts + summary
            routers = blocks * decisions * each
        return Macs(encoder, routers, d * sum(tasks.values()))

    def computes(self) -> dict[str, Any]:
        """Heads, and what normalisations add: `models.shared.config.ModelTraits`."""
        return super().computes() | {"epsilon": self.epsilon}

    def idle_losses(self, tasks: int | None) -> dict[str, str]:
        """The balance losses that this level does not have (`balancing`)."""
        return idle_losses(self.level, self.location)

    @property
    def mlp_hidden(self) -> int:
        """Hidden units of an MLP."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def tiny(cls, **changes: Any) -> ConditionalMoEConfig:
        """For rooms of 64x64 pixels: width 96, 2 blocks with experts, 3 heads, patch 8."""
        sizes: dict[str, Any] = {"width": 96, "depth": 2, "heads": 3, "patch": 8}
        return replace(cls(**sizes, stem="conv", location="all", layer_scale=1.0), **changes)

    @classmethod
    def released(cls, **changes: Any) -> ConditionalMoEConfig:
        """The base size in the form of the released checkpoints: CLIP's words, norms of tokens."""
        words: dict[str, Any] = {"vocabulary": 49_410, "text_length": 512}
        forms: dict[str, Any] = {"token_norm": "layer", "projection": "linear", "epsilon": 1e-5}
        return replace(cls(**words, **forms), **changes)

    @classmethod
    def large(cls, **changes: Any) -> ConditionalMoEConfig:
        """Width 1024, 24 blocks, 16 heads."""
        return replace(cls(width=1024, depth=24, heads=16), **changes)

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> ConditionalMoE:
        """The model, for images of `image_size` (height, width).

        `tasks` by name, of which only the names matter: there is no head. Raises UserError for one
        without attributes, and where sizes do not go together.
        """
        for task in tasks:
            table_of(self.conditions).check_task(task)
        return ConditionalMoE(self, image_size, rngs=rngs)


ConditionNames = str | Mixed | Sequence[str]


class ConditionalMoE(nnx.Module):
    """`encode` inputs and candidates, compare them by `scores`.

        query = model.encode(Inputs(image), "scene|input").whole_BD
        names = model.encode(Inputs(None, text, mask), "scene|target").whole_BD
        logits = model.scores(query, names)  # a class; in a batch of pairs: retrieval

        read = model.encode(Inputs(image, text, mask), "caption|input")  # text from bos on
        logits = model.scores(read.text_BLD, model.words("caption|target"))  # the next tokens

    A batch is under one condition, a name of the table such as "caption|input", which is static:
    one compiled program per task. `Mixed` says otherwise, at the price of a copy of each matrix
    per example.
    """

    def __init__(
        self, config: ConditionalMoEConfig, image_size: tuple[int, int], *, rngs: nnx.Rngs
    ):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        sizes = (config.width, config.patch, image_size, config.vocabulary, config.text_length)
        forms: dict[str, Any] = {"stem": config.stem, "text_std": config.text_std, "dtype": dtype}
        norm = LayerNorm(config.width, config.epsilon) if config.token_norm == "layer" else None
        self.tokens = Tokenisers(*sizes, **forms, norm=norm, rngs=rngs)
        self.encoder = ConditionalEncoder(
            config.width,
            config.heads,
            config.mlp_hidden,
            makes(config, self.table, dtype),
            layer_scale=config.layer_scale,
            drop_path=config.drop_path,
            epsilon=config.epsilon,
            projection=_projection(config, dtype, rngs),
            rngs=rngs,
        )
        # As a logarithm no step of an optimiser can bring it to 0 or below.
        self.log_temperature = nnx.Param(jnp.log(jnp.float32(config.temperature)))
        self.only: tuple[str, tuple[int, ...]] | None = None

    @property
    def table(self) -> ConditionTable:
        """The attributes of every side of every task."""
        # No attribute: it would make equal models' definitions different.
        return table_of(self.config.conditions)

    @property
    def balance_losses(self) -> Mapping[str, Any]:
        """What can be balanced at this level."""
        return balance_losses(self.config.level)

    def encode(
        self,
        inputs: EncoderInputs,
        condition: ConditionNames,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> EncoderFeatures:
        """Read a batch of inputs, or of candidates, under a condition.

        condition: a name of the table; a name per example, which must then be the same; or `Mixed`.
        `key` is for router noise and stochastic depth and acts in training only. Raises UserError
        for a condition that the table lacks, or that does not go with the inputs.
        """
        if not isinstance(condition, str | Mixed):
            condition = one_condition(condition)
        sequence = self.tokens(inputs)
        self.check_condition(condition, sequence.parts)
        if isinstance(condition, Mixed):
            check_mixed(condition, sequence.x_BTD.shape[0])
        context = self.context(condition, sequence.parts, sequence.mask_BT)
        seen_BTT = visible(sequence, context.prefix)
        encoded = self.encoder(sequence.x_BTD, context, seen_BTT, key if train else None)
        whole_BD = POOLS[self.config.pool](encoded.x_BTD, sequence.mask_BT)
        return EncoderFeatures(
            encoded.x_BTD, whole_BD, text_begins(sequence.parts), context.records
        )

    def context(
        self, condition: str | Mixed, parts: Sequence[Modality], mask_BT: Array | None = None
    ) -> Context:
        """What the levels are told about a sequence of these parts."""
        return context_of(self.config.level, self.table, condition, parts, mask_BT)

    def check_condition(self, condition: str | Mixed, parts: Sequence[Modality]) -> None:
        """Raise UserError where this model is left for another condition, or other inputs."""
        if self.only is None:
            return
        name, kinds = self.only
        if condition != name:
            asked = condition if isinstance(condition, str) else " and ".join(condition.names)
            raise UserError(
                f"This model was specialised for {name}; it cannot be asked under {asked}."
            )
        if kinds != tuple(part.kind for part in parts):
            raise UserError(
                f"This model was specialised for {name} with other inputs: an image, a text and an "
                "image with a text are three kinds."
            )

    def words(self, condition: str, *, key: Array | None = None, train: bool = False) -> Array:
        """Every token id as a candidate, each encoded by itself: [V, D]."""
        ids_V1 = jnp.arange(self.config.vocabulary)[:, None]
        return self.encode(EncoderInputs(text_BL=ids_V1), condition, key=key, train=train).whole_BD

    def scores(self, query: Array, candidates_CD: Array) -> Array:
        """Cosine similarities over the temperature: [..., D] and [C, D] to float32 [..., C].

        Raises UserError for an empty set of candidates.
        """
        if candidates_CD.ndim != 2 or candidates_CD.shape[0] == 0:
            raise UserError(
                f"The candidates have shape {candidates_CD.shape}: a prediction needs a set of at "
                "least one candidate, [candidates, features]."
            )
        temperature = jnp.exp(self.log_temperature.get_value())
        query, candidates_CD = (x.astype(jnp.float32) for x in (query, candidates_CD))
        # Exact: accelerators round float32 products, and the temperature magnifies what is lost.
        cosine = jnp.matmul(soft.unit(query), soft.unit(candidates_CD).T, precision=EXACT)
        return cosine / jnp.maximum(temperature, COLDEST)


def _projection(config: ConditionalMoEConfig, dtype: Any, rngs: nnx.Rngs) -> Linear | None:
    if config.projection == "none":
        return None
    return Linear(config.width, config.width, dtype=dtype, init=xavier(1), rngs=rngs)


POOLS = {"special": lambda x_BTD, mask_BT: first_token(x_BTD), "mean": mean_token}
