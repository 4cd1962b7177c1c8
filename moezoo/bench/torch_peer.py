"""A peer for the benchmark: the per-expert loop that PyTorch models run, from the same parameters.

One linear layer per expert and matrix, `where` to find an expert's tokens, `index_add` to bring
the results back: as in Hugging Face's Mixtral, with this zoo's router and experts.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax import Array

from moezoo.errors import UserError
from moezoo.timing import TimedCall

NAME = "torch_loop"


def check(dtype: str) -> None:
    """Raises UserError where PyTorch is not installed or the type is not float32."""
    if find_spec("torch") is None:
        raise UserError(f"The backend {NAME} needs PyTorch: pip install 'moezoo[parity]'.")
    if dtype != "float32":
        raise UserError(f"The backend {NAME} is measured in float32 only: --dtype is {dtype}.")


def _torch() -> Any:
    """The package; imported only where it is used."""
    return import_module("torch")


class Loop:
    """The layer; `leaves` are its parameters: the router, then each expert's four."""

    def __init__(self, params: dict[str, Any], k: int):
        torch = _torch()

        def leaf(array: Any) -> Any:
            return torch.tensor(np.ascontiguousarray(array), requires_grad=True)

        host = jax.tree.map(np.asarray, params)
        fc1, fc2 = host["experts"]["fc1"], host["experts"]["fc2"]
        self.k, self.router = k, leaf(host["router"]["kernel"].T)
        self.experts = [
            (leaf(fc1["kernel"][e].T), leaf(fc1["bias"][e]))
            + (leaf(fc2["kernel"][e].T), leaf(fc2["bias"][e]))
            for e in range(len(fc1["bias"]))
        ]
        self.leaves = [self.router, *(leaf for own in self.experts for leaf in own)]

    def __call__(self, x_ND: Any) -> Any:
        torch = _torch()
        linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
        probs_NE = torch.softmax(linear(x_ND, self.router), dim=-1)
        weights_NK, experts_NK = torch.topk(probs_NE, self.k, dim=-1)
        y_ND = torch.zeros_like(x_ND)
        for e, (w1, b1, w2, b2) in enumerate(self.experts):
            token, rank = torch.where(experts_NK == e)
            out = linear(gelu(linear(x_ND[token], w1, b1)), w2, b2)
            y_ND.index_add_(0, token, out * weights_NK[token, rank, None])
        return y_ND


def runs(params: dict[str, Any], k: int, x_ND: Array, dy_ND: Array) -> dict[str, TimedCall]:
    """The layer alone, and with all its derivatives; results are NumPy arrays.

    "forward" gives y_ND, "forward+backward" also a list: the derivatives of x, of the router
    [E, D], and of every expert's two matrices [out, in] and biases in turn (None: had no token).
    """
    torch = _torch()
    affinity = getattr(os, "sched_getaffinity", None)
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    layer = Loop(params, k)
    x, dy = torch.tensor(np.asarray(x_ND), requires_grad=True), torch.tensor(np.asarray(dy_ND))

    def forward() -> Any:
        with torch.no_grad():
            return layer(x).numpy()

    def both() -> Any:
        y = layer(x)
        found = torch.autograd.grad(y, [x, *layer.leaves], dy, allow_unused=True)
        return y.detach().numpy(), [None if g is None else g.numpy() for g in found]

    return {"forward": forward, "forward+backward": both}
