"""A peer for the benchmark: the layer with the grouped product of the package tokamax.

`tokamax.ragged_dot` chooses among kernels of its own, untuned, in the place of `jax.lax.ragged_dot`
in the dispatch `ragged`: sort, gathers and sums are ours, products and their derivatives its.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from moezoo.errors import UserError
from moezoo.ops.expert import Backend
from moezoo.ops.grouped import by_ragged_dot

NAME = "tokamax"


def installed() -> bool:
    """Whether the package is."""
    return find_spec(NAME) is not None


def check() -> None:
    """Raises UserError where it is not installed."""
    if not installed():
        raise UserError(
            f"The backend {NAME} needs the package of that name, which is for Python 3.12 and JAX "
            "0.11.1 or newer: pip install 'moezoo[tokamax]'."
        )


def backend() -> Backend:
    """The layer's backend."""
    package: Any = import_module(NAME)
    return partial(by_ragged_dot, package.ragged_dot)
