"""What a decoder keeps of the tokens it has seen: their keys and values, in slots."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array


class KeyValues(NamedTuple):
    """Rotated keys and values of one layer, [B, S, G, D] for S tokens or slots."""

    keys_BSGD: Array
    values_BSGD: Array

    def written(self, new: KeyValues, slot: Array) -> KeyValues:
        """With the tokens of `new` from `slot` on."""
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), slot, axis=1)
            for old, fresh in zip(self, new, strict=True)
        )
        return KeyValues(keys, values)


class Cache(NamedTuple):
    """The keys and values of every layer, and which slots hold a token.

    All rows fill the same slots in step, so that one update serves the batch; a row that has
    padding in a slot never looks there.

    layers: one entry per layer.   valid_BS: bool, False = empty slot or padding.
    used: int32 scalar, slots filled so far.
    """

    layers: tuple[KeyValues, ...]
    valid_BS: Array
    used: Array

    @classmethod
    def empty(
        cls, layers: int, batch: int, slots: int, groups: int, head_width: int, dtype: Any
    ) -> Self:
        """Room for `slots` tokens per row, padding included."""
        shape = (batch, slots, groups, head_width)
        pairs = (KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))
        return cls(tuple(pairs), jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

    @property
    def lengths_B(self) -> Array:
        """Tokens seen per row, padding not counted: the next token's position, int32."""
        return self.valid_BS.sum(-1, dtype=jnp.int32)

    def reserved(self, mask_BT: Array) -> Self:
        """With the next slots taken for tokens [B, T], whose padding stays invalid.

        Their keys and values follow layer by layer.
        """
        valid_BS = jax.lax.dynamic_update_slice_in_dim(self.valid_BS, mask_BT, self.used, axis=1)
        return self._replace(valid_BS=valid_BS, used=self.used + mask_BT.shape[1])

    def visible(self, tokens: int) -> Array:
        """Which slots each of the last `tokens` reserved ones sees, bool [B, T, S]."""
        slot_S = jnp.arange(self.valid_BS.shape[1])
        own_T = self.used - tokens + jnp.arange(tokens)
        return (slot_S <= own_T[:, None]) & self.valid_BS[:, None, :]
