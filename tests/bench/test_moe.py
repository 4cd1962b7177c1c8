"""The benchmark tool: its numbers' form, its command line, and the timing beneath it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from moezoo.bench import moe as bench_floor
from moezoo.bench import tokamax_peer, torch_peer
from moezoo.bench.moe import (
    MODES,
    Growth,
    LayerSizes,
    MoEArguments,
    TimedCase,
    TimedRow,
    cases_of,
    check,
    moe_builder,
    tokens,
)
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.ops.expert import dense
from moezoo.ops.grouped import BACKENDS
from moezoo.timing import interleave

ROOT = Path(__file__).resolve().parents[2]
SMALL_SIZES = LayerSizes(tokens=20, width=8, hidden=6, k=2, dtype="float32")
SMALL = ["--width", "8", "--hidden", "8", "--k", "2", "--repeats", "2"]


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench.py", *words]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_small_run_writes_rows_versions_machine_and_a_picture(tmp_path: Path) -> None:
    file, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    words = ["--experts", "2", "4", "--backends", "auto", "--small-tokens", "0"]
    words += ["--tokens", "64"]
    done = bench("moe", "--json", str(file), "--picture", str(picture), *words, *SMALL)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = result["rows"]
    found = {(r["backend"], r["experts"], r["mode"], r["tokens"]) for r in rows}
    assert found == {("auto", e, m, 64) for e in (2, 4) for m in MODES}
    for row in rows:
        assert row["compile_seconds"] > 0 and row["temporary_bytes"] > 0
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    grown = [(g["backend"], g["experts_from"], g["experts_to"]) for g in result["growth"]]
    assert grown == [("auto", 2, 4)] * 2
    assert result["machine"]["cores"] >= 1 and result["machine"]["backend"] == "cpu"
    assert {"moezoo", "jax", "jaxlib", "python"} <= result["versions"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mo"], "Unknown benchmark 'mo': did you mean moe?"),
        (["moe"], "--json"),
        (["moe", "--json", "a.json", "--k", "9"], "--k must be between 1 and"),
        (["moe", "--json", "a.json", "--backends", "blokcs"], "did you mean blocks"),
        (["moe", "--json", "a.json", "--repeats", "0"], "--repeats is 0"),
        (["moe", "--json", "a.json", "--tokens"], "--tokens is empty"),
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


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["moe", "--help"]])
def test_help_shows_an_example(words: list[str]) -> None:
    done = bench(*words)
    assert done.returncode == 0
    assert "Example: moezoo bench moe --json" in " ".join(done.stdout.split())


def test_all_backends_meet_at_the_small_size() -> None:
    arguments = MoEArguments(json=Path("a.json"))
    full, small = cases_of(arguments)
    assert {(c.backend, c.experts) for c in full} == {
        (name, e) for name in ("auto", "capacity") for e in (8, 16, 32, 64)
    }
    assert {c.backend for c in small} == set(BACKENDS)
    assert {c.sizes.tokens for c in small} == {arguments.small_tokens}


def test_the_peer_computes_the_same_layer() -> None:
    pytest.importorskip("torch", reason="the peer is PyTorch's: pip install 'moezoo[parity]'")
    sizes = LayerSizes(tokens=40, width=8, hidden=6, k=2, dtype="float32")
    layer = moe_builder(TimedCase("reference", 5, sizes))(nnx.Rngs(0))
    parts = module.split(layer)
    x_ND, dy_ND = tokens(sizes)
    runs = torch_peer.runs(parts.params, sizes.k, x_ND, dy_ND, "torch_loop")
    y_ND, grads = runs["forward+backward"]()

    def ours(params, x_ND):
        return module.merge(parts.definition, params, parts.stats)(x_ND).y_ND

    expected_ND, pull = jax.vjp(ours, parts.params, x_ND)
    dparams, dx_ND = pull(dy_ND)
    fc1, fc2 = dparams["experts"]["fc1"], dparams["experts"]["fc2"]
    expected = [dx_ND, dparams["router"]["kernel"].T]
    for e in range(5):
        expected += [fc1["kernel"][e].T, fc1["bias"][e], fc2["kernel"][e].T, fc2["bias"][e]]
    np.testing.assert_allclose(y_ND, expected_ND, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_floor_is_every_expert_on_its_share_in_order() -> None:
    sizes = LayerSizes(tokens=6, width=4, hidden=3, k=2, dtype="float32")
    case = TimedCase(bench_floor.NAME, 4, sizes)
    check([case])
    floor = moe_builder(case)(nnx.Rngs(0))
    x_ND, _ = tokens(sizes)
    x_ERD = np.tile(x_ND, (2, 1)).reshape(4, 3, 4)
    own = module.split(floor.experts).params
    y_ERD = [
        floor.experts.fn(jax.tree.map(lambda a, e=e: a[e], own), x_ERD[e], dense) for e in range(4)
    ]
    wanted = np.concatenate(y_ERD).reshape(2, 6, 4).sum(axis=0)
    np.testing.assert_allclose(floor(x_ND), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="5 experts must divide 6 tokens times 2"):
        check([case._replace(experts=5)])


def test_a_missing_peer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_peer, "find_spec", lambda name: None)
    arguments = MoEArguments(json=Path("a.json"), backends=("auto", "torch_loop"))
    with pytest.raises(UserError, match=r"pip install 'moezoo\[parity\]'"):
        cases_of(arguments)


def test_tokamax_is_a_peer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its product's form in the place of JAX's, the layer is the same."""
    arguments = MoEArguments(json=Path("a.json"), backends=("tokamax",), small_tokens=0)
    monkeypatch.setattr(tokamax_peer, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[tokamax\]'"):
        cases_of(arguments)
    package = SimpleNamespace(ragged_dot=jax.lax.ragged_dot)
    monkeypatch.setattr(tokamax_peer, "find_spec", lambda name: package)
    monkeypatch.setattr(tokamax_peer, "import_module", lambda name: package)
    assert len(cases_of(arguments)[0]) == 4
    x_ND, _ = tokens(SMALL_SIZES)
    ours, theirs = (
        moe_builder(TimedCase(name, 5, SMALL_SIZES))(nnx.Rngs(0)) for name in ("ragged", "tokamax")
    )
    np.testing.assert_array_equal(ours(x_ND).y_ND, theirs(x_ND).y_ND)


def test_gated_experts_beside_a_gated_network() -> None:
    """Three products an expert; peers and the floor have plain experts only."""
    arguments = MoEArguments(json=Path("a.json"), form="gated", backends=("products",))
    with pytest.raises(UserError, match="products has plain experts only: --form is gated"):
        cases_of(arguments)
    sizes = replace(SMALL_SIZES, form="gated")
    layer = moe_builder(TimedCase("reference", 3, sizes))(nnx.Rngs(0))
    assert module.split(layer).params["experts"].keys() == {"gate", "up", "down"}
    network = bench_floor.DENSE["gated"](
        sizes.width, 2 * sizes.hidden, dtype="float32", rngs=nnx.Rngs(0)
    )
    own = {name: a["kernel"][0] for name, a in module.split(network).params["only"].items()}
    x_ND, _ = tokens(sizes)
    wanted = (jax.nn.silu(x_ND @ own["gate"]) * (x_ND @ own["up"])) @ own["down"]
    np.testing.assert_allclose(network(x_ND), wanted, rtol=1e-5, atol=1e-6)


def test_sentences_say_what_more_experts_and_more_tokens_cost() -> None:
    row = TimedRow(
        "auto", 8, 2, 64, 4, 4, "float32", "forward", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 9, 3,
        "wall", 1.0, 2.0,
    )  # fmt: skip
    longer = row._replace(tokens=256, median_ms=5.0, temporary_bytes=None)
    growth = [Growth("auto", "forward", 2, 64, "float32", 8, 32, 1.25)]
    more_experts, more_tokens = bench_floor.lines([row, longer], growth)
    assert "E=8 to 32 takes 1.25 times" in more_experts
    assert "N=64 to 256 (4 times) takes 5.00 times" in more_tokens
    assert bench_floor.memory(row).endswith("(x 3.0)") and bench_floor.memory(longer) == ""


def test_every_case_runs_beside_the_base() -> None:
    order: list[str] = []
    run = {name: lambda name=name: order.append(name) for name in ("base", "a", "b")}
    *_, times = interleave(run["base"], {"a": run["a"], "b": run["b"]}, repeats=3)
    assert order[:3] == ["base", "a", "b"]  # once before anything is measured
    assert order[3:] == ["base", "a", "base", "b", "a", "base", "b", "base"] + order[3:7]
    assert times["a"].ratios.shape == (3,)
    np.testing.assert_allclose(times["b"].ratios, times["b"].case / times["b"].base)
