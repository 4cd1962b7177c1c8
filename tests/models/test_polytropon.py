"""Polytropon's models: what trains, that tasks differ, that one task's is dense, refusals."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.models.polytropon.model import PolyConfig
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.injection import fold
from tests.models.tiny import filled

DECODER = DecoderConfig(vocabulary=20, width=8, depth=1, heads=2, groups=1, hidden=6, length=16)
SMALL = PolyConfig(decoder=DECODER, tasks=3, skills=2, rank=2, heads=2)
TEXT = {"lm": 20}
SIZE = (1, 16)


def test_a_task_s_decoder_is_the_dense_one_that_is_left_of_it() -> None:
    parts = filled(lambda: SMALL.build(TEXT, SIZE, nnx.Rngs(0)))
    assert all("/update/" in path for path in module.flatten(parts.params))
    model = module.merge(parts.definition, parts.params, parts.stats)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (1, 6)), jnp.int32)
    outputs = [np.asarray(model.features(tokens, Context(task)).x_BTD) for task in (0, 2)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    fold(model, 2)
    folded = model.features(tokens, Context()).x_BTD
    np.testing.assert_allclose(folded, outputs[1], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    for change, message in (
        ({"skills": 1}, "nothing to choose"),
        ({"targets": ()}, "targets is empty"),
        ({"shares": "softmax"}, "softmax"),
    ):
        with pytest.raises(UserError, match=message):
            replace(SMALL, **change)
    with pytest.raises(UserError, match="4 heads do not divide a layer of 8 inputs and 6 outputs"):
        module.abstract(lambda: replace(SMALL, heads=4).build(TEXT, SIZE, nnx.Rngs(0)))
    assert set(SMALL.idle_losses(None)) == {"importance", "load", "switch", "mutual_information"}
