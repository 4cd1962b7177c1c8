"""Pretrained vision transformers: the same function as the file's, on this project's trunks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from scipy.special import erf

from moezoo.backbones.vit import ViT, ViTConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.upcycle import carry_over
from moezoo.weights import vit
from moezoo.weights.augreg_names import from_augreg, to_augreg
from moezoo.weights.names import VIT, to_theirs
from tests.models.tiny import filled, image, quick_jit

CONFIG = ViTConfig(width=12, depth=3, heads=3, patch=4, mlp_ratio=2.0)
SIZE = (16, 16)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> module.ModuleParts:
    return filled(lambda: ViT(CONFIG, SIZE, classes=5, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def flat(model: module.ModuleParts) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in module.flatten(model.params).items()}


def augreg(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays, unknown = to_augreg(flat, CONFIG.heads)
    assert not unknown
    return arrays


def timm(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays, unknown = to_theirs(flat, VIT)
    assert not unknown
    return arrays


def big_vision(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that the same project writes today."""
    newer = {
        "LayerNorm_2": "LayerNorm_1",
        "MlpBlock_3": "MlpBlock_0",
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "Transformer/posembed_input/": "",
    }
    arrays = augreg(flat)
    for old, new in newer.items():
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    return {f"params/{name}": array for name, array in arrays.items()}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
    return path


KINDS = {
    "augreg": (augreg, "vit.npz"),
    "timm": (timm, "vit.safetensors"),
    "big_vision": (big_vision, "vit.npz"),
}


def target(
    flat: dict[str, Any], grid: tuple[int, int] = (4, 4), heads: int = 3, told: int | None = 3
) -> vit.Target:
    return vit.Target({path: a.shape for path, a in flat.items()}, grid, heads, told)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_known_model_comes_back(kind: str, model, flat, tmp_path: Path) -> None:
    """Written by the inverse names from one model, read into a fresh one, which answers alike."""
    names, file = KINDS[kind]
    path = write(tmp_path / file, names(flat))
    fresh = filled(lambda: ViT(CONFIG, SIZE, classes=5, rngs=nnx.Rngs(0)), seed=1)
    found = vit.trunk(path, target(flat))
    carried = carry_over(found, fresh.params)
    assert set(carried.fresh) == {"head/kernel", "head/bias"} and not carried.unused
    begun = module.flatten(carried.params)
    for name, array in found.items():
        np.testing.assert_array_equal(begun[name], flat[name], err_msg=name)
        np.testing.assert_array_equal(array, flat[name], err_msg=name)
    heads = {"head/kernel": flat["head/kernel"], "head/bias": flat["head/bias"]}
    run = quick_jit(lambda p, x: module.merge(model.definition, p, model.stats)(x).logits)
    old, new = (
        run(params, image(SIZE, 2))
        for params in (model.params, module.unflatten({**begun, **heads}))
    )
    np.testing.assert_array_equal(old, new)


def normed(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * scale + bias


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(w: dict[str, np.ndarray], x_BHWC: np.ndarray, depth: int) -> np.ndarray:
    """Tokens behind the final norm, straight from the arrays of an augreg file, in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    p = w["embedding/kernel"].shape[0]
    tokens = [
        np.einsum("bijc,ijcd->bd", x_BHWC[:, y : y + p, x : x + p], w["embedding/kernel"])
        for y in range(0, x_BHWC.shape[1], p)
        for x in range(0, x_BHWC.shape[2], p)
    ]
    x = np.stack(tokens, 1) + w["embedding/bias"]
    x = np.concatenate([np.repeat(w["cls"], len(x), 0), x], 1)
    x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        y = normed(x, w[f"{block}/LayerNorm_0/scale"], w[f"{block}/LayerNorm_0/bias"])
        q, k, v = (
            np.einsum("btd,dhe->bhte", y, w[f"{attention}/{n}/kernel"])
            + w[f"{attention}/{n}/bias"][:, None]
            for n in ("query", "key", "value")
        )
        mixed = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])) @ v
        x = x + np.einsum("bhte,hed->btd", mixed, w[f"{attention}/out/kernel"])
        x = x + w[f"{attention}/out/bias"]
        y = normed(x, w[f"{block}/LayerNorm_2/scale"], w[f"{block}/LayerNorm_2/bias"])
        y = y @ w[f"{block}/MlpBlock_3/Dense_0/kernel"] + w[f"{block}/MlpBlock_3/Dense_0/bias"]
        y = 0.5 * y * (1 + erf(y / math.sqrt(2)))
        x = x + y @ w[f"{block}/MlpBlock_3/Dense_1/kernel"] + w[f"{block}/MlpBlock_3/Dense_1/bias"]
    return normed(x, w["Transformer/encoder_norm/scale"], w["Transformer/encoder_norm/bias"])


def made_by_hand(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random file in augreg's own names and shapes, made without this project's tables."""
    d, h, f, p = CONFIG.width, CONFIG.heads, CONFIG.mlp_hidden, CONFIG.patch
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, d),
        "embedding/kernel": (p, p, 3, d),
        "embedding/bias": (d,),
        "head/kernel": (d, 7),
        "head/bias": (7,),
        "Transformer/posembed_input/pos_embedding": (1, 17, d),
        "Transformer/encoder_norm/scale": (d,),
        "Transformer/encoder_norm/bias": (d,),
    }
    for i in range(CONFIG.depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (d,), f"{block}/{norm}/bias": (d,)}
        for n in ("query", "key", "value"):
            shapes |= {f"{attention}/{n}/kernel": (d, h, d // h)}
            shapes |= {f"{attention}/{n}/bias": (h, d // h)}
        shapes |= {f"{attention}/out/kernel": (h, d // h, d), f"{attention}/out/bias": (d,)}
        for n, (a, b) in (("Dense_0", (d, f)), ("Dense_1", (f, d))):
            shapes |= {f"{block}/MlpBlock_3/{n}/kernel": (a, b)}
            shapes |= {f"{block}/MlpBlock_3/{n}/bias": (b,)}
    return {n: rng.normal(0, 0.4, shape).astype(np.float32) for n, shape in shapes.items()}


def test_the_function_of_the_file(model, flat, tmp_path: Path) -> None:
    arrays = made_by_hand(np.random.default_rng(4))
    path = write(tmp_path / "vit.npz", arrays)
    params = module.unflatten({**flat, **vit.trunk(path, target(flat))})

    def tokens(params: Any, x: Any) -> Any:
        trunk = module.merge(model.definition, params, model.stats)
        y_BTD = trunk.embed(x)
        for block in trunk.blocks:
            y_BTD = block(y_BTD).x_BTD
        return trunk.norm(y_BTD)

    x = image(SIZE, 2)
    wanted = by_hand(arrays, np.asarray(x, np.float64), CONFIG.depth)
    np.testing.assert_allclose(quick_jit(tokens)(params, x), wanted, **CLOSE)


def keys_cubic(line: np.ndarray, size: int) -> np.ndarray:
    """Cubic convolution (A = -0.75) of a line of numbers, tap by tap."""
    a, n, result = -0.75, len(line), []
    for k in range(size):
        at, total = (k + 0.5) * n / size - 0.5, 0.0
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            t = abs(at - tap)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            total += (near if t <= 1 else far) * line[min(max(tap, 0), n - 1)]
        result.append(total)
    return np.array(result)


@pytest.mark.parametrize(("kind", "special"), [("augreg", 1), ("timm", 1), ("timm", 2)])
def test_positions_of_another_grid(kind: str, special: int, flat, tmp_path: Path) -> None:
    names, file = KINDS[kind]
    token, grid = flat["pos_embed"][:, :1], flat["pos_embed"][:, 1:].reshape(4, 4, -1)
    more = np.concatenate([token, np.ones_like(token)][:special], 1)
    held = {**flat, "pos_embed": np.concatenate([more, flat["pos_embed"][:, 1:]], 1)}
    stored = names(held) | ({"dist_token": np.ones((1, 1, 12), "f")} if special == 2 else {})
    path = write(tmp_path / file, stored)
    rows, columns = 6, 7
    shapes = {**flat, "pos_embed": np.zeros((1, 1 + rows * columns, CONFIG.width))}
    wanted_of = target(shapes, (rows, columns))
    if special == 2:
        with pytest.raises(UserError, match="the model has no place for its dist_token"):
            vit.trunk(path, wanted_of)
    without = ("dist_token",) if special == 2 else ()
    found = vit.trunk(path, wanted_of, without)["pos_embed"]
    tall = np.apply_along_axis(keys_cubic, 0, grid.astype(np.float64), rows)
    wanted = np.apply_along_axis(keys_cubic, 1, tall, columns).reshape(1, rows * columns, -1)
    np.testing.assert_allclose(found[:, 1:], wanted, **CLOSE)
    np.testing.assert_array_equal(found[:, :1], token)


def test_a_model_without_a_class_token_and_with_other_blocks(flat, tmp_path: Path) -> None:
    """What the model lacks is left over; experts have no counterpart that the file must hold."""
    path = write(tmp_path / "vit.npz", augreg(flat))
    wanted = {p: a for p, a in flat.items() if p != "cls_token" and "blocks/1/mlp" not in p}
    wanted |= {"pos_embed": flat["pos_embed"][:, 1:]}
    mlp = {p: a for p, a in flat.items() if "blocks/1/mlp" in p}
    wanted |= {p.replace("mlp/", "mlp/experts/"): np.stack([a] * 2) for p, a in mlp.items()}
    found = vit.trunk(path, target(wanted))
    carried = carry_over(
        found, module.unflatten({p: jnp.zeros(a.shape) for p, a in wanted.items()})
    )
    begun = module.flatten(carried.params)
    np.testing.assert_array_equal(begun["pos_embed"], flat["pos_embed"][:, 1:])
    copies = begun["blocks/1/mlp/experts/fc1/kernel"]
    np.testing.assert_array_equal(copies, np.stack([flat["blocks/1/mlp/fc1/kernel"]] * 2))
    assert "cls_token" in carried.unused


def test_names_go_both_ways(flat) -> None:
    back, unknown = from_augreg(augreg(flat))
    assert not unknown and back.keys() == flat.keys()
    for path, array in back.items():
        np.testing.assert_array_equal(array, flat[path])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("embedding/kernel"), "holds no vision transformer that is known here"),
        (lambda a: a.pop("cls"), "lacks cls_token, which the model begins with"),
        (
            lambda a: a.pop("Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"),
            "lacks blocks/1/attn/qkv/bias",
        ),
        (
            lambda a: a.update({"Transformer/encoder_norm/scale": np.ones(16)}),
            r"its norm/scale is \[16\], the model's \[12\]",
        ),
        (
            lambda a: a.update({"Transformer/posembed_input/pos_embedding": np.ones((1, 14, 12))}),
            "positions of 14 tokens, which are no square grid",
        ),
        (
            lambda a: [a.pop(n) for n in list(a) if "encoderblock_2" in n],
            "it has 2 blocks, the model 3",
        ),
    ],
)
def test_files_of_other_models(change, words: str, flat, tmp_path: Path) -> None:
    arrays = augreg(flat)
    change(arrays)
    path = write(tmp_path / "vit.npz", arrays)
    with pytest.raises(UserError, match=words):
        vit.trunk(path, target(flat))


def test_other_numbers_of_heads(flat, tmp_path: Path) -> None:
    path = write(tmp_path / "vit.npz", augreg(flat))
    with pytest.raises(UserError, match="has 3 attention heads, the model 4"):
        vit.trunk(path, target(flat, heads=4, told=None))
