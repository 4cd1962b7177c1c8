"""Programs as ONNX graphs: ONNX Runtime gives what JAX gives, at any batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from moezoo.deploy import onnx_graph, onnx_operations
from moezoo.errors import UserError
from moezoo.nn.layers import gelu

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

W = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
K = np.random.default_rng(1).normal(size=(3, 3, 2, 4)).astype(np.float32)


def ran(call: Callable[..., Any], x: np.ndarray, **weights: np.ndarray) -> list[np.ndarray]:
    """What ONNX Runtime gives for a program that was converted for any batch."""
    _, runtime = onnx_graph.libraries()
    (b,) = export.symbolic_shape("b")
    given = jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)
    made = onnx_operations.convert(lambda w, x: {"y": call(w, x)}, weights, given, "x")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(made.SerializeToString(), options)
    return [session.run(None, {"x": rows})[0] for rows in (x, x[:1], np.tile(x, (3, 1, 1)))]


def conv(x: Any, **options: Any) -> Any:
    maps = x.reshape(-1, 3, 2, 2)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        maps, jnp.asarray(K), padding="SAME", dimension_numbers=numbers, **options
    )


def chosen(x: Any) -> Any:
    """The way of a router: softmax, two largest, their weights spread over all."""
    p = jax.nn.softmax(x @ W)
    values, places = lax.top_k(p, 2)
    return jnp.sum(jax.nn.one_hot(places, 5) * values[..., None], axis=-2)


def counted(x: Any) -> Any:
    """A loop with state, rows in and out, and places that it counts, one of them too far."""

    def step(state: Any, row: Any) -> Any:
        place, sums = state
        part = lax.dynamic_slice_in_dim(x, place, 2, axis=1).sum(axis=1, keepdims=True)
        sums = lax.dynamic_update_slice_in_dim(sums, part * row, place, axis=1)
        return (place + 1, sums), sums[:, 0]

    first = jnp.int32(0), jnp.zeros_like(x) + x.shape[0]
    (_, sums), rows = lax.scan(step, first, jnp.arange(3, dtype=jnp.float32), reverse=True)
    return jnp.concatenate([sums, jnp.moveaxis(rows, 0, 1)], axis=1)


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "a loop": counted,
    "a product": lambda x: x @ W,
    "a product of batches": lambda x: jnp.einsum("bij,bkj->bik", x, x),
    "a product over two axes": lambda x: jnp.einsum("bij,bij->b", x, x),
    "a product over the batch": lambda x: jnp.einsum("bij,bkl->ik", x, x),
    "a product with a middle axis": lambda x: jnp.einsum("bij,ik->bkj", x, W[:3]),
    "all tokens": lambda x: (x.reshape(-1, 4) @ W).reshape(*x.shape[:2], 5),
    "activations": lambda x: gelu(x) + jax.nn.sigmoid(x) + jax.nn.log_sigmoid(x) + jnp.tanh(x),
    "powers": lambda x: x**3 + jnp.abs(x) ** 0.5 + lax.rsqrt(1 + x * x) + jnp.sign(x),
    "norms": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1),
    "reductions": lambda x: jnp.stack([x.max(-1), x.min(-1), x.sum(-1), x.prod(-1)], axis=1),
    "comparisons": lambda x: jnp.where((x > 0) & (x <= 1) | (x != x), x, -1.0),
    "any and all": lambda x: jnp.stack([(x > 0).any(-1), (x > -9).all(-1), ~(x > 0).any(-1)]),
    "running sums": lambda x: jnp.cumsum(x, axis=1) + lax.cumsum(x, axis=2, reverse=True),
    "choices": chosen,
    "the first largest": lambda x: jnp.argmax(jnp.round(x), axis=-1),
    "parts": lambda x: jnp.concatenate([x[:, 1:], x[:, ::2]], axis=1)[..., 1],
    "slices": lambda x: sum(jnp.unstack(x, axis=1)),
    "a split": lambda x: sum(jnp.split(x, 2, axis=-1)),
    "padding": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1)), constant_values=0.5),
    "cropping": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 0, 0), (0, -1, 0))),
    "rows of a table": lambda x: jnp.take(jnp.asarray(W), jnp.argmax(x, -1), axis=0),
    "a repeated table": lambda x: jnp.tile(jnp.asarray(W[:3]), (1, 2)) + x[:, :, :1],
    "counting": lambda x: x + jnp.arange(3)[:, None] + jnp.arange(x.shape[0])[:, None, None],
    "an axis first": lambda x: jnp.broadcast_to(x.sum((1, 2))[:, None], (x.shape[0], 7)) + 1,
    "a convolution": lambda x: conv(x, window_strides=(1, 1)),
    "a convolution with steps": lambda x: conv(x, window_strides=(2, 1), rhs_dilation=(1, 2)),
    "a branch": lambda x: lax.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, x),
    "a checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(x) + 1)(x),
    "a limit": lambda x: jnp.clip(x, -0.5, 0.5) + lax.stop_gradient(x),
    "a constant": lambda x: jnp.ones((2, 3)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_operations(name: str) -> None:
    x = np.random.default_rng(2).normal(size=(2, 3, 4)).astype(np.float32)
    call = PROGRAMS[name]
    for found, rows in zip(
        ran(lambda w, x: call(x), x), (x, x[:1], np.tile(x, (3, 1, 1))), strict=True
    ):
        wanted = np.asarray(call(jnp.asarray(rows)))
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_weights_keep_their_names() -> None:
    (b,) = export.symbolic_shape("b")
    given = jax.ShapeDtypeStruct((b, 4), jnp.float32)
    weights = {"b/kernel": W, "a/kernel": 2 * W}
    made = onnx_operations.convert(
        lambda w, x: {"y": x @ w["a/kernel"] - x @ w["b/kernel"]}, weights, given, "image"
    )
    held = {one.name for one in made.graph.initializer}
    assert set(weights) <= held
    assert [one.name for one in made.graph.input] == ["image"]
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: jnp.sort(x), "the operation 'sort', which has no form in ONNX here"),
        (lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), "operation 'while'"),
        (lambda x: lax.fori_loop(0, 999, lambda i, x: x + 1, x), "a loop of 999 steps"),
        (
            lambda x: lax.dynamic_update_slice(jnp.ones((4, 4)), W[:2, :2], (1, 1)) * x.sum(),
            "several axes",
        ),
        (lambda x: x.astype(jnp.bfloat16) * 2, "computes in bfloat16"),
        (lambda x: (x > 0).astype(jnp.int32) & 3, "operations on bits"),
        (lambda x: jnp.cumprod(x, axis=0), "the operation 'cumprod'"),
    ],
)
def test_what_has_no_form_is_refused(call: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ran(lambda w, x: call(x), np.zeros((2, 3, 4), np.float32))


def test_sizes() -> None:
    assert onnx_graph.linear("b") == (1, 0)
    assert onnx_graph.linear("65*b") == (65, 0)
    assert onnx_graph.linear("2*b + 3") == (2, 3)
    assert onnx_graph.linear("b - 1") == (1, -1)
    for odd in ("b*c", "floordiv(b, 2)", "b^2"):
        with pytest.raises(UserError, match="no form in ONNX"):
            onnx_graph.linear(odd)
