"""Damaged and hostile files for other runtimes in a folder: refused in words, or right.

A stranger's file may crash its runtime, ask for all memory, or never end. The process that asks
goes on in every case, and takes no more memory than before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import export, litert_file, onnx_file
from moezoo.deploy.export import Content
from moezoo.deploy.manifest import Facts
from moezoo.deploy.runtime import folder as files
from moezoo.deploy.runtime import limited, other_forms
from moezoo.deploy.task_path import task_path
from moezoo.domains.images.export import photos
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module
from moezoo.schema_check import FormatFault, parse
from tests.models.tiny import filled
from tests.robustness import fuzz
from tests.tasks.tables import build

SIZE, HUGE = (8, 8), (2**20, 2**14)  # 64 GiB of float32


class Made(NamedTuple):
    """A sound folder, its manifest, and what is stored in it."""

    folder: Path
    manifest: dict[str, Any]
    golden: dict[str, np.ndarray]

    def check(self, file: str, content: bytes, folder: Path) -> str | None:
        """Whether a folder with another file is still right."""
        for name in self.manifest["files"]:
            target = folder / name
            if not target.exists():
                target.symlink_to(self.folder / name)
        (folder / file).unlink()
        (folder / file).write_bytes(content)
        return other_forms.check(folder, self.manifest, self.golden)


@pytest.fixture(scope="module", params=["onnx", "litert"])
def form(request: pytest.FixtureRequest) -> str:
    needed = {"onnx": "onnxruntime", "litert": "litert_converter"}[request.param]
    if find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    return request.param


@pytest.fixture(scope="module")
def made(form: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = ViTDenseConfig(width=8, depth=1, heads=2, patch=4, head_channels=4)
    model = module.merge(*filled(lambda: config.build({"semseg": 3}, SIZE, nnx.Rngs(0))))
    path, task = task_path(model, "semseg", photos(SIZE)), build("semseg", classes=3)
    given = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    writer: Any = {"onnx": onnx_file, "litert": litert_file}[form]
    folder = export.write(
        tmp_path_factory.mktemp(form) / "made",
        Content(path, task, Facts(), {}, {}, given),
        more=lambda place: {"formats": {form: writer.write(place, path, task, given)}},
    )
    manifest = parse((folder / "manifest.json").read_bytes())
    manifest["files"] = {
        name: "" for name in manifest["files"] if "/" not in name and not name.endswith(".py")
    }
    return Made(folder, manifest, files.read_tensors(folder / "golden.safetensors"))


@pytest.mark.slow
@fuzz.counts(ci=10, full=80)
def test_damaged_files(count: int, form: str, made: Made, tmp_path: Path) -> None:
    file = other_forms.FORMS[form].file
    whole = (made.folder / file).read_bytes()
    assert made.check(file, whole, tmp_path) is not None

    def case(chance: random.Random) -> fuzz.Case:
        what, changed = fuzz.mutate_bytes(chance, whole)
        return what, lambda: made.check(file, changed, tmp_path)

    found = fuzz.run(f"{form} files", case, count, (FormatFault,))
    assert found["refused"] >= count / 5


def grown_onnx() -> bytes:
    """An ONNX file whose program fills 64 GiB."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["all"]),
        helper.make_node("ReduceSum", ["all"], ["logits"], keepdims=0),
    ]
    return _onnx(nodes, [helper.make_tensor("size", TensorProto.INT64, [2], HUGE)])


def endless_onnx() -> bytes:
    """An ONNX file that counts to 2^62."""
    from onnx import TensorProto, helper

    def value(name: str, kind: int, shape: list[int] | None) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("v", TensorProto.FLOAT, None),
        ],
        [value("on", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, None)],
    )
    constants = [
        helper.make_tensor("times", TensorProto.INT64, [], [2**62]),
        helper.make_tensor("true", TensorProto.BOOL, [], [True]),
    ]
    loop = helper.make_node("Loop", ["times", "true", "image"], ["logits"], body=body)
    return _onnx([loop], constants)


def outside_onnx() -> bytes:
    """An ONNX file whose weights are said to lie in a file of the system."""
    from onnx import TensorProto, helper

    array = helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4)
    array.ClearField("float_data")
    array.data_location = TensorProto.EXTERNAL
    array.external_data.add(key="location", value="../../../../../../../../etc/passwd")
    return _onnx([helper.make_node("Identity", ["w"], ["logits"])], [array])


def _onnx(nodes: list[Any], constants: list[Any]) -> bytes:
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", *SIZE, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [image], [logits], constants)
    version = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[version], ir_version=9).SerializeToString()


def grown_litert() -> bytes:
    """A LiteRT file whose program fills 64 GiB."""
    (ir, passmanager, dialect), converter = litert_file.libraries()

    def call(image: Any) -> Any:
        every = jnp.cumsum(jnp.broadcast_to(jnp.sum(image), HUGE), axis=0)
        return jnp.sum(every * jnp.cumsum(every, axis=1), axis=1)

    given = jax.ShapeDtypeStruct((1, *SIZE, 3), np.float32)
    program = jax.export.export(jax.jit(call), platforms=("cpu",))(given).mlir_module()
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(program)
        converter.set_signature(module.operation, litert_file.SIGNATURE, ["image"], ["logits"])
        passes = passmanager.PassManager()
        converter.run_convert_to_tfl_passes(module, passes, converter.ConvertToTFLConfig())
        return converter.export_flatbuffer_to_bytes(module.operation)


ATTACKS: dict[str, dict[str, tuple[Callable[[], bytes], str]]] = {
    "onnx": {
        "memory": (grown_onnx, "cannot be (read|run)|ends the process"),
        "time": (endless_onnx, "is not read within 6 s"),
        "files": (outside_onnx, "cannot be read"),
    },
    "litert": {"memory": (grown_litert, "cannot be (read|run)|ends the process")},
}


@pytest.mark.slow
def test_attacks(form: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 6.0)
    file = other_forms.FORMS[form].file
    for name, (attack, words) in ATTACKS[form].items():
        fuzz.forget_peak()
        before = fuzz.peak_bytes()
        with pytest.raises(FormatFault, match=words) as raised:
            made.check(file, attack(), tmp_path)
        assert file in str(raised.value) and len(str(raised.value)) < 400, name
        assert fuzz.peak_bytes() - before < 1 << 29, name
