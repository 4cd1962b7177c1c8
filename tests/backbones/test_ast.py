"""AST: grids, order of tokens, positions of other lengths, masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.ast import (
    AST,
    SPECIAL,
    ASTConfig,
    SpectrogramPatches,
    fitted,
    token_mask,
    zero_elsewhere,
)
from moezoo.errors import UserError
from moezoo.ops.interpolate import resize

TINY = ASTConfig(
    frames=23, mel=10, patch=4, stride_time=3, stride_freq=2, width=6, depth=1, heads=2, hidden=8
)


def test_tokens_lie_by_band_first() -> None:
    """Patch (f, t) is that of bands from 2f and frames from 3t, at f * T + t."""
    embed = SpectrogramPatches(TINY, rngs=nnx.Rngs(0))
    audio = jax.random.normal(jax.random.key(0), (2, 17, 10))
    found = embed(audio)
    rows, columns = TINY.grid(17)
    assert (rows, columns) == (4, 5) and found.shape == (2, 20, 6)
    kernel = np.asarray(embed.kernel.get_value())[:, :, 0]
    for f in range(rows):
        for t in range(columns):
            patch = np.asarray(audio)[:, 3 * t : 3 * t + 4, 2 * f : 2 * f + 4]
            wanted = np.einsum("btf,ftd->bd", patch, kernel)
            np.testing.assert_allclose(found[:, f * columns + t], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_positions_are_cut_from_the_middle_or_stretched() -> None:
    own = (3, 7)
    table = jax.random.normal(jax.random.key(0), (1, SPECIAL + 21, 4))
    maps = np.asarray(table)[:, SPECIAL:].reshape(1, 3, 7, 4)
    for columns, first in ((7, 0), (6, 0), (5, 1), (4, 1), (3, 2), (1, 3)):
        found = fitted(table, own, (3, columns))
        np.testing.assert_array_equal(found[:, :SPECIAL], table[:, :SPECIAL])
        wanted = maps[:, :, first : first + columns]
        np.testing.assert_array_equal(found[:, SPECIAL:].reshape(wanted.shape), wanted)
    longer = fitted(table, own, (3, 11))
    wanted = resize(jnp.asarray(maps), (3, 11))
    np.testing.assert_array_equal(longer[:, SPECIAL:].reshape(wanted.shape), wanted)
    assert not zero_elsewhere(table, own, (3, 5)).any()


@pytest.mark.slow
def test_clips_of_any_length_from_a_patch_on() -> None:
    model = AST(TINY, rngs=nnx.Rngs(0))
    for frames in (4, 22, 40):
        found = jax.eval_shape(lambda audio: model(audio).y, jnp.ones((1, frames, 10)))
        assert found.shape == (1, TINY.tokens(frames), 6)
    with pytest.raises(UserError, match="3 frames and 10 mel bands are smaller"):
        model(jnp.ones((1, 3, 10)))
    with pytest.raises(UserError, match="reads 10 mel bands, but the clips have 12"):
        model(jnp.ones((1, 23, 12)))


def test_patches_behind_the_last_frame_are_padding() -> None:
    mask = token_mask(TINY, 23, jnp.asarray([23, 7, 6, 0]))  # patches begin at 0, 3, ..., 18
    rows, columns = TINY.grid(23)
    assert mask[:, :SPECIAL].all()
    grid = np.asarray(mask)[:, SPECIAL:].reshape(4, rows, columns)
    np.testing.assert_array_equal(grid[:, 0].sum(1), [7, 3, 2, 0])
    assert (grid == grid[:, :1]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 4}, "heads is 4"),
        ({"stride_time": 0}, "stride_time is 0"),
        ({"patch": 12}, "smaller than a patch"),
    ],
)
def test_impossible_sizes(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ASTConfig(**({f: getattr(TINY, f) for f in TINY.__dataclass_fields__} | changes))
