"""Images and texts as tokens of one kind of sequence: [special token, patches, text]."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.backbones.decoder import Embedding
from moezoo.errors import UserError
from moezoo.nn.embed import STEMS, grid_of
from moezoo.nn.layers import LayerNorm, normal, trunc_normal
from moezoo.nn.moe import Record
from moezoo.ops.interpolate import resize

IMAGE, TEXT = 0, 1  # the modalities


class EncoderInputs(NamedTuple):
    """An image, a text, or both, of B examples.

    image_BHWC: normalised pixels. text_BL: int token ids. mask_BL: bool, False = padding.
    """

    image_BHWC: Any = None
    text_BL: Any = None
    mask_BL: Any = None


class Modality(NamedTuple):
    """The modality of a part of a sequence and its tokens; the special one is the first part's."""

    kind: int
    tokens: int


class Tokens(NamedTuple):
    """A sequence: its tokens, its padding (False; None: there is none), its parts."""

    x_BTD: Array
    mask_BT: Array | None
    parts: tuple[Modality, ...]


class EncoderFeatures(NamedTuple):
    """What the encoder makes of a sequence.

    x_BTD: every token as it leaves the encoder. whole_BD: the sequence as a whole. split: where
    the text begins. records: of the levels, by path.
    """

    x_BTD: Array
    whole_BD: Array
    split: int
    records: dict[str, Record]

    @property
    def text_BLD(self) -> Array:
        """The tokens of the text."""
        return self.x_BTD[:, self.split :]


def text_begins(parts: Sequence[Modality]) -> int:
    """The number of tokens before the text, the special token included."""
    return sum(part.tokens for part in parts if part.kind == IMAGE) or 1


class Tokenisers(nnx.Module):
    """Patches and token ids to D features, each with its position and its modality.

    norm: what a token, the special one too, passes last; None: nothing.
    """

    def __init__(
        self,
        width: int,
        patch: int,
        image_size: tuple[int, int],
        vocabulary: int,
        text_length: int,
        *,
        stem: str = "patch",
        text_std: float = 0.02,
        norm: LayerNorm | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid, self.patch = grid_of(image_size, patch), patch
        patches = self.grid[0] * self.grid[1]

        def vectors(count: int) -> nnx.Param:
            return nnx.Param(trunc_normal(rngs.params(), (count, width)))

        self.patch_embed = STEMS[stem](patch, width, dtype=dtype, rngs=rngs)
        self.embed = Embedding(vocabulary, width, init=partial(normal, std=text_std), rngs=rngs)
        self.special, self.modality = vectors(1), vectors(2)
        self.image_positions, self.text_positions = vectors(patches), vectors(text_length)
        self.norm: Any = norm
        self.vocabulary, self.text_length, self.dtype = vocabulary, text_length, dtype

    def __call__(self, inputs: EncoderInputs) -> Tokens:
        """The sequence of an input.

        Raises UserError where there is neither image nor text, shapes do not go together, a text is
        too long, or (outside of a compiled function) has ids that are not in the vocabulary.
        """
        parts = self.parts(inputs)
        pieces, masks = [], []
        if inputs.image_BHWC is not None:
            pieces.append(self.image(inputs.image_BHWC))
            masks.append(jnp.ones(pieces[-1].shape[:2], bool))
        if inputs.text_BL is not None:
            pieces.append(self.text(inputs.text_BL))
            given = True if inputs.mask_BL is None else inputs.mask_BL
            masks.append(jnp.broadcast_to(jnp.asarray(given, bool), pieces[-1].shape[:2]))
        batch, _, width = pieces[0].shape
        special = self._normalised(self.special.get_value().astype(self.dtype))
        x_BTD = jnp.concatenate([jnp.broadcast_to(special, (batch, 1, width)), *pieces], axis=1)
        if inputs.text_BL is None or inputs.mask_BL is None:
            return Tokens(x_BTD, None, parts)
        mask_BT = jnp.concatenate([jnp.ones((batch, 1), bool), *masks], axis=1)
        return Tokens(x_BTD, mask_BT, parts)

    def parts(self, inputs: EncoderInputs) -> tuple[Modality, ...]:
        """What the sequence of an input consists of; only shapes are looked at."""
        _check_shapes(inputs)
        found = []
        if inputs.image_BHWC is not None:
            height, width = grid_of(inputs.image_BHWC.shape[1:3], self.patch)
            found.append(Modality(IMAGE, height * width))
        if inputs.text_BL is not None:
            found.append(Modality(TEXT, inputs.text_BL.shape[1]))
        if not found:
            raise UserError("There is neither an image nor a text to encode.")
        return (Modality(found[0].kind, found[0].tokens + 1), *found[1:])

    def image(self, image_BHWC: Array) -> Array:
        """Patches [B, P, D]; learned positions are resized to other grids."""
        grid = grid_of((image_BHWC.shape[1], image_BHWC.shape[2]), self.patch)
        positions_PD = self.image_positions.get_value()
        if grid != self.grid:
            known = positions_PD.reshape(1, *self.grid, -1)
            positions_PD = resize(known, grid).reshape(grid[0] * grid[1], -1)
        added = positions_PD + self.modality.get_value()[IMAGE]
        return self._normalised(self.patch_embed(image_BHWC) + added.astype(self.dtype))

    def text(self, text_BL: Array, first: Any = 0) -> Array:
        """Texts [B, L, D] whose first token has the position `first`."""
        length = text_BL.shape[1]
        if length > self.text_length:
            raise UserError(
                f"Texts of {length} tokens do not fit into the model's {self.text_length} "
                "positions: cut them, or raise model.text_length."
            )
        check_ids(text_BL, self.vocabulary)
        # Dynamic: while a caption is made, `first` is a number of the loop.
        positions_LD = jax.lax.dynamic_slice_in_dim(self.text_positions.get_value(), first, length)
        x_BLD = self.embed(text_BL)
        x_BLD = (x_BLD + positions_LD + self.modality.get_value()[TEXT]).astype(self.dtype)
        return self._normalised(x_BLD)

    def _normalised(self, x_BTD: Array) -> Array:
        return x_BTD if self.norm is None else self.norm(x_BTD)


def _check_shapes(inputs: EncoderInputs) -> None:
    given = zip(("image", "text", "mask"), inputs, strict=True)
    shapes = {name: a.shape for name, a in given if a is not None}
    wanted = {"image": "[batch, height, width, 3]", "text": "[batch, tokens]"}
    for name, axes in wanted.items():
        if name in shapes and len(shapes[name]) != len(axes.split(",")):
            raise UserError(f"The {name} has shape {shapes[name]}; it must be {axes}.")
    if "mask" in shapes and shapes["mask"] != shapes.get("text"):
        raise UserError(
            f"The mask of a text has shape {shapes['mask']}, the text {shapes.get('text')}: give "
            "one truth value per token."
        )
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise UserError(
            f"{shapes['image'][0]} images with {shapes['text'][0]} texts are no pairs: give as "
            "many of both."
        )


def check_ids(text_BL: Any, vocabulary: int) -> None:
    """Raise UserError for token ids outside of the vocabulary, where they are known already."""
    try:
        ids = np.asarray(text_BL)
    # Inside a compiled function nobody knows the ids.
    except jax.errors.TracerArrayConversionError:
        return
    if ids.dtype.kind not in "iu":
        raise UserError(f"The text is of type {ids.dtype}; token ids are integers.")
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise UserError(
            f"The text has token {wrong[0]}, the model knows 0 to {vocabulary - 1}: use the "
            "tokenizer that the model was made for."
        )


def visible(sequence: Tokens, prefix: int | None) -> Array:
    """What each token sees, bool [B or 1, T, T].

    All of the sequence; or, behind `prefix` tokens that see only each other, what stands before it.
    """
    tokens = sequence.x_BTD.shape[1]
    seen_BTT = jnp.ones((1, tokens, tokens), bool)
    if prefix is not None:
        at_T = jnp.arange(tokens)
        seen_BTT &= at_T <= jnp.maximum(at_T, prefix - 1)[:, None]
    return seen_BTT if sequence.mask_BT is None else seen_BTT & sequence.mask_BT[:, None]
