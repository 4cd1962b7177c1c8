"""The benchmark tool: its numbers' form, its command line, and the timing beneath it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moezoo.deploy.bench_moe import MODES
from moezoo.deploy.timing import interleave
from moezoo.ops.grouped import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--tokens", "64", "--width", "8", "--hidden", "8", "--k", "2", "--repeats", "2"]


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench.py", *words]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_small_run_writes_rows_versions_machine_and_a_picture(tmp_path: Path) -> None:
    file, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    words = ["--experts", "2", "4", "--backends", "auto", "--small-tokens", "0"]
    done = bench("moe", "--json", str(file), "--picture", str(picture), *words, *SMALL)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = result["rows"]
    found = {(r["backend"], r["experts"], r["mode"], r["tokens"]) for r in rows}
    assert found == {("auto", e, m, 64) for e in (2, 4) for m in MODES}
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert [(g["backend"], g["experts_from"], g["experts_to"]) for g in result["growth"]] == [
        ("auto", 2, 4)
    ] * 2
    assert result["machine"]["cores"] >= 1 and result["machine"]["backend"] == "cpu"
    assert {"moezoo", "jax", "jaxlib", "python"} <= result["versions"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mo"], "Unknown benchmark 'mo': did you mean moe?"),
        (["moe"], "--json"),
        (["moe", "--json", "a.json", "--k", "9"], "--k must be between 1 and"),
        (["moe", "--json", "a.json", "--backends", "blokcs"], "did you mean blocks"),
        (["moe", "--json", "a.json", "--repeats", "0"], "--repeats must be at least 1"),
        (["moe", "--json", "a.json", "--width", "0"], "--width is 0"),
        (["moe", "--json", "a.json", "--token", "7"], "Unrecognized options: --token"),
        (["moe", "--json", "/proc/none/a.json"], "/proc/none"),
    ],
)
def test_bad_arguments_end_with_one_sentence_and_code_2(words: list[str], message: str) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["moe", "--help"]])
def test_help_shows_an_example(words: list[str]) -> None:
    done = bench(*words)
    assert done.returncode == 0
    assert "Example: python tools/bench.py moe --json" in " ".join(done.stdout.split())


def test_all_backends_meet_at_the_small_size() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "bench.py"))
    arguments = tool["MoEArguments"](json=Path("a.json"))
    full, small = tool["cases_of"](arguments)
    assert {(c.backend, c.experts) for c in full} == {
        (name, e) for name in ("auto", "capacity") for e in (8, 16, 32, 64)
    }
    assert {c.backend for c in small} == set(BACKENDS)
    assert {c.sizes.tokens for c in small} == {arguments.small_tokens}


def test_every_case_runs_beside_the_base() -> None:
    order: list[str] = []
    run = {name: lambda name=name: order.append(name) for name in ("base", "a", "b")}
    *_, times = interleave(run["base"], {"a": run["a"], "b": run["b"]}, repeats=3)
    assert order[:3] == ["base", "a", "b"]  # once before anything is measured
    assert order[3:] == ["base", "a", "base", "b", "a", "base", "b", "base"] + order[3:7]
    assert times["a"].ratios.shape == (3,)
    np.testing.assert_allclose(times["b"].ratios, times["b"].case / times["b"].base)
