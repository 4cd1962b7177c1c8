"""Peers for the benchmark: what PyTorch models run, from the same parameters.

`torch_loop` is the per-expert loop of Hugging Face's Mixtral: one linear layer per expert and
matrix, `where` to find an expert's tokens, `index_add` to bring the results back. `torch_grouped`
sorts the choices and multiplies them by PyTorch's grouped product, on an NVIDIA GPU in bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax import Array

from moezoo.errors import UserError
from moezoo.timing import TimedCall

TYPES = {"torch_loop": "float32", "torch_grouped": "bfloat16"}
PEERS = tuple(TYPES)


def check(name: str, dtype: str) -> None:
    """Raises UserError where PyTorch is not installed or the peer is not measured so."""
    if find_spec("torch") is None:
        raise UserError(f"The backend {name} needs PyTorch: pip install 'moezoo[parity]'.")
    if dtype != TYPES[name]:
        raise UserError(
            f"The backend {name} is measured in {TYPES[name]} only: --dtype is {dtype}."
        )
    if name == "torch_grouped" and not _torch().cuda.is_available():
        raise UserError("The backend torch_grouped needs an NVIDIA GPU that PyTorch can use.")


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


class Grouped:
    """The layer by grouped products, on the GPU; `leaves`: router, then both stacks."""

    def __init__(self, params: dict[str, Any], k: int):
        torch = _torch()

        def leaf(array: Any) -> Any:
            made = torch.tensor(np.asarray(array, np.float32)).to("cuda", torch.bfloat16)
            return made.requires_grad_()

        fc1, fc2 = params["experts"]["fc1"], params["experts"]["fc2"]
        self.k, self.experts = k, len(fc1["bias"])
        arrays = (params["router"]["kernel"], fc1["kernel"], fc1["bias"], fc2["kernel"])
        self.leaves = [leaf(array) for array in (*arrays, fc2["bias"])]
        functional = torch.nn.functional
        self.product = getattr(functional, "grouped_mm", None) or torch._grouped_mm

    def __call__(self, x_ND: Any) -> Any:
        torch, (router, w1, b1, w2, b2) = _torch(), self.leaves
        probs_NE = torch.softmax((x_ND @ router).float(), dim=-1)
        weights_NK, experts_NK = torch.topk(probs_NE, self.k, dim=-1)
        expert, order = torch.sort(experts_NK.reshape(-1), stable=True)
        end_E = torch.bincount(expert, minlength=self.experts).cumsum(0).to(torch.int32)
        token = order // self.k
        hidden = self.product(x_ND[token], w1, offs=end_E) + b1[expert]
        y = self.product(torch.nn.functional.gelu(hidden), w2, offs=end_E) + b2[expert]
        weighted = y * weights_NK.reshape(-1)[order, None].to(y.dtype)
        return torch.zeros_like(x_ND).index_add_(0, token, weighted)


def runs(
    params: dict[str, Any], k: int, x_ND: Array, dy_ND: Array, name: str
) -> dict[str, TimedCall]:
    """The layer alone, and with all its derivatives.

    "forward" gives y_ND, "forward+backward" also a list. Of torch_loop they are NumPy arrays: the
    derivatives of x, of the router [E, D], and of every expert's two matrices [out, in] and biases
    in turn (None: had no token). What torch_grouped gives stays on the GPU, and is there.
    """
    torch = _torch()
    if name == "torch_grouped":
        layer: Any = Grouped(params, k)
        x, dy = (
            torch.tensor(np.asarray(a, np.float32)).to("cuda", torch.bfloat16)
            for a in (x_ND, dy_ND)
        )
        return _calls(layer, x.requires_grad_(), dy, lambda a: a, torch.cuda.synchronize)
    affinity = getattr(os, "sched_getaffinity", None)
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    x, dy = torch.tensor(np.asarray(x_ND), requires_grad=True), torch.tensor(np.asarray(dy_ND))
    return _calls(Loop(params, k), x, dy, lambda a: a.numpy(), lambda: None)


def _calls(
    layer: Any, x: Any, dy: Any, given: Callable[[Any], Any], wait: Callable[[], None]
) -> dict[str, TimedCall]:
    torch = _torch()

    def forward() -> Any:
        with torch.no_grad():
            y = layer(x)
        wait()
        return given(y)

    def both() -> Any:
        y = layer(x)
        found = torch.autograd.grad(y, [x, *layer.leaves], dy, allow_unused=True)
        wait()
        return given(y.detach()), [None if g is None else given(g) for g in found]

    return {"forward": forward, "forward+backward": both}


def device_seconds(run: TimedCall, calls: int) -> list[float]:
    """Each call from its first to its last kernel by the GPU's own clock."""
    torch, found = _torch(), []
    run()
    for _ in range(calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(1e-3 * begin.elapsed_time(end))
    return found
