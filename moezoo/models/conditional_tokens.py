"""Images and texts as tokens of one kind of sequence: [special token, patches, text]."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.backbones.decoder_layers import Embedding
from moezoo.errors import UserError
from moezoo.nn.embed import PatchEmbed, grid_of
from moezoo.nn.layers import trunc_normal
from moezoo.ops.interpolate import resize

IMAGE, TEXT = 0, 1  # the modalities


class Inputs(NamedTuple):
    """An image, a text, or both, of B examples.

    image_BHWC: normalised pixels. text_BL: int token ids. mask_BL: bool, False = padding.
    """

    image_BHWC: Any = None
    text_BL: Any = None
    mask_BL: Any = None


class Tokens(NamedTuple):
    """A sequence: x_BTD, its padding (None: none), and what it consists of.

    parts: the modality of each part and the tokens of it; the special token counts with the first.
    """

    x_BTD: Array
    mask_BT: Array | None
    parts: tuple[tuple[int, int], ...]

    @property
    def split(self) -> int:
        """The tokens before the text, the special token included."""
        return sum(size for kind, size in self.parts if kind == IMAGE) or 1


class Tokenisers(nnx.Module):
    """Patches and token ids to D features, each with its position and its modality."""

    def __init__(
        self,
        width: int,
        patch: int,
        image_size: tuple[int, int],
        vocabulary: int,
        text_length: int,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid, self.patch = grid_of(image_size, patch), patch
        patches = self.grid[0] * self.grid[1]

        def vectors(count: int) -> nnx.Param:
            return nnx.Param(trunc_normal(rngs.params(), (count, width)))

        self.patch_embed = PatchEmbed(patch, width, dtype=dtype, rngs=rngs)
        self.embed = Embedding(vocabulary, width, rngs=rngs)
        self.special, self.modality = vectors(1), vectors(2)
        self.image_positions, self.text_positions = vectors(patches), vectors(text_length)
        self.vocabulary, self.text_length, self.dtype = vocabulary, text_length, dtype

    def __call__(self, inputs: Inputs) -> Tokens:
        """The sequence of an input.

        Raises UserError where there is neither image nor text, a text is too long, or (outside of
        a compiled function) has ids that are not in the vocabulary.
        """
        parts, pieces, masks = [], [], []
        if inputs.image_BHWC is not None:
            pieces.append(self.image(inputs.image_BHWC))
            masks.append(jnp.ones(pieces[-1].shape[:2], bool))
            parts.append((IMAGE, pieces[-1].shape[1]))
        if inputs.text_BL is not None:
            pieces.append(self.text(inputs.text_BL))
            given = inputs.mask_BL
            masks.append(jnp.ones(pieces[-1].shape[:2], bool) if given is None else given)
            parts.append((TEXT, pieces[-1].shape[1]))
        if not parts:
            raise UserError("There is neither an image nor a text to encode.")
        batch, width = pieces[0].shape[0], pieces[0].shape[2]
        special = self.special.get_value().astype(self.dtype)
        pieces.insert(0, jnp.broadcast_to(special, (batch, 1, width)))
        masks.insert(0, jnp.ones((batch, 1), bool))
        parts[0] = (parts[0][0], parts[0][1] + 1)
        padded = inputs.text_BL is not None and inputs.mask_BL is not None
        mask_BT = jnp.concatenate(masks, axis=1) if padded else None
        return Tokens(jnp.concatenate(pieces, axis=1), mask_BT, tuple(parts))

    def image(self, image_BHWC: Array) -> Array:
        """Patches [B, P, D]; learned positions are resized to other grids."""
        grid = grid_of((image_BHWC.shape[1], image_BHWC.shape[2]), self.patch)
        positions_PD = self.image_positions.get_value()
        if grid != self.grid:
            known = positions_PD.reshape(1, *self.grid, -1)
            positions_PD = resize(known, grid).reshape(grid[0] * grid[1], -1)
        added = positions_PD + self.modality.get_value()[IMAGE]
        return self.patch_embed(image_BHWC) + added.astype(self.dtype)

    def text(self, text_BL: Array, first: Any = 0) -> Array:
        """Texts [B, L, D] whose first token has the position `first`."""
        length = text_BL.shape[1]
        if length > self.text_length:
            raise UserError(
                f"Texts of {length} tokens do not fit into the model's {self.text_length} "
                "positions: cut them, or raise model.text_length."
            )
        check_ids(text_BL, self.vocabulary)
        positions_LD = jax.lax.dynamic_slice_in_dim(self.text_positions.get_value(), first, length)
        x_BLD = self.embed(text_BL)
        return (x_BLD + positions_LD + self.modality.get_value()[TEXT]).astype(self.dtype)


def check_ids(text_BL: Any, vocabulary: int) -> None:
    """Raise UserError for token ids outside of the vocabulary, where they are known already."""
    if isinstance(text_BL, jax.core.Tracer):
        return
    ids = np.asarray(text_BL)
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise UserError(
            f"The text has token {wrong[0]}, the model knows 0 to {vocabulary - 1}: use the "
            "tokenizer that the model was made for."
        )
