"""Shifted windows against attention of all places to all with a mask, levels, names, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.swin import PatchMerging, SwinBlock, SwinConfig, SwinTrunk, WindowAttention
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights.swin_names import from_swin, to_hf_swin, to_timm_swin
from tests.models.tiny import filled, quick_jit

WIDTH, HEADS, WINDOW = 6, 2, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CONFIG = SwinConfig(width=4, depths=(2, 1, 1), heads=(1, 2, 4), patch=2, window=2, mlp_ratio=2.0)


def slow_attention(attn: WindowAttention, x_HWD, shift: int):
    """Every place looks at all of the filled-up map; a mask leaves those of its window.

    Places of one window of a rolled map that were no neighbours before are in different windows.
    """
    height, width = x_HWD.shape[:2]
    w = attn.window
    full = (height + -height % w, width + -width % w)
    x = jnp.zeros((*full, x_HWD.shape[2])).at[:height, :width].set(x_HWD)
    place_P2 = np.stack(np.mgrid[: full[0], : full[1]], -1).reshape(-1, 2)
    # The windows of the map that was moved by `shift`, its first ones being cut off by the border.
    block_P2 = (place_P2 + (w - shift if shift else 0)) // w
    same_PP = (block_P2[:, None] == block_P2[None]).all(-1)
    apart_PP2 = place_P2[:, None] - place_P2[None] + w - 1
    row_PP = np.clip(apart_PP2[..., 0] * (2 * w - 1) + apart_PP2[..., 1], 0, (2 * w - 1) ** 2 - 1)
    q, k, v = jnp.split(attn.qkv(x.reshape(-1, x.shape[-1])), 3, axis=-1)
    d = WIDTH // HEADS
    mixed = []
    for h in range(HEADS):
        part = slice(h * d, (h + 1) * d)
        scores = q[:, part] @ k[:, part].T / np.sqrt(d) + attn.offset_bias.get_value()[row_PP, h]
        mixed.append(jax.nn.softmax(jnp.where(same_PP, scores, -jnp.inf), -1) @ v[:, part])
    y = attn.proj(jnp.concatenate(mixed, -1)).reshape(*full, -1)
    return y[:height, :width]


@pytest.mark.parametrize(
    ("grid", "shift"),
    [
        ((6, 9), 1),
        ((7, 5), 1),
        pytest.param((6, 9), 0, marks=pytest.mark.slow),
        pytest.param((3, 3), 1, marks=pytest.mark.slow),
        pytest.param((6, 6), 2, marks=pytest.mark.slow),
    ],
)
def test_shifted_windows_equal_masked_attention(grid: tuple[int, int], shift: int) -> None:
    parts = filled(lambda: SwinBlock(WIDTH, HEADS, 8, WINDOW, shift, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, *grid, WIDTH))
    moved = shift if min(grid) > WINDOW else 0  # a single window is not moved

    def fast(params, x):
        block = module.merge(parts.definition, params, {})
        return block.in_windows(x, block.attn)

    def slow(params, x):
        attn = module.merge(parts.definition, params, {}).attn
        return jnp.stack([slow_attention(attn, one, moved) for one in x])

    def both(form):
        def loss(params, x):
            y = form(params, x)
            return jnp.sum(jnp.sin(y)), y

        return quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(parts.params, x)

    (_, found), slopes = both(fast)
    (_, wanted), true_slopes = both(slow)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    for ours, true in zip(jax.tree.leaves(slopes), jax.tree.leaves(true_slopes), strict=True):
        np.testing.assert_allclose(ours, true, **CLOSE)


def test_merging_puts_four_places_side_by_side() -> None:
    merge = module.merge(*filled(lambda: PatchMerging(2, rngs=nnx.Rngs(0))))
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 2))
    found = merge(x)
    assert found.shape == (1, 2, 2, 4)
    last = jnp.zeros(2)  # below the map
    four = jnp.concatenate([x[0, 2, 2], last, x[0, 2, 3], last])
    np.testing.assert_allclose(found[0, 1, 1], merge.reduction(merge.norm(four)), **CLOSE)


def test_levels_and_windows() -> None:
    assert CONFIG.grids((12, 20)) == ((6, 10), (3, 5), (2, 3))
    assert CONFIG.windows((12, 20)) == (2, 2, 2) and CONFIG.windows((4, 8)) == (2, 1, 1)
    trunk = module.merge(*filled(lambda: SwinTrunk(CONFIG, (12, 20), rngs=nnx.Rngs(0))))
    found = jax.eval_shape(trunk.levels, jnp.zeros((2, 12, 20, 3)))
    assert [f.shape for f in found] == [(2, 6, 10, 4), (2, 3, 5, 8), (2, 2, 3, 16)]


def test_names_of_timm_microsoft_and_transformers_go_both_ways() -> None:
    parts = filled(lambda: SwinTrunk(CONFIG, (12, 20), rngs=nnx.Rngs(0)))
    flat = {path: np.asarray(array) for path, array in module.flatten(parts.params).items()}
    timm, hf = to_timm_swin(flat).arrays, to_hf_swin(flat).arrays
    assert {"layers.1.downsample.norm.weight", "layers.2.downsample.norm.weight"} <= set(timm)
    assert "encoder.layers.0.downsample.reduction.weight" in hf
    microsoft = {
        name.replace("layers.1.down", "layers.0.down").replace("layers.2.down", "layers.1.down"): a
        for name, a in timm.items()
    }
    prefixed = {f"swin.{name}": array for name, array in hf.items()}
    for stored in (timm, microsoft, hf, prefixed):
        found = from_swin(stored)
        assert not found.unknown and found.arrays.keys() == flat.keys()
        for path, array in flat.items():
            np.testing.assert_array_equal(found.arrays[path], array, err_msg=path)
    assert from_swin(timm | {"layers.0.blocks.0.gamma": np.ones(3)}).unknown == [
        "layers.0.blocks.0.gamma"
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": (3, 6)}, "depths names 4 stages, heads 2"),
        ({"heads": (5, 6, 12, 24)}, "heads of stage 0 is 5; it must divide its width, 96"),
        ({"depths": ()}, "depths names 0 stages"),
        ({"window": 0}, "window"),
        ({"mlp_ratio": 0.001}, "mlp_ratio"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SwinConfig(**changes)


@pytest.mark.slow
def test_the_papers_sizes() -> None:
    """Parameters of the trunks, table 7 of the paper (28, 50 and 88 million with a classifier)."""
    for config, millions in ((SwinConfig.tiny(), 28), (SwinConfig.base(), 87)):
        shapes = module.abstract(lambda c=config: SwinTrunk(c, (224, 224), rngs=nnx.Rngs(0)))
        assert round(module.count(shapes.params) / 1e6) == millions
