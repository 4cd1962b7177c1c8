"""Programs of exports: only arithmetic and loops that end are compiled, within bounds of memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend import mlir
from jax.extend.mlir import ir

from moezoo.deploy.runtime import limited, operations, programs
from moezoo.deploy.runtime.forms import ExportError
from moezoo.schema_check import FormatFault

W = {"a": np.ones((3, 4), np.float32)}


def exported(function: Callable[..., Any], **options: Any) -> export.Exported:
    (b,) = export.symbolic_shape("b")
    given = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in W.items()}
    x = jax.ShapeDtypeStruct((b, 3), np.float32)
    return export.export(jax.jit(function), platforms=["cpu", "cuda", "tpu"], **options)(given, x)


def solving(w: Any, x: Any) -> Any:
    return {"y": x @ w["a"] @ jnp.linalg.qr(w["a"].T @ w["a"])[0]}


def hidden(w: Any, x: Any) -> Any:
    """In a branch of a function in a branch."""

    @jax.jit
    def inner(x: Any) -> Any:
        return jax.lax.cond(x.sum() > 0, lambda x: solving(w, x)["y"], lambda x: x @ w["a"], x)

    return {"y": jax.lax.cond(x.sum() > 1, inner, lambda x: x @ w["a"], x)}


def endless(w: Any, x: Any) -> Any:
    return {"y": jax.lax.while_loop(lambda y: jnp.isfinite(y).all(), lambda y: y, x @ w["a"])}


def backwards(w: Any, x: Any) -> Any:
    def step(carry: Any) -> Any:
        return carry[0] - 1, carry[1] + 1

    return {"y": jax.lax.while_loop(lambda c: c[0] < 5, step, (0, x @ w["a"]))[1]}


def moving(w: Any, x: Any) -> Any:
    def step(carry: Any) -> Any:
        return carry[0] + 1, carry[1] + 1, carry[2] + 1

    return {"y": jax.lax.while_loop(lambda c: c[0] < c[1], step, (0, 5, x @ w["a"]))[2]}


def long(w: Any, x: Any) -> Any:
    return {"y": jax.lax.fori_loop(0, 2**31 - 1, lambda i, y: y + 1, x @ w["a"])}


def nested(w: Any, x: Any) -> Any:
    def inner(i: Any, y: Any) -> Any:
        return jax.lax.fori_loop(0, 10_000, lambda j, z: z + 1, y)

    return {"y": jax.lax.fori_loop(0, 10_000, inner, x @ w["a"])}


def huge(w: Any, x: Any) -> Any:
    return {"y": x @ w["a"] + jnp.cumsum(jnp.arange(2**33, dtype=jnp.float32))[-1]}


def complex_gone(w: Any, x: Any) -> Any:
    return {"y": jnp.fft.fft(x @ w["a"]).real}


ATTACKS = [
    (hidden, "outside of it"),
    (endless, "loop that does not count to a limit"),
    (backwards, "counter does not grow by one"),
    (moving, "changes its limit"),
    (long, "more than 10,000,000 steps"),
    (nested, "more than 10,000,000 steps"),
    (huge, "an array of the size"),
    (solving, "outside of it"),
    (complex_gone, "operation 'stablehlo.fft'"),
]


@pytest.mark.parametrize(("function", "words"), ATTACKS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_no_export_needs_is_refused(function: Any, words: str) -> None:
    with pytest.raises(FormatFault, match=words):
        programs.check(bytes(exported(function).serialize()))


def changed(text: Callable[[str], str], function: Any = None) -> bytes:
    """A module with some words replaced, as an attacker writes it."""
    made = exported(function or (lambda w, x: {"y": x @ w["a"]}))
    with ir.Context():
        module = mlir.deserialize_portable_artifact(made.mlir_module_serialized)
        other = text(str(module))
    assert other != str(module)
    return mlir.serialize_portable_artifact(other, "1.9.0")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "@shape_assertion",
            "@xla_ffi_python_cpu_callback",
            "calls 'xla_ffi_python_cpu_callback' outside",
        ),
        ("mhlo.num_replicas = 1", "mhlo.num_replicas = 2", "several devices"),
        (
            "{api_version = 2",
            '{backend_config = "x", api_version = 2',
            "attribute 'backend_config'",
        ),
        ("{api_version = 2", '{mhlo.frontend_attributes = {a = "b"}, api_version = 2', "attribute"),
        ("{jax.global_constant", "{tf.aliasing_output = 0 : i32, jax.global_constant", "attribute"),
    ],
)
def test_annotations_are_refused(old: str, new: str, words: str) -> None:
    with pytest.raises(FormatFault, match=words):
        operations.check(changed(lambda text: text.replace(old, new, 1)))


def test_a_function_that_calls_itself_is_refused() -> None:
    name = "_wrapped_jax_export_main"

    def again(text: str) -> str:
        """Its only computation becomes a call of itself."""
        head, body = text.split(f"func.func private @{name}", 1)
        call = next(line for line in head.splitlines() if f"call @{name}(" in line)
        kinds = call[call.index(" : ") :]
        count = kinds.split("->")[0].count("tensor")
        arguments = ", ".join(f"%arg{i}" for i in range(count))
        lines = body.splitlines()
        lines.insert(1, f"    %again = call @{name}({arguments}){kinds}")
        return head + f"func.func private @{name}" + "\n".join(lines)

    with pytest.raises(FormatFault, match="calls itself"):
        operations.check(changed(again))


def test_calls_that_multiply_are_refused() -> None:
    """Forty functions, each of which calls the next one twice: a short text, no end of it."""
    kind = "(tensor<f32>) -> tensor<f32>"
    head = "func.func {}@{}(%arg0: tensor<f32>) -> tensor<f32> {{"
    lines = ["module @m {"]
    for i in range(40):
        called = f"call @f{i + 1}(%{{}}) : {kind}"
        lines += [head.format("private " if i else "public ", f"f{i}" if i else "main")]
        lines += [f"%0 = {called.format('arg0')}", f"%1 = {called.format(0)}"]
        lines += ["return %1 : tensor<f32>", "}"]
    lines += [head.format("private ", "f40"), "return %arg0 : tensor<f32>", "}", "}"]
    data = mlir.serialize_portable_artifact("\n".join(lines), "1.9.0")
    with pytest.raises(FormatFault, match="more than 10,000,000 steps"):
        operations.check(data)


def counting(w: Any, x: Any) -> Any:
    """A loop of a known length, and one whose limit is a number of the batch."""
    y = jax.lax.fori_loop(0, 5, lambda i, y: y * 2, x @ w["a"])
    return {"y": jax.lax.fori_loop(0, jnp.sum(x > 0), lambda i, y: y + i, y)}


def test_what_ends_is_accepted_and_runs(tmp_path: Path) -> None:
    file = tmp_path / "p.stablehlo"
    file.write_bytes(bytes(exported(counting).serialize()))
    found = programs.read(file, "0.0.0")
    programs.check_arrays(found, W, [(["b", 3], "float32")], {"y": (["b", 4], "float32")})
    x = np.array([[1, 2, -1], [3, -1, -1]], np.float32)
    outputs = programs.Program(found)(W, x)
    np.testing.assert_allclose(outputs["y"], 32 * (x @ W["a"]) + 3)
    tight = programs.Program(found, memory=10)
    with pytest.raises(ExportError, match=r"would take 0.0 GiB .* memory=BYTES"):
        tight(W, x)
    for inputs, outputs, words in [
        ([(["b", 4], "float32")], {"y": (["b", 4], "float32")}, "'its input' is float32"),
        ([(["b", 3], "int32")], {"y": (["b", 4], "float32")}, "'its input' is int32"),
        ([(["b", 3], "float32")], {"y": (["b", 5], "float32")}, "'y' is float32"),
        ([(["b", 3], "float32")], {"z": (["b", 4], "float32")}, "arrays of other names"),
        ([], {"y": (["b", 4], "float32")}, "arrays of other names"),
    ]:
        with pytest.raises(FormatFault, match=words):
            programs.check_arrays(found, W, inputs, outputs)
    with pytest.raises(FormatFault, match="'a' is float32"):
        programs.check_arrays(
            found, {"a": W["a"].T}, [(["b", 3], "float32")], {"y": (["b", 4], "float32")}
        )


def growing(w: Any, x: Any) -> Any:
    """Small arrays in the file, terabytes when it runs."""
    rows = x.shape[0] * 2**20
    table = jnp.sin(jnp.arange(rows, dtype=jnp.float32))[:, None] * jnp.cos(
        jnp.arange(rows, dtype=jnp.float32)
    )
    return {"y": x @ w["a"] + jnp.sort(table, axis=0)[-1, -1]}


def test_memory_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "p.stablehlo"
    file.write_bytes(bytes(exported(growing).serialize()))
    with pytest.raises(ExportError, match=r"would take [\d,.]+ GiB for this batch"):
        programs.Program(programs.read(file, "0.0.0"))(W, np.ones((1, 3), np.float32))


def test_shapes_that_take_for_ever_to_read(tmp_path: Path) -> None:
    """As JAX reads polynomials of sizes; refused, or given up by the process that reads."""
    sizes = export.symbolic_shape("a, b, c, d")
    x = jax.ShapeDtypeStruct((sum(sizes) ** 2,), np.float32)
    made = export.export(jax.jit(lambda w, x, *y: {"y": x.sum()}))(
        {}, x, *(jax.ShapeDtypeStruct((s,), np.float32) for s in sizes)
    )
    with pytest.raises(FormatFault, match="a shape of it has the size"):
        programs.check(bytes(made.serialize()))


def test_a_reader_that_crashes_or_waits_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").write_bytes(b"x")
    for child, seconds, words in [
        ("import os; os.abort()", 30.0, r"it ends the process that reads it .SIGABRT"),
        ("import time; time.sleep(9)", 0.5, "is not read within"),
    ]:
        monkeypatch.setattr(limited, "CHILD", child)
        monkeypatch.setattr(limited, "SECONDS", seconds)
        with pytest.raises(ExportError, match=words):
            programs.read(tmp_path / "p", "0.0.0")


def test_commands_give_up(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import time; from moezoo.deploy.runtime import programs\n"
    code += "with programs.at_most(0.2): time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert done.returncode == 2 and done.stderr == "error: given up after 0.2 s (--seconds).\n"
