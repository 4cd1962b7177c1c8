"""Weights of other projects, damaged: what is accepted is right, everything else one sentence."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save

from moezoo.backbones.decoder import DecoderConfig
from moezoo.nn import module
from moezoo.weights import ast, hf, peft, vit
from moezoo.weights.augreg_names import to_augreg
from moezoo.weights.names import VIT, to_ours
from moezoo.weights.vit import Target
from tests.robustness import fuzz
from tests.weights import models, test_ast, torch_files, vit_files
from tests.weights.vit_files import VIT_NAMES, timm, transformers

Files = dict[str, bytes]


@cache
def decoder_base() -> Any:
    return DecoderConfig(vocabulary=10, width=8, depth=1, heads=2, groups=1, hidden=6).build(
        nnx.Rngs(0)
    )


@cache
def flat() -> dict[str, np.ndarray]:
    """The arrays of `timm()` by our paths, without the classifier."""
    found = to_ours(timm(), VIT).arrays
    return {path: array for path, array in found.items() if not path.startswith("head")}


def target(told: int | None = 3) -> Target:
    return Target({path: a.shape for path, a in flat().items()}, (4, 4), 3, told)


def finite(arrays: Any) -> None:
    for path, array in arrays.items():
        assert np.isfinite(np.asarray(array)).all(), f"{path} is not finite"


def read_vit(path: Path) -> None:
    found = vit.trunk(path, target())
    assert {p: a.shape for p, a in found.items()} == {p: a.shape for p, a in flat().items()}
    finite(found)


def read_decoder(folder: Path) -> None:
    config, parts = hf.load(folder)
    arrays = module.flatten(parts.params)
    assert arrays["embed/table"].shape == (config.vocabulary, config.width)
    assert len({p.split("/")[1] for p in arrays if p.startswith("layers/")}) == config.depth
    hf.stop_tokens(folder)


def read_adapter(folder: Path) -> None:
    adapter = peft.read(folder, decoder_base())
    for factors in adapter.layers.values():
        assert np.isfinite(factors.scale) and factors.down.shape[1] == factors.up.shape[0]
        finite({"down": factors.down, "up": factors.up})


def read_ast(folder: Path) -> None:
    found = ast.load(folder, ast.Normalisation((0.0,), (1.0,)))
    assert {p: a.shape for p, a in found.items()} == ast.shapes(ast.read_config(folder))
    finite(found)


def of_folder(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@cache
def sound(kind: str, folder: Path) -> Files:
    """The files of an undamaged model of a kind."""
    made = folder / f"sound_{kind}"
    if kind in ("decoder", "shards"):
        options: dict[str, Any] = {} if kind == "decoder" else {"shard_bytes": 600}
        models.write(made, more={"eos_token_id": [3, 4]}, **options)
    elif kind == "ast":
        test_ast.folder(made)
        test_ast.preprocessor(made, mean=-6.0, std=5.0)
    elif kind == "vit_folder":
        told = {"model_type": "vit", "hidden_size": 12, "num_attention_heads": 3}
        images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
        vit_files.folder(made, transformers(timm(), VIT_NAMES, "vit."), told, images)
    elif kind == "adapter":
        rng = np.random.default_rng(0)
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        shapes = {f"{name}.lora_A.weight": (2, 8), f"{name}.lora_B.weight": (8, 2)}
        arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "bias": "none"}
        config |= {"rank_pattern": {}, "alpha_pattern": {"q_proj": 8}, "init_lora_weights": True}
        return {"adapter_model.safetensors": save(arrays), "adapter_config.json": dump(config)}
    elif kind == "timm":
        return {"vit.safetensors": save(timm(scale="ls{0}.gamma"))}
    elif kind == "torch":
        made.mkdir()
        torch_files.write(made / "vit.pth", timm(), "model", "module.")
    elif kind == "torch_row":
        return {"vit.pth": torch_files.in_a_row(timm())}
    else:
        arrays, _ = to_augreg(flat(), 3)
        packed = io.BytesIO()
        {"npz": np.savez, "deflated": np.savez_compressed}[kind](packed, **arrays)
        return {"vit.npz": packed.getvalue()}
    return of_folder(made)


READ: dict[str, Callable[[Path], None]] = {
    "decoder": read_decoder,
    "shards": read_decoder,
    "ast": read_ast,
    "vit_folder": read_vit,
    "adapter": read_adapter,
    "timm": lambda folder: read_vit(folder / "vit.safetensors"),
    "torch": lambda folder: read_vit(folder / "vit.pth"),
    "torch_row": lambda folder: read_vit(folder / "vit.pth"),
    "npz": lambda folder: read_vit(folder / "vit.npz"),
    "deflated": lambda folder: read_vit(folder / "vit.npz"),
}


def dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def nested(chance: random.Random) -> bytes:
    depth = chance.choice((50, 500, 100_000))
    return b"[" * depth + b"]" * depth if chance.random() < 0.5 else b'{"a":' * depth


def spoiled_json(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    if chance.random() < 0.1:
        return "nested", nested(chance)
    if chance.random() < 0.2:
        return fuzz.mutate_bytes(chance, content)
    what, value = fuzz.mutate_json(chance, json.loads(content))
    return what, dump(value)


def spoiled_header(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    """The header of a safetensors file: its length stays right, so that it is read."""
    length = int.from_bytes(content[:8], "little")
    what, header = spoiled_json(chance, content[8 : 8 + length])
    header += b" " * (-len(header) % 8)
    return what, len(header).to_bytes(8, "little") + header + content[8 + length :]


def spoiled_member(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    """One array of an .npz file, packed again, so that the sums are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        chosen = chance.choice(old.namelist())
        what = ""
        for name in old.namelist():
            member = old.read(name)
            if name == chosen:
                # Mostly its header, which is the first 128 bytes.
                cut = 128 if chance.random() < 0.8 else len(member)
                what, first = fuzz.mutate_bytes(chance, member[:cut])
                member = first + member[cut:]
            new.writestr(name, member)
    return f"{chosen}: {what}", made.getvalue()


def spoiled_pickle(chance: random.Random, content: bytes) -> tuple[str, bytes]:
    """The names, shapes and strides of a checkpoint of PyTorch; an archive's sums stay right."""
    if not content.startswith(b"PK"):
        cut = content.index(b"norm.bias")
        what, first = fuzz.mutate_bytes(chance, content[:cut])
        return what, first + content[cut:]
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        what, first = fuzz.mutate_bytes(chance, old.read("archive/data.pkl"))
        for name in old.namelist():
            new.writestr(name, first if name.endswith(".pkl") else old.read(name))
    return what, made.getvalue()


def spoiled(chance: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    if name.endswith(".json"):
        return spoiled_json(chance, content)
    if chance.random() < 0.3:
        return fuzz.mutate_bytes(chance, content)
    if name.endswith(".npz"):
        return spoiled_member(chance, content)
    if name.endswith(".pth"):
        return spoiled_pickle(chance, content)
    return spoiled_header(chance, content)


@fuzz.counts(ci=16, full=300)
def test_damaged_weights(count: int, tmp_path: Path) -> None:
    kinds = sorted(READ)
    for kind in kinds:  # each is accepted as it is, or its cases would mean nothing
        folder = tmp_path / kind
        folder.mkdir()
        for name, content in sound(kind, tmp_path).items():
            (folder / name).write_bytes(content)
        READ[kind](folder)

    def case(chance: random.Random) -> fuzz.Case:
        kind = chance.choice(kinds)
        files = sound(kind, tmp_path)
        name = chance.choice(sorted(files))
        what, content = spoiled(chance, name, files[name])

        def attempt() -> None:
            folder = tmp_path / kind
            (folder / name).write_bytes(content)
            try:
                READ[kind](folder)
            finally:
                (folder / name).write_bytes(files[name])

        return f"{kind}/{name}: {what}", attempt

    outcomes = fuzz.run("weights", case, count)
    assert outcomes.get("refused", 0) > count // 3
