"""Adapter folders of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Plain LoRA is read and written so that PEFT and we understand each other. A bank that a router
gates has no form in PEFT: it is written stacked, one down and one up matrix per layer as for LoRA,
with the router's arrays beside them and a `peft_type` of its own, which PEFT refuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.nn.injection import Adapted
from moezoo.nn.layers import Linear
from moezoo.nn.lowrank import LowRank
from moezoo.schema_check import shortened
from moezoo.weights.files import written_whole
from moezoo.weights.names import GROUPED_DECODER, SPARSE_DECODER, place
from moezoo.weights.peft_config import NAME, PLAIN, REMOVED, STACKED, AdapterConfig
from moezoo.weights.tensor_file import Planned, TensorFile, write

CONFIG, ARRAYS = NAME, "adapter_model.safetensors"
PREFIX = "base_model.model."


class Factors(NamedTuple):
    """The update of one layer: scale * down up, down [D, r], up [r, O]; further arrays by name."""

    down: np.ndarray
    up: np.ndarray
    scale: float
    router: Mapping[str, np.ndarray]


class Adapter(NamedTuple):
    """An adapter folder: each layer's factors by path ("layers/0/attn/q"), and its options.

    `init`: how its base was changed before it was trained, see `peft_config.REMOVED`.
    """

    layers: dict[str, Factors]
    config: Mapping[str, Any]
    init: str


def read(folder: Path | str, root: nnx.Module) -> Adapter:
    """The adapter in a folder, for the decoder `root`.

    Raises UserError where a file is missing or damaged, the adapter is of a kind that is more than
    plain LoRA, where it belongs to another base model, and where `root` has updates already.
    """
    folder = Path(folder)
    config = AdapterConfig(folder)
    file = _file(folder)
    layers, found = {}, set()
    if surgery.find(root, Adapted):
        raise UserError("The model has updates already: read the adapter for the bare decoder.")
    for path, layer in surgery.find(root, Linear).items():
        name = _module_name(path)
        parts = {part: f"{PREFIX}{name}.{part}" for part in ("lora_A.weight", "lora_B.weight")}
        if not all(part in file.entries for part in parts.values()):
            continue
        down, up = (_read(file, part).T for part in parts.values())
        _check_shapes(folder, path, layer, down, up)
        own = {n: n.removeprefix(f"{PREFIX}{name}.router.") for n in file.entries}
        router = {short: _read(file, n) for n, short in own.items() if short != n}
        found |= {*parts.values(), *(n for n, short in own.items() if short != n)}
        layers[path] = Factors(down, up, config.scale(name, down.shape[1]), router)
    left = sorted(set(file.entries) - found)
    if left or not layers:
        what = shortened(left[0], 200) if left else "no adapter of any of its layers"
        raise UserError(
            f"{file.path} holds {what}, for which this model has no layer: it was made for another "
            f"base ({config.values.get('base_model_name_or_path') or 'not named'})."
        )
    return Adapter(layers, config.values, config.init)


def _file(folder: Path) -> TensorFile:
    pickled = folder / "adapter_model.bin"
    if pickled.is_file() and not (folder / ARRAYS).exists():
        raise UserError(
            f"{folder} holds its adapter as {pickled.name}, a pickle of PyTorch, which can run any "
            f"program, and not as {ARRAYS}: load it with PEFT and call save_pretrained."
        )
    return TensorFile(folder / ARRAYS)


def attach(root: nnx.Module, adapter: Adapter) -> None:
    """Put a plain adapter on the layers of `root`, in place.

    What was taken off the base of such an adapter (PiSSA, OLoRA) is taken off here.
    Raises UserError where it is in stacked form: the model's configuration builds those.
    """
    if adapter.config.get("peft_type") != PLAIN:
        raise UserError("This adapter has routers: build the model from its own configuration.")
    for path, factors in adapter.layers.items():
        inputs, ranks = factors.down.shape
        outputs = factors.up.shape[1]
        update = LowRank(inputs, outputs, ranks, scale=factors.scale, rngs=nnx.Rngs(0))
        update.down.set_value(jnp.asarray(factors.down))
        update.up.set_value(jnp.asarray(factors.up))
        base = surgery.get(root, path)
        _change_base(base, REMOVED[adapter.init], ranks, factors.scale)
        surgery.replace(root, path, Adapted(base, update))


def _change_base(base: Any, remove: Any, ranks: int, scale: float) -> None:
    kernel = base.kernel.get_value()
    wide_OD = np.asarray(kernel, np.float32).T
    removed_OD = remove(wide_OD, ranks, scale)
    if removed_OD is not None:
        base.kernel.set_value(jnp.asarray((wide_OD - removed_OD).T, kernel.dtype))


def save(folder: Path | str, root: nnx.Module, base: str | None = None) -> None:
    """Write the updates of a decoder's layers; `base` names the base model.

    Plain LoRA as PEFT reads it; with routers, the stacked form. The folder appears whole, or not
    at all. Raises UserError where it exists, there is no update, or the disk does not take it.
    """
    folder = Path(folder)
    layers = surgery.find(root, Adapted)
    if not layers:
        raise UserError("The model has no adapted layer, so there is no adapter to write.")
    arrays = {}
    for path, layer in layers.items():
        name = f"{PREFIX}{_module_name(path)}"
        arrays |= {f"{name}.{k}": _planned(v) for k, v in _arrays(layer.update).items()}
    text = json.dumps(_config(layers, base), indent=2) + "\n"
    with written_whole(folder) as temporary:
        write(temporary / ARRAYS, arrays)
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def _module_name(path: str) -> str:
    """Their name of a linear layer, of whatever family: no path has two."""
    names = (*SPARSE_DECODER, *GROUPED_DECODER)
    return place(f"{path}/kernel", names).theirs.removesuffix(".weight")


def _arrays(update: LowRank) -> dict[str, np.ndarray]:
    found = {
        "lora_A.weight": np.asarray(update.down.get_value()).T,
        "lora_B.weight": np.asarray(update.up.get_value()).T,
    }
    for name in ("kernel", "bias"):
        value = getattr(update.router, name, None)
        if value is not None:
            found[f"router.{name}"] = np.asarray(value.get_value())
    return found


def _planned(array: np.ndarray) -> Planned:
    return Planned(array.shape, array.dtype, lambda: array)


def _config(layers: Mapping[str, Adapted], base: str | None) -> dict[str, Any]:
    ranks = {p: layer.update.down.get_value().shape[1] for p, layer in layers.items()}
    alphas = {p: layer.update.scale * ranks[p] for p, layer in layers.items()}
    names = {path: _module_name(path) for path in layers}
    first = next(iter(layers))
    routed = {p: layer.update for p, layer in layers.items() if layer.router is not None}
    config: dict[str, Any] = {
        "peft_type": STACKED if routed else PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(names.values()),
        "rank_pattern": {names[p]: n for p, n in ranks.items() if n != ranks[first]},
        "alpha_pattern": {names[p]: a for p, a in alphas.items() if a != alphas[first]},
    }
    if routed:
        config["experts"] = {names[p]: u.experts for p, u in routed.items()}
        config["chosen"] = {names[p]: getattr(u.router, "k", None) for p, u in routed.items()}
    return config


def _read(file: TensorFile, name: str) -> np.ndarray:
    array = file.read(name, lambda a: np.array(a, np.float32))
    if not np.isfinite(array).all():
        raise UserError(
            f"{shortened(name, 200)} in {file.path} has values that are not finite; write it again."
        )
    return array


def _check_shapes(folder: Path, path: str, layer: Any, down: Any, up: Any) -> None:
    kernel = layer.kernel.get_value().shape
    if down.ndim != 2 or up.ndim != 2 or down.shape[1] != up.shape[0] or not up.shape[0]:
        raise UserError(f"{folder / ARRAYS} has factors of {path} that do not fit each other.")
    if (down.shape[0], up.shape[1]) != tuple(kernel):
        raise UserError(
            f"{folder / ARRAYS} has an update {down.shape[0]} x {up.shape[1]} for {path}, which is "
            f"{kernel[0]} x {kernel[1]}: the adapter was made for another base."
        )
