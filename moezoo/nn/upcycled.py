"""What experts out of an MLP still need: routers that know something, weights that fit, noise.

`nn.upcycle` gives every expert of a layer a part of the dense network's MLP, or all of it. Here,
on the model, layer by layer:

- Routers where the MLP was cut into G groups (`whole_copies`). One fresh column serves the G
  experts of a copy, so that they have equal logits, and the K largest are K / G whole copies: every
  group is chosen equally often, and equally weighted within each copy. This is the "virtual group
  initialization" of He et al. (arXiv:2410.07524); a router of E independent columns may choose
  one group twice and another never. It needs a K that is a multiple of G.
- Routers of clusters (`kernel_of`): columns are the centres of the tokens that entered the layer
  in the dense network (`DensePass`), found by `ops.kmeans`.
- Weights that add up to something else than 1 (`rescale`). With logits near 0 a selection chooses
  as before, for the largest stay the largest, but all weights are equal, 1 / E for a softmax; with
  the experts' outputs divided by the sum of K of them the layer is the dense MLP.
- Noise (`disturb`), so that copies differ from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.nn import surgery
from moezoo.nn.context import Context, task_of_tokens
from moezoo.nn.experts import Stack
from moezoo.nn.moe import MoE, MoEOutput, Record
from moezoo.nn.routers import Router, TopKRouter
from moezoo.ops.expert import dense
from moezoo.ops.kmeans import spherical_kmeans
from moezoo.ops.routing import Routing

NEAR_ZERO = 1e-6  # factor of routers whose weights shall be equal
PROBES = 16  # random rows of logits that tell whether weights always add up to the same


def sees_tokens(layer: Any) -> bool:
    """Whether a router of this layer's own decides by what a matrix [.., D, E] makes of a token."""
    router = getattr(layer, "router", None)
    decides = getattr(router, "decision", None) in ("token", "task_support", "row", "batch")
    return isinstance(layer, MoE) and decides and hasattr(router, "kernel")


def weight_sum(layer: Any) -> float | None:
    """What a token's weights add up to where its logits are equal.

    None where tokens do not choose.
    """
    router = getattr(layer, "router", None)
    if not (sees_tokens(layer) and isinstance(router, TopKRouter)):
        return None
    logits_NE = jnp.zeros((1, router.kernel.get_value().shape[-1]))  # type: ignore[attr-defined]
    return float(_sums(router, logits_NE)[0])


def adds_up(layer: Any) -> bool:
    """Whether the weights of a router of tokens that choose add up to 1 whatever its logits are."""
    experts = layer.router.kernel.get_value().shape[-1]
    logits_NE = np.random.default_rng(0).normal(size=(PROBES, experts)).astype(np.float32)
    return bool(np.allclose(_sums(layer.router, jnp.asarray(logits_NE)), 1.0, atol=1e-4))


def _sums(router: TopKRouter, logits_NE: Array) -> np.ndarray:
    # Not `select_for`: a balancing bias, which moves choices only, may be a shape here.
    return np.asarray(router.select(logits_NE, router.k).weights_NK.sum(1))


def takes_whole_copies(layer: Any, groups: int) -> bool:
    """Whether a router can choose each of the groups equally often: K is a multiple of G."""
    return sees_tokens(layer) and layer.router.k % groups == 0


def whole_copies(kernel: Array, groups: int) -> Array:
    """A router's kernel [.., E] with one column for the G experts of each copy.

    Those are G neighbours, as `upcycle.split` orders groups; the first E / G columns are kept.
    """
    return jnp.repeat(kernel[..., : kernel.shape[-1] // groups], groups, axis=-1)


def kernel_of(x_ND: np.ndarray, experts: int, groups: int, rng: np.random.Generator) -> np.ndarray:
    """A router's matrix [D, E] out of tokens: the centres of clusters, one for each copy.

    Without their mean, which gives all experts the same, and scaled so that these tokens' logits
    have a standard deviation of 1. groups: as in `whole_copies`.
    """
    centres_CD = spherical_kmeans(x_ND, experts // groups, rng).centres_ED
    centres_CD = centres_CD - centres_CD.mean(0)
    kernel_DC = centres_CD.T / max(np.std(x_ND @ centres_CD.T), 1e-12)
    return np.repeat(kernel_DC, groups, axis=-1).astype(np.float32)


def set_kernel(router: Any, kernel: Array) -> None:
    """Put [D, E] or, of each task, [J, D, E] in the place of a router's rows for tokens."""
    own = router.kernel.get_value()
    kernel = jnp.broadcast_to(kernel, (*own.shape[:-2], *kernel.shape[-2:])).astype(own.dtype)
    # Rows for the features of a task, behind those of the token, stay.
    rest = own[..., kernel.shape[-2] :, :]
    router.kernel.set_value(jnp.concatenate([kernel, rest], axis=-2))


def rescale(layer: Any, total: float) -> None:
    """Equal weights for all choices, and experts whose weighted sum is what one gave before.

    total: `weight_sum` of the layer.
    """
    kernel = layer.router.kernel
    kernel.set_value(kernel.get_value() * NEAR_ZERO)
    for variable in _variables(getattr(layer.experts, layer.experts.last)).values():
        variable.set_value(variable.get_value() / total)


def disturb(experts: Stack, deviation: float, count: int, key: Array) -> None:
    """Gaussian noise on the matrices of the last `count` of E experts.

    deviation: of the noise, in those of each matrix. Biases stay.
    """
    for path, variable in _variables(experts).items():
        stack = variable.get_value()
        if stack.ndim < 3:
            continue
        std_E11 = jnp.std(stack.astype(jnp.float32), axis=(-2, -1), keepdims=True)
        own = jax.random.fold_in(key, crc32(path.encode()))
        noise = deviation * std_E11 * jax.random.normal(own, stack.shape, jnp.float32)
        noisy_E = jnp.arange(stack.shape[0]) >= stack.shape[0] - count
        noise = jnp.where(noisy_E[:, None, None], noise, 0.0)
        variable.set_value((stack + noise).astype(stack.dtype))


def _variables(node: nnx.Module) -> dict[str, Any]:
    """The parameters of a module, by path."""
    found = {}
    for path, part in surgery.find(node, nnx.Module).items():
        own = {name: value for name, value in vars(part).items() if isinstance(value, nnx.Param)}
        found |= {f"{path}/{name}" if path else name: value for name, value in own.items()}
    return found


Note = Callable[[Array, Array], None]  # of tokens x_ND and the task of each, int32 [N]


class _ShownRouter:
    """A router that shows what it sees to `note` first."""

    def __init__(self, router: Router, note: Note):
        self.router, self.note = router, note
        self.decision, self.depends_on_task = router.decision, router.depends_on_task

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        self.note(x_ND, task_of_tokens(context, x_ND.shape[0]))
        return self.router(x_ND, context, key, mask_N)


class DensePass:
    """Makes layers whose experts begin as an MLP give what that gave, and keeps what entered them.

    For the model inside a traced function: `seen` has the tokens x_ND and their tasks [N] of each
    layer after the model was called. At most about `limit` of a layer's tokens are kept, evenly.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.seen: dict[str, tuple[Array, Array]] = {}

    def watch(self, layer: MoE, path: str, groups: int) -> None:
        """Change one layer."""

        def note(x_ND: Array, task_N: Array) -> None:
            step = max(1, x_ND.shape[0] // self.limit)
            self.seen[path] = x_ND[::step].astype(jnp.float32), task_N[::step]

        def as_mlp(layer: MoE, x_ND: Array, routing: Routing, context: Context) -> MoEOutput:
            # The first copy of each group: their mean is the MLP.
            first = jax.tree.map(lambda stack: stack[:groups], layer.experts.stacked())
            y_GND = jax.vmap(lambda params: layer.experts.fn(params, x_ND, dense))(first)
            task_N = task_of_tokens(context, x_ND.shape[0])
            nothing = jnp.zeros((), jnp.int32)
            return MoEOutput(y_GND.mean(0), Record(routing, task_N, nothing))

        layer.mixing = as_mlp
        surgery.replace(layer, "router", _ShownRouter(layer.router, note))
