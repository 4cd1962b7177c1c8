"""A decoder's loss and gradient over fsdp x tensor devices equal those of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.backbones.decoder import DecoderConfig
from moezoo.nn import module
from moezoo.train import placement
from moezoo.train.mesh import batch_sharding, make_mesh
from moezoo.train.schema import MeshConfig
from tests.backbones.test_decoder import random_parts

CONFIG = DecoderConfig(
    vocabulary=32, width=16, depth=2, heads=4, groups=2, hidden=24, head_width=8, remat=True
)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp_and_tensor_give_the_gradient_of_one_device(tied: bool) -> None:
    config = DecoderConfig(**{**vars(CONFIG), "tied_head": tied, "qk_norm": tied})
    parts = random_parts(config)
    tokens = np.random.default_rng(0).integers(0, 32, (4, 10)).astype(np.int32)
    mask = np.arange(10) >= np.array([0, 3, 1, 5])[:, None]

    def loss(params, tokens, mask):
        model = module.merge(parts.definition, params, parts.stats)
        logits = model(tokens, mask_BT=mask).logits_BTV[:, :-1]
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return jnp.where(mask[:, :-1], each[..., 0], 0).sum() / mask[:, :-1].sum()

    wanted = jax.jit(jax.value_and_grad(loss))(parts.params, tokens, mask)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    where = placement.place(mesh, parts.params)
    assert not where.kept_whole
    batch = batch_sharding(mesh)
    placed = (
        jax.device_put(parts.params, where.shardings),
        jax.device_put(tokens, batch),
        jax.device_put(mask, batch),
    )
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where.shardings))
    found = step(*placed)
    kernel = found[1]["layers"]["0"]["mlp"]["gate"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 12)}
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for path, leaf in module.flatten(wanted[1]).items():
        again = module.flatten(found[1])[path]
        np.testing.assert_allclose(again, leaf, rtol=1e-4, atol=1e-5, err_msg=path)
