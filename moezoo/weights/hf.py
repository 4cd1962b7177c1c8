"""Decoders in the folders of Hugging Face models: `config.json` and safetensors, read and written.

An array goes from its file into its sharding, one array at a time and only the parts that this
process's devices hold, so that a checkpoint is never twice in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.names import DECODER, Layout, Place, place
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights.folders import check_new, written_whole
from moezoo.weights.hf_config import read_config, read_json, to_hf
from moezoo.weights.tensor_file import Planned, TensorFile, copied, write

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
Where = Callable[[str], Sharding]  # the path of a parameter -> where it goes


class Pretrained(NamedTuple):
    """A model as it was published: `module.merge(*parts)` gives the module."""

    config: DecoderConfig
    parts: module.Parts


def load(folder: Path | str, where: Where | None = None, **changes: Any) -> Pretrained:
    """The model in a folder of Hugging Face's format.

    where: the sharding of a parameter by its path, such as "layers/3/attn/q/kernel"; everything
    on the first device where it is not given. changes: fields of `DecoderConfig`; parameters are
    cast to `param_dtype`, which is float32 unless given, as is `dtype`, that of the computation.
    Raises UserError where a file or an array is missing or damaged, has another shape, or is one
    that this architecture has not.
    """
    config = read_config(folder, **changes)
    parts = module.abstract(lambda: config.build(nnx.Rngs(0)))
    here = SingleDeviceSharding(jax.local_devices()[0])
    loaded = load_into(folder, module.flatten(parts.params), where or (lambda path: here))
    return Pretrained(config, module.Parts(parts.definition, module.unflatten(loaded), parts.stats))


def load_into(folder: Path | str, wanted: Mapping[str, Any], where: Where) -> dict[str, jax.Array]:
    """The arrays of a folder in the shapes and types of `wanted`, by path, each at its place.

    wanted: ShapeDtypeStructs of a decoder's every parameter. Raises UserError as `load`, and where
    the folder's model is another one.
    """
    config, files = read_config(folder), tensor_files(folder)
    _check(wanted, files, config, Path(folder))
    return {
        path: _array(files, place(path, DECODER), leaf, where(path))
        for path, leaf in wanted.items()
    }


def tensor_files(folder: Path | str) -> dict[str, TensorFile]:
    """The file of every array in a folder, by its name: one file, or shards with an index.

    Raises UserError where the index is malformed or a shard is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        file = TensorFile(folder / ONE)
        return dict.fromkeys(file.entries, file)
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of files; download it again.")
    shards = {name: TensorFile(folder / name) for name in sorted(set(names.values()))}
    for name, shard in names.items():
        if name not in shards[shard].entries:
            raise UserError(
                f"{folder / shard} has no {name}, which the index says is there; "
                "download both again."
            )
    return {name: shards[shard] for name, shard in names.items()}


def stop_tokens(folder: Path | str) -> tuple[int, ...]:
    """The ids at which the model ends an answer, from its generation_config or config file."""
    for name in ("generation_config.json", "config.json"):
        if (Path(folder) / name).is_file():
            found = read_json(Path(folder) / name).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def save(
    folder: Path | str,
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder from which transformers loads the same model, in the parameters' own type.

    shard_bytes: arrays beyond so many bytes go into the next file. more: entries of `config.json`
    such as `eos_token_id`. files: others to write, by name. The folder appears whole under its
    name, or not at all.
    Raises UserError where it exists, the disk does not take it, or no family of transformers has
    this architecture.
    """
    folder, flat = Path(folder), module.flatten(params)
    text = to_hf(config) | {"torch_dtype": _type(flat, config)} | dict(more or {})
    places = _check_writable(folder, flat)
    shards = _shards({places[path]: flat[path] for path in flat}, shard_bytes)
    with written_whole(folder) as temporary:
        for name, arrays in shards.items():
            write(temporary / name, arrays)
        if len(shards) > 1:
            (temporary / INDEX).write_text(_index(shards), encoding="utf-8")
        (temporary / "config.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)


def _type(flat: Mapping[str, Any], config: DecoderConfig) -> str:
    """In what type transformers is to load the arrays: their own."""
    kinds = {str(array.dtype) for array in flat.values()}
    return kinds.pop() if len(kinds) == 1 else config.param_dtype


def _check(
    wanted: Mapping[str, Any], files: Mapping[str, TensorFile], config: DecoderConfig, folder: Path
) -> None:
    """Every array is there in its shape, and none is left over, before the first is read."""
    unused = set(files)
    for path, leaf in wanted.items():
        name, layout = place(path, DECODER)
        if name not in files:
            raise UserError(
                f"{folder} has no {name}, which its config.json asks for: a shard is missing, or "
                "the configuration is another model's."
            )
        unused.discard(name)
        found, needed = files[name].entries[name].shape, _stored_shape(layout, leaf.shape)
        if found != needed:
            raise UserError(
                f"{name} in {files[name].path} has shape {list(found)}, but config.json asks for "
                f"{list(needed)}: take both from the same model."
            )
    # Old files hold constants of the rotation, and a tied head once more.
    ignored = {"lm_head.weight"} if config.tied_head else set()
    left = sorted(n for n in unused - ignored if not n.endswith("rotary_emb.inv_freq"))
    if left:
        raise UserError(
            f"{files[left[0]].path} has {left[0]}, for which the architecture of config.json has "
            f"no place{f' (and {len(left) - 1} more)' if left[1:] else ''}: it is another model."
        )


def _stored_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    return layout.store(np.broadcast_to(np.zeros(()), shape)).shape


def _array(files: Mapping[str, TensorFile], at: Place, leaf: Any, sharding: Sharding) -> jax.Array:
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        # Devices that hold the same part share one reading of it.
        if str(index) not in parts:

            def take(stored: np.ndarray) -> np.ndarray:
                return copied(at.layout.load(stored)[index or ()], leaf.dtype)

            parts[str(index)] = files[at.theirs].read(at.theirs, take)
        return parts[str(index)]

    array = jax.make_array_from_callback(leaf.shape, sharding, part)
    # Without waiting, the host copies of many arrays would be alive at once.
    return array.block_until_ready()


def _check_writable(folder: Path, flat: Mapping[str, Any]) -> dict[str, Place]:
    """Where every parameter goes in the files."""
    check_new(folder)
    places = {}
    for path, array in flat.items():
        if not getattr(array, "is_fully_addressable", True):
            raise UserError(
                f"{path} lies on several processes; restore the checkpoint in one process to write "
                "this folder."
            )
        try:
            places[path] = place(path, DECODER)
        except KeyError:
            raise UserError(
                f"{path} has no name in transformers: merge adapters into the decoder or leave "
                "them out."
            ) from None
    return places


def _shards(arrays: Mapping[Place, Any], limit: int) -> dict[str, dict[str, Planned]]:
    """The files to write, in the arrays' order."""
    groups: list[dict[str, Planned]] = [{}]
    size = 0
    for at, array in arrays.items():
        planned = _planned(at, array)
        if groups[-1] and size + planned.size > limit:
            groups.append({})
            size = 0
        groups[-1][at.theirs] = planned
        size += planned.size
    if len(groups) == 1:
        return {ONE: groups[0]}
    return {
        f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)
    }


def _planned(at: Place, array: Any) -> Planned:
    shape = _stored_shape(at.layout, array.shape)
    return Planned(shape, np.dtype(array.dtype), lambda: at.layout.store(np.asarray(array)))


def _index(shards: Mapping[str, Mapping[str, Planned]]) -> str:
    total = sum(array.size for arrays in shards.values() for array in arrays.values())
    names = {name: shard for shard, arrays in shards.items() for name in arrays}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n"
