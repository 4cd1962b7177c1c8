"""Adapter folders of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Plain LoRA is read and written so that PEFT and we understand each other. A bank whose blocks a
router chooses for every token has no form in PEFT: it is written stacked, one down and one up
matrix per layer as for LoRA, with the router's matrix (and bias) beside them and a `peft_type` of
its own, which PEFT refuses. Nothing else of a router has a place: one of tasks, clusters or tables
is refused, because its decision would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted
from moezoo.nn.layers import Linear
from moezoo.nn.lowrank import LowRank
from moezoo.schema_check import shortened
from moezoo.weights.files import written_whole
from moezoo.weights.names import GROUPED_DECODER, SPARSE_DECODER, place
from moezoo.weights.peft_config import ADVICE, NAME, PLAIN, REMOVED, STACKED, AdapterConfig
from moezoo.weights.tensor_file import Planned, TensorFile, write

CONFIG, ARRAYS = NAME, "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = ("lora_A.weight", "lora_B.weight")
ROUTER = ("kernel", "bias")  # [D, E], [E]
MORE = {  # what PEFT's arrays are called that are more than plain LoRA
    "lora_magnitude_vector": "an array of DoRA",
    "lora_embedding_A": "an update of an embedding",
    "lora_embedding_B": "an update of an embedding",
    "bias": "a bias",
}


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
        parts = [f"{PREFIX}{name}.{part}" for part in FACTORS]
        if not all(part in file.entries for part in parts):
            continue
        down, up = (_read(file, part).T for part in parts)
        _check_shapes(folder, path, layer, down, up)
        own = {short: f"{PREFIX}{name}.router.{short}" for short in ROUTER}
        router = {short: _read(file, n) for short, n in own.items() if n in file.entries}
        _check_router(file, config, path, down, router)
        found |= {*parts, *(own[short] for short in router)}
        layers[path] = Factors(down, up, config.scale(name, down.shape[1]), router)
    left = sorted(set(file.entries) - found)
    if left or not layers:
        raise UserError(f"{file.path} holds {_unread(left, file, config)}.")
    return Adapter(layers, config.values, config.init)


def _unread(left: Sequence[str], file: TensorFile, config: AdapterConfig) -> str:
    """What a file holds that is no update of the model's layers, in words, and what to do."""
    base = config.values.get("base_model_name_or_path") or "not named"
    if not left:
        return f"no adapter of any of this model's layers: it was made for another base ({base})"
    first, again = shortened(left[0], 200), "write it again"
    for i, part in enumerate(FACTORS):
        other = FACTORS[1 - i]
        if left[0].endswith(f".{part}") and left[0].replace(part, other) not in file.entries:
            return f"{first} without its {other}: it is not whole; {again}"
    if ".router." in left[0] and left[0].rpartition(".")[2] not in ROUTER:
        return f"{first}, and of routers {' and '.join(ROUTER)} alone can be read; {again}"
    for part, what in MORE.items():
        if part in left[0].split("."):
            return f"{first}, {what}, which is more than plain LoRA; {ADVICE}"
    return f"{first}, for which this model has no layer: it was made for another base ({base})"


def _check_router(
    file: TensorFile,
    config: AdapterConfig,
    path: str,
    down: np.ndarray,
    router: Mapping[str, np.ndarray],
) -> None:
    """UserError for a router in a folder of plain LoRA, and for one that does not fit its layer."""
    if not router:
        return
    if config.values.get("peft_type") != STACKED:
        raise UserError(
            f"{file.path} holds a router of {path}, but {CONFIG} says {PLAIN}, which has none: "
            "take both files from the same adapter."
        )
    inputs, ranks = down.shape
    *first, experts = router["kernel"].shape if "kernel" in router else (0,)
    bias = router.get("bias", np.zeros(experts)).shape
    if first != [inputs] or experts < 1 or ranks % experts or bias != (experts,):
        raise UserError(f"{file.path} has a router of {path} that does not fit its factors.")


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


def save(
    folder: Path | str,
    root: nnx.Module,
    base: str | None = None,
    system: Mapping[str, Any] | None = None,
) -> None:
    """Write the updates of a decoder's layers; `base` names the base model.

    Plain LoRA as PEFT reads it; with routers, the stacked form. system: the options of the model,
    which say how its routers choose and weigh; for the stacked form. The folder appears whole, or
    not at all. Raises UserError where it exists, there is no update, a router has no form in it, or
    the disk does not take it.
    """
    folder = Path(folder)
    layers = surgery.find(root, Adapted)
    if not layers:
        raise UserError("The model has no adapted layer, so there is no adapter to write.")
    arrays = {}
    for path, layer in layers.items():
        name = f"{PREFIX}{_module_name(path)}"
        _check_held(path, layer.update)
        arrays |= {f"{name}.{k}": _planned(v) for k, v in _arrays(layer.update).items()}
    config = _config(layers, base)
    if system is not None and config["peft_type"] == STACKED:
        config["system"] = system
    text = json.dumps(config, indent=2) + "\n"
    with written_whole(folder) as temporary:
        write(temporary / ARRAYS, arrays)
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def _check_held(path: str, update: LowRank) -> None:
    """UserError for a router of which the stacked form would lose something."""
    if update.router is None:
        return
    router: Any = update.router
    parts = module.split(router)
    lost = {*module.flatten(parts.params), *module.flatten(parts.stats)} - set(ROUTER)
    if update.token_choice is None or lost:
        raise UserError(
            f"The update of {path} has a {type(update.router).__name__}, which an adapter's folder "
            "has no form for: write a whole decoder (moezoo adapter RUN --merge --out FOLDER, with "
            "--task TASK where tasks decide)."
        )


def _module_name(path: str) -> str:
    """Their name of a linear layer, of whatever family: no path has two."""
    names = (*SPARSE_DECODER, *GROUPED_DECODER)
    return place(f"{path}/kernel", names).theirs.removesuffix(".weight")


def _arrays(update: LowRank) -> dict[str, np.ndarray]:
    found = {
        "lora_A.weight": np.asarray(update.down.get_value()).T,
        "lora_B.weight": np.asarray(update.up.get_value()).T,
    }
    for name in ROUTER:
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
