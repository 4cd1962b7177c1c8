"""Decoders in the folders of Hugging Face models: `config.json` and safetensors, read and written.

An array goes from its file into its sharding, one array at a time and only the parts that this
process's devices hold, so that a checkpoint is never twice in memory. The experts of a layer, which
the files hold one by one, are one stacked array here: put together for one array at a time, taken
apart expert by expert.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.schema_check import either, list_of, maybe, shortened, table, whole
from moezoo.structured import read_object
from moezoo.weights.files import check_new, written_whole
from moezoo.weights.hf_config import looks_ahead, names_of, read_config, to_hf
from moezoo.weights.hf_files import INDEX, ONE, tensor_files
from moezoo.weights.names import FUSED, ArrayLayout, NameTable, Place, fused, place
from moezoo.weights.shards import from_parts
from moezoo.weights.tensor_file import Planned, TensorFile, copied, own_pages, write

EMBEDDING, HEAD, STEM = "model.embed_tokens.weight", "lm_head.weight", "model."
STOPS = table({"eos_token_id": maybe(either(list_of(whole(), longest=1000), whole()))})
LAYER = re.compile(r"model\.layers\.(\d+)\.")
SHARD_BYTES = 5_000_000_000
Where = Callable[[str], Sharding]  # the path of a parameter -> where it goes


class PublishedModel(NamedTuple):
    """A model as it was published: `module.merge(*parts)` gives the module."""

    config: DecoderConfig
    parts: module.ModuleParts


def load(folder: Path | str, where: Where | None = None, **changes: Any) -> PublishedModel:
    """The model in a folder of Hugging Face's format.

    where: the sharding of a parameter by its path, such as "layers/3/attn/q/kernel"; everything
    on the first device where it is not given. changes: fields of `DecoderConfig`; parameters are
    cast to `param_dtype`, which is float32 unless given, as is `dtype`, that of the computation.
    Raises UserError where a file or an array is missing or damaged, has another shape, or is one
    that this architecture has not.
    """
    config = read_config(folder, **changes)
    _check_depth(_stored(folder, config), config, Path(folder))  # before so much is built in vain
    parts = module.abstract(lambda: config.build(nnx.Rngs(0)))
    here = SingleDeviceSharding(jax.local_devices()[0])
    loaded = load_into(folder, module.flatten(parts.params), where or (lambda path: here))
    return PublishedModel(
        config, module.ModuleParts(parts.definition, module.unflatten(loaded), parts.stats)
    )


def check(folder: Path | str) -> None:
    """UserError, as of `load`, from names and shapes alone: nothing is read."""
    config = read_config(folder)
    arrays = _stored(folder, config)
    _check_depth(arrays, config, Path(folder))
    parts = module.abstract(lambda: config.build(nnx.Rngs(0)))
    _check(module.flatten(parts.params), arrays, config, Path(folder))


def load_into(folder: Path | str, wanted: Mapping[str, Any], where: Where) -> dict[str, jax.Array]:
    """The arrays of a folder in the shapes and types of `wanted`, by path, each at its place.

    wanted: ShapeDtypeStructs of a decoder's every parameter. Raises UserError as `load`, and where
    the folder's model is another one.
    """
    config = read_config(folder)
    arrays = _stored(folder, config)
    _check_depth(arrays, config, Path(folder))
    _check(wanted, arrays, config, Path(folder))
    names = _names(arrays, config)
    return {
        path: _array(arrays, place(path, names), leaf, where(path)) for path, leaf in wanted.items()
    }


def _names(arrays: Mapping[str, HFArray], config: DecoderConfig) -> NameTable:
    """How this folder calls its arrays: experts one by one, or fused as transformers 5 has them."""
    names = names_of(config)
    return fused(names) if any(n.endswith(FUSED) for n in arrays) else names


class HFArray(NamedTuple):
    """An array in its file, under the name that it has there."""

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As it lies there."""
        return self.file.entries[self.name].shape


def _stored(folder: Path | str, config: DecoderConfig) -> dict[str, HFArray]:
    """The arrays of a folder under the names of a whole model with its head.

    Those of a model without one lack the prefix; a tied model may hold its one matrix as the head.
    """
    files = tensor_files(folder)
    bare = EMBEDDING.removeprefix(STEM) in files
    found = {
        f"{STEM}{name}" if bare and name != HEAD else name: HFArray(file, name)
        for name, file in files.items()
    }
    if config.tied_head and EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
    return found


def _check_depth(arrays: Mapping[str, HFArray], config: DecoderConfig, folder: Path) -> None:
    layers = {match[1] for name in arrays if (match := LAYER.match(name))}
    if len(layers) < config.depth:
        raise UserError(
            f"{folder} has {len(layers)} layers, but its config.json asks for {config.depth}: a "
            "shard is missing, or the configuration is another model's."
        )


def stop_tokens(folder: Path | str) -> tuple[int, ...]:
    """The ids at which the model ends an answer, from its generation_config or config file."""
    for name in ("generation_config.json", "config.json"):
        if (Path(folder) / name).is_file():
            found = read_object(Path(folder) / name, STOPS).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
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
    places = _check_writable(folder, flat, names_of(config))
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
    wanted: Mapping[str, Any], arrays: Mapping[str, HFArray], config: DecoderConfig, folder: Path
) -> None:
    """Every array is there in its shape, and none is left over, before the first is read."""
    unused, names = set(arrays), _names(arrays, config)
    for path, leaf in wanted.items():
        at = place(path, names)
        for name, shape in _theirs(at, leaf.shape).items():
            _check_one(arrays, name, _stored_shape(at.layout, shape), folder)
            unused.discard(name)
    # Old files hold constants of the rotation, and a tied head once more.
    ignored = {"lm_head.weight"} if config.tied_head else set()
    ignored |= {name for name in unused if name.endswith("rotary_emb.inv_freq")}
    ignored |= {name for name in unused if _ahead(name, config)}
    left = sorted(unused - ignored)
    if left:
        raise UserError(
            f"{arrays[left[0]].file.path} has {shortened(left[0], 200)}, for which the "
            f"architecture of config.json has no place{more(left)}: it is another model."
        )


def _ahead(name: str, config: DecoderConfig) -> bool:
    """Whether an array is of a layer behind the last one, which would predict tokens further ahead
    and takes no part in the next one's; only some families' files have such layers."""
    match = LAYER.match(name)
    return bool(match) and int(match[1]) >= config.depth and looks_ahead(config)


def _check_one(
    arrays: Mapping[str, HFArray], name: str, needed: tuple[int, ...], folder: Path
) -> None:
    if name not in arrays:
        raise UserError(
            f"{folder} has no {name}, which its config.json asks for: a shard is missing, or "
            "the configuration is another model's."
        )
    arrays[name].file.check_type(arrays[name].name)
    found = arrays[name].shape
    if found != needed:
        raise UserError(
            f"{name} in {arrays[name].file.path} has shape {list(found)}, but config.json asks "
            f"for {list(needed)}: take both from the same model."
        )


def _theirs(at: Place, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names of the arrays that hold one of ours of this shape, and our shape of each."""
    if not at.stacked:
        return {at.theirs: shape}
    return {at.of_expert(e): shape[1:] for e in range(shape[0])}


def more(names: Sequence[str]) -> str:
    """How many there are behind the first."""
    return f" (and {len(names) - 1} more)" if names[1:] else ""


def _stored_shape(layout: ArrayLayout, shape: tuple[int, ...]) -> tuple[int, ...]:
    return layout.store(np.broadcast_to(np.zeros(()), shape)).shape


def _array(arrays: Mapping[str, HFArray], at: Place, leaf: Any, sharding: Sharding) -> jax.Array:
    if at.stacked:
        return from_parts(
            leaf.shape, sharding, lambda index: _read_stack(arrays, at, leaf, index or ())
        )
    file, name = arrays[at.theirs]
    with file.viewed(name) as stored:

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            return copied(at.layout.load(stored())[index or ()], leaf.dtype)

        return from_parts(leaf.shape, sharding, part)


def _read_stack(
    arrays: Mapping[str, HFArray], at: Place, leaf: Any, index: tuple[slice, ...]
) -> np.ndarray:
    """A part of a stack, of which they have an array for each expert."""
    experts, *inner = index or (slice(None),)
    numbers = range(leaf.shape[0])[experts]
    shape = np.broadcast_to(np.zeros(()), leaf.shape)[index].shape
    stack = own_pages(shape, leaf.dtype)
    for place_in, number in enumerate(numbers):
        file, name = arrays[at.of_expert(number)]
        with file.viewed(name) as stored:
            stack[place_in] = copied(at.layout.load(stored())[tuple(inner)], leaf.dtype)
    return stack


def _check_writable(folder: Path, flat: Mapping[str, Any], names: NameTable) -> dict[str, Place]:
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
            places[path] = place(path, names)
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
        for name, planned in _planned(at, array).items():
            if groups[-1] and size + planned.size > limit:
                groups.append({})
                size = 0
            groups[-1][name] = planned
            size += planned.size
    if len(groups) == 1:
        return {ONE: groups[0]}
    return {
        f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)
    }


def _planned(at: Place, array: Any) -> dict[str, Planned]:
    """Their arrays of one of ours; an expert's leaves the stack only when it is written."""

    def one(number: int | None, shape: tuple[int, ...]) -> Planned:
        def bring() -> np.ndarray:
            return at.layout.store(np.asarray(array if number is None else array[number]))

        return Planned(_stored_shape(at.layout, shape), np.dtype(array.dtype), bring)

    names = _theirs(at, array.shape).items()
    return {name: one(i if at.stacked else None, shape) for i, (name, shape) in enumerate(names)}


def _index(shards: Mapping[str, Mapping[str, Planned]]) -> str:
    total = sum(array.size for arrays in shards.values() for array in arrays.values())
    names = {name: shard for shard, arrays in shards.items() for name in arrays}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n"
