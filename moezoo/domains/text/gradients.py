"""ELREA's features of prompts: where a fresh adapter would go to learn them.

Li et al., "Ensembles of Low-Rank Expert Adapters", ICLR 2025, arXiv:2502.00089: the gradient of the
loss of a prompt's own tokens (no answer is known when it is asked) with respect to adapters, as a
random projection of length 1. Examples are grouped by it before training (`example_groups`), an
adapter is trained on each group, and a prompt weighs those by the cosines of its own with theirs
(route `elrea`).

The paper takes gradients of an adapter that has learned all groups. Here it is a fresh one, drawn
once, whose second factors are 0: a decoder with the first adapter merged into it (`moezoo adapter
--merge`) is the base then. We had no code and no full text, so the width of the projection is our
choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.backbones.generate import padded
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.ops.prototypes import projected
from moezoo.tasks.language import token_loss
from moezoo.weights import library_bank
from moezoo.weights.library import LayerForm

PROJECTED, AT_ONCE = 256, 16  # numbers of a feature; prompts whose gradients are held at once


def gradient_features(
    decoder: Any, layers: Mapping[str, LayerForm], rows: Sequence[Sequence[int]], pad: int = 0
) -> np.ndarray:
    """Each prompt's projected gradient, float32 [B, M] of length 1; 0 for a single token.

    decoder: bare, and left so. layers: the forms of the fresh adapter. rows: tokens of prompts.
    """
    model = module.merge(*module.split(decoder))  # another with the same arrays
    library_bank.attach_fresh(model, layers)
    parts = module.split(model)
    ups = tuple(f"{path}/update/up" for path in sorted(layers))
    longest = -(-max(map(len, rows)) // 16) * 16  # few shapes, few programs
    found = []
    for start in range(0, len(rows), AT_ONCE):
        given = padded(rows[start : start + AT_ONCE], pad, "right", longest)
        found.append(np.asarray(_features(parts.definition, ups, *parts[1:], *given)))
    return np.concatenate(found)


@partial(jax.jit, static_argnums=(0, 1))
def _features(
    definition: Any, ups: tuple[str, ...], params: Any, stats: Any, tokens_BT: Any, mask_BT: Any
) -> jax.Array:
    flat = module.flatten(params)

    def loss(own: dict[str, jax.Array], tokens_T: jax.Array, mask_T: jax.Array) -> jax.Array:
        model = module.merge(definition, module.unflatten(flat | own), stats)
        x_1TD = model.features(tokens_T[None], Context()).x_BTD  # padding is behind all else
        logits_TV = model.logits(x_1TD, Context())[0]
        loss_T = token_loss(logits_TV[None, :-1], tokens_T[None, 1:])[0]
        asked_T = mask_T[1:]
        return jnp.sum(jnp.where(asked_T, loss_T, 0.0)) / jnp.maximum(asked_T.sum(), 1)

    # Of second factors alone: those are 0, so first ones have no gradient.
    own = {name: flat[name] for name in ups}
    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(own, tokens_BT, mask_BT)
    gradients_BP = jnp.concatenate([grads[n].reshape(len(tokens_BT), -1) for n in ups], axis=1)
    # Every prompt sees the same projection, today and when it is asked.
    return jax.vmap(projected, (0, None, None))(gradients_BP, jax.random.key(0), PROJECTED)
