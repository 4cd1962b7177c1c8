"""The files of a Hugging Face folder that hold its arrays, and what to say where none can be read.

One file, shards with an index, or shards whose index got lost: their names tell how many there are
and their headers what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moezoo.errors import UserError
from moezoo.schema_check import map_of, relative, shortened, table
from moezoo.structured import read_object
from moezoo.weights.tensor_file import TensorFile

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
CONFIG = "config.json"
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
INDEX_FORM = table({"weight_map": map_of(relative, shortest=1)}, required=("weight_map",))
BY_NAME = "which are read where a vision transformer's file itself is named"
# Ways to keep weights that are not read here, and what they are.
OTHERS = {
    "pytorch_model*.bin": f"pickles of PyTorch, {BY_NAME}",
    "*.pth": f"pickles of PyTorch, {BY_NAME}",
    "*.pt": f"pickles of PyTorch, {BY_NAME}",
    "*.ckpt*": "a checkpoint of another framework",
    "tf_model*.h5": "weights of TensorFlow",
    "flax_model*.msgpack": "weights of Flax",
    "*.gguf": "quantised weights of llama.cpp",
    "*.onnx": "a program of ONNX",
}


def model_type(folder: Path | str) -> str | None:
    """What kind of model a folder's `config.json` says it holds; None where it does not say."""
    found = config_of(folder).get("model_type")
    return found if isinstance(found, str) else None


def config_of(folder: Path | str) -> dict[str, Any]:
    """A folder's `config.json`, its values unchecked; empty where there is none."""
    path = Path(folder) / CONFIG
    return read_object(path) if path.is_file() else {}


def holds_model(folder: Path | str) -> bool:
    """Whether this looks like the folder of a model of others rather than one of a run's."""
    folder = Path(folder)
    if (folder / ONE).is_file() or (folder / INDEX).is_file() or _shards(folder):
        return True
    return bool(_others(folder)) or model_type(folder) is not None


def tensor_files(folder: Path | str) -> dict[str, TensorFile]:
    """The file of every array in a folder, by the array's name.

    Raises UserError where there is none that can be read, the index is malformed or a shard is
    missing or damaged.
    """
    folder = Path(folder)
    if (folder / ONE).is_file():
        file = TensorFile(folder / ONE)
        return dict.fromkeys(file.entries, file)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    shards = _shards(folder)
    if shards:
        return _unindexed(folder, shards)
    raise _absent(folder)


def _indexed(folder: Path) -> dict[str, TensorFile]:
    names = read_object(folder / INDEX, INDEX_FORM)["weight_map"]
    others = sorted(name for name in set(names.values()) if not name.endswith(".safetensors"))
    if others:
        raise UserError(f"{folder / INDEX} names {others[0]}, which is no safetensors file.")
    shards = {name: TensorFile(folder / name) for name in sorted(set(names.values()))}
    for name, shard in names.items():
        if name not in shards[shard].entries:
            raise UserError(
                f"{folder / shard} has no {shortened(name, 200)}, which the index says is there; "
                "download both again."
            )
    return {name: shards[shard] for name, shard in names.items()}


def _shards(folder: Path) -> list[re.Match[str]]:
    found = (SHARD.fullmatch(path.name) for path in folder.glob("*-of-*.safetensors"))
    return sorted((m for m in found if m), key=lambda match: match.string)


def _unindexed(folder: Path, shards: list[re.Match[str]]) -> dict[str, TensorFile]:
    first = shards[0]
    name, count = first["name"], first["count"]
    there = {m.string for m in shards if (m["name"], m["count"]) == (name, count)}
    for number in range(1, int(count) + 1):
        shard = f"{name}-{number:05}-of-{count}.safetensors"
        if shard not in there:
            raise UserError(f"{folder} has {first.string}, but no {shard}; download it again.")
    found: dict[str, TensorFile] = {}
    for shard in sorted(there):
        file = TensorFile(folder / shard)
        twice = found.keys() & file.entries.keys()
        if twice:
            raise UserError(
                f"{sorted(twice)[0]} is in two shards of {folder}, and there is no {INDEX} to say "
                "which one counts; download it."
            )
        found |= dict.fromkeys(file.entries, file)
    return found


def _others(folder: Path) -> list[tuple[str, str]]:
    """Files of other forms, and what they are."""
    return [(p.name, what) for form, what in OTHERS.items() for p in sorted(folder.glob(form))]


def _absent(folder: Path) -> UserError:
    others = _others(folder)
    if others:
        name, what = others[0]
        return UserError(
            f"{folder} holds its weights as {name} ({what}) and not as {ONE}: where transformers "
            f"is installed, load the folder and call save_pretrained(NEW_FOLDER), then name that."
        )
    if (folder / "adapter_config.json").is_file():
        return UserError(
            f"{folder} holds an adapter of PEFT, no whole model: name the folder of its base, or "
            "merge the adapter into it with PEFT first."
        )
    named = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if named:
        return UserError(
            f"There is no {folder / ONE}, but {named[0]}: if that is the whole model, rename it."
        )
    return UserError(f"There is neither {folder / ONE} nor a shard of it; download it again.")
