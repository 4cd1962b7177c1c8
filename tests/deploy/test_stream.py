"""Experts read from a file one by one: the resident model's values, whatever the model is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.deploy import pinned, stream
from moezoo.deploy.pinned import PINNED, PinnedRows, pinned_memory
from moezoo.deploy.segments import ExpertCall, effective_weights
from moezoo.errors import UserError
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module
from moezoo.nn.experts import GatedMLPExperts, MLPExperts
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops.capacity import by_probability, capacity, renormalised_after_dropping
from moezoo.ops.grouped import BACKENDS, by_name, reference
from moezoo.ops.routing import route
from moezoo.weights.rows import RowFile
from tests.backbones.test_decoder import random_parts
from tests.deploy.conftest import CONFIG, SIZE, build
from tests.models.tiny import filled, quick_jit

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


def images(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, *SIZE, 3)).astype(np.float32)


def both_ways(model: Any, file: Path, ask: Any, *given: Any) -> tuple[Any, Any, Any]:
    """What `ask(model, *given)` gives with all experts in memory, from the file, and the latter."""
    whole = module.split(model)
    opened = RowFile(stream.write(model, file))
    parts = module.split(stream.with_calls(stream.emptied(model, opened)))

    def run(definition: Any) -> Any:
        return lambda params, stats, *given: ask(module.merge(definition, params, stats), *given)

    streamed = stream.Streamed(run(parts.definition), opened)
    wanted = quick_jit(run(whole.definition))(whole.params, whole.stats, *given)
    found = streamed(parts.params, parts.stats, *given)
    return found, wanted, lambda *given: streamed(parts.params, parts.stats, *given)


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, **CLOSE)
        else:
            np.testing.assert_array_equal(one, other)  # routing is exact


VMOE = VMoEConfig(**SMALL, experts=4, capacity_factor=0.7, group_images=3, noise_std=0.0)
MOD_SQUAD = ModSquadConfig(
    **SMALL, head_experts=5, experts=6, top_k=2, head_channels=8, router_std=1.0
)


@pytest.mark.parametrize(
    ("config", "tasks"),
    [
        pytest.param(CONFIG, ("depth",), id="m3vit, one task"),
        pytest.param(CONFIG, None, id="m3vit, all tasks", marks=pytest.mark.slow),
        pytest.param(
            MOD_SQUAD, ("normals",), id="mod_squad, attention experts", marks=pytest.mark.slow
        ),
    ],
)
def test_a_models_values_and_routing(config: Any, tasks: Any, tmp_path: Path) -> None:
    model = build(config)
    found, wanted, _ = both_ways(
        model, tmp_path / "w.safetensors", lambda m, x: m(x, tasks=tasks), images()
    )
    assert wanted.records
    assert_same(found, wanted)


def test_capacity_drops_what_it_drops_in_memory(tmp_path: Path) -> None:
    parts = filled(lambda: VMOE.build({"scene": 3}, SIZE, nnx.Rngs(0)))
    model = module.merge(*parts)
    found, wanted, _ = both_ways(model, tmp_path / "w.safetensors", lambda m, x: m(x), images())
    assert any(int(record.dropped) > 0 for record in wanted.records.values())
    assert_same(found, wanted)


DECODER = DecoderConfig(
    vocabulary=19, width=12, depth=2, heads=4, groups=2, hidden=10, head_width=4,
    experts=ExpertsConfig(5, 3, 7, "softmax_then_top_k"), remat=True,
)  # fmt: skip
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7)


def test_a_decoder_with_gated_experts_and_rematerialised_layers(tmp_path: Path) -> None:
    model = module.merge(*random_parts(DECODER))
    file = tmp_path / "w.safetensors"
    found, wanted, _ = both_ways(model, file, lambda m, x: m(x).logits_BTV, TOKENS)
    assert_same(found, wanted)


def test_a_compiled_loop_over_layers_is_refused(tmp_path: Path) -> None:
    model = module.merge(*random_parts(replace(DECODER, layers="scanned", remat=False)))
    with pytest.raises(UserError, match="inside of a compiled 'scan'.*--model.layers unrolled"):
        both_ways(model, tmp_path / "w.safetensors", lambda m, x: m(x).logits_BTV, TOKENS)


def layer_of(
    experts: int, k: int, apply: Any = reference, dtype: Any = jnp.float32, kind: Any = MLPExperts
) -> MoE:
    def make() -> MoE:
        rngs = nnx.Rngs(0)
        router = LinearRouter(8, experts, k=k, rngs=rngs)
        return MoE(router, kind(experts, 8, 12, dtype=dtype, rngs=rngs), apply)

    return module.merge(*filled(lambda: nnx.Dict(moe=make())))["moe"]


class Layer(nnx.Module):
    """A MoE layer by itself, as a model."""

    def __init__(self, moe: MoE):
        self.moe = moe

    def __call__(self, x_ND: Any, mask_N: Any) -> Any:
        return self.moe(x_ND, mask_N=mask_N)


@given(
    tokens=st.integers(1, 70),
    experts=st.integers(1, 6),
    data=st.data(),
)
def test_any_shape_of_a_layer(
    tokens: int, experts: int, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    k = data.draw(st.one_of(st.just(experts), st.integers(1, experts)), "k")
    kind = data.draw(st.sampled_from([MLPExperts, GatedMLPExperts]), "kind")
    padded = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens), "padding")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    x_ND = rng.normal(size=(tokens, 8)).astype(np.float32)
    if data.draw(st.booleans(), "alike"):
        x_ND[:] = x_ND[:1]  # every token to the same experts: the others are empty
    x_ND[padded] = np.nan
    model = Layer(layer_of(experts, k, kind=kind))
    file = tmp_path_factory.mktemp("layer") / "w.safetensors"
    found, wanted, _ = both_ways(model, file, lambda m, *given: m(*given), x_ND, ~np.array(padded))
    assert np.isfinite(wanted.y_ND).all()
    assert_same(found, wanted)


def test_experts_in_bfloat16_that_are_stored_in_float32(tmp_path: Path) -> None:
    model = Layer(layer_of(3, 2, dtype=jnp.bfloat16))
    x_ND = jax.random.normal(jax.random.key(0), (20, 8))
    mask_N = jnp.ones(20, bool)
    found, wanted, _ = both_ways(
        model, tmp_path / "w.safetensors", lambda m, *given: m(*given), x_ND, mask_N
    )
    assert_same(found, wanted)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"kernels", "fused"}))  # need a GPU
def test_only_backends_that_drop_are_asked_what_they_drop(name: str) -> None:
    routing = route(jax.random.normal(jax.random.key(0), (12, 3)), k=2)
    traced = jax.make_jaxpr(lambda r: effective_weights(by_name(name), r, 3))(routing).jaxpr
    assert (traced.outvars[0] in traced.invars) == (name != "capacity")


def test_weights_after_dropping_are_the_backends() -> None:
    backend = capacity(0.6, priority=by_probability, reweigh=renormalised_after_dropping)
    routing = route(jax.random.normal(jax.random.key(0), (12, 3)), k=2)
    weights_NK, dropped = quick_jit(lambda r: effective_weights(backend, r, 3))(routing)
    x_ND = jax.random.normal(jax.random.key(1), (12, 8))
    experts = layer_of(3, 2).experts
    wanted = quick_jit(lambda x, r: backend(experts.fn, experts.stacked(), x, r))(x_ND, routing)
    found = reference(experts.fn, experts.stacked(), x_ND, routing._replace(weights_NK=weights_NK))
    np.testing.assert_allclose(found.y_ND, wanted.y_ND, **CLOSE)
    assert int(dropped) == int(wanted.dropped) > 0


@given(st.integers(1, 3000))
def test_blocks_cover_a_queue_and_little_else(rows: int) -> None:
    blocks = stream.blocks_of(rows)
    assert [first for first, _ in blocks] == list(
        np.cumsum([0, *(size for _, size in blocks[:-1])])
    )
    covered = sum(size for _, size in blocks)
    assert rows <= covered <= max(rows * 1.5, stream.BLOCKS[0])
    assert {size for _, size in blocks} <= set(stream.BLOCKS)


@pytest.fixture(scope="module")
def model() -> Any:
    return build(CONFIG)


def test_a_tasks_predictions_and_another_task_reads_the_same_experts(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    own = RowFile.read
    monkeypatch.setattr(
        RowFile, "read", lambda self, name, *rest: (read.append(name), own(self, name, *rest))[1]
    )
    ask = stream.streamed(model, stream.write(model, tmp_path / "w.safetensors"))
    seen = []
    for task in ("semseg", "depth"):
        read.clear()
        found = np.asarray(ask(images(), task))
        wanted = quick_jit(lambda x, task=task: model(x, tasks=(task,)).predictions[task])(images())
        np.testing.assert_allclose(found, wanted, **CLOSE)
        seen.append(set(read))
    assert seen[0] == seen[1] and all("/experts/" in name for name in seen[0])


def test_experts_in_pinned_memory_are_read_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's own pinned memory: the same predictions, and no second look at the file."""
    if pinned_memory(jax.local_devices()[0]) is None:
        pytest.skip("this version of JAX gives a CPU no pinned memory")
    read: list[Any] = []
    own = RowFile.read
    monkeypatch.setattr(
        RowFile, "read", lambda self, *given: (read.append(given[:2]), own(self, *given))[1]
    )
    file = stream.write(model, tmp_path / "w.safetensors")
    plain, held = stream.streamed(model, file), stream.streamed(model, file, place="pinned_host")
    calls = [(images(), "semseg"), (images(8), "depth")]
    wanted = [np.asarray(plain(*call)) for call in calls]
    read.clear()
    for _ in range(2):
        for call, one in zip(calls, wanted, strict=True):
            np.testing.assert_array_equal(held(*call), one)
    assert read and len(read) == len(set(read))


class OtherPlatform:
    """A device whose host has memory of these kinds."""

    def __init__(self, *kinds: str):
        self.kinds = kinds

    def addressable_memories(self) -> list[Any]:
        return [SimpleNamespace(kind=kind) for kind in self.kinds]


def test_without_pinned_memory_experts_come_from_the_file(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Any = OtherPlatform("device", "unpinned_host")
    assert pinned_memory(other) is None
    file = stream.write(model, tmp_path / "w.safetensors")
    wanted = np.asarray(stream.streamed(model, file)(images(), "depth"))
    monkeypatch.setattr(pinned, "pinned_memory", lambda device: pinned_memory(other))
    np.testing.assert_array_equal(
        stream.streamed(model, file, place="pinned_host")(images(), "depth"), wanted
    )


def test_places_that_are_none_are_refused(model: Any, tmp_path: Path) -> None:
    file, nowhere = stream.write(model, tmp_path / "w.safetensors"), "device"
    with pytest.raises(UserError, match="Unknown place of experts 'device'.*pinned_host"):
        stream.streamed(model, file, place=nowhere)  # type: ignore[arg-type]


def test_rows_on_the_device_are_copies(tmp_path: Path) -> None:
    """Deleting what an expert was computed with leaves what is held."""
    memory = pinned_memory(jax.local_devices()[0])
    if memory is None:
        pytest.skip("this version of JAX gives a CPU no pinned memory")
    file = RowFile(stream.write(Layer(layer_of(3, 3)), tmp_path / "w.safetensors"))
    name = next(n for n in sorted(file.tensors.entries) if n.endswith("experts/fc1/kernel"))
    rows, wanted = PinnedRows(file, memory), np.empty(file.form(name).shape, np.float32)
    for row in (0, 2, 0):
        (found,) = rows.on_device([name], row)
        file.read(name, row, wanted)
        np.testing.assert_array_equal(found, wanted)
        assert found.sharding.memory_kind != PINNED
        found.delete()
    assert {a.sharding.memory_kind for a in rows._held.values()} == {PINNED}
    assert len(rows._held) == 2


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def written_over(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-64, os.SEEK_END)
        opened.write(bytes(64))
    os.utime(file, ns=(0, 0))  # later than the last write, however coarse the clock is


@pytest.mark.parametrize("change", [cut_short, written_over])
def test_a_file_that_changes_while_it_is_open(change: Any, tmp_path: Path) -> None:
    layer, x_ND, mask_N = Layer(layer_of(3, 3)), np.ones((4, 8), np.float32), np.ones(4, bool)
    file = tmp_path / "w.safetensors"
    *_, again = both_ways(layer, file, lambda m, *given: m(*given), x_ND, mask_N)
    change(file)
    with pytest.raises(UserError, match=f"{file} was changed while a model was reading it"):
        again(x_ND, mask_N)


def test_files_of_another_model_are_refused_by_name(model: Any, tmp_path: Path) -> None:
    file = stream.write(Layer(layer_of(3, 3)), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="is of another model: it has no params/"):
        stream.streamed(model, file)
    with pytest.raises(UserError, match=r"experts/fc1/bias is \(3, 12\), not \(4, 12\)"):
        stream.streamed(Layer(layer_of(4, 3)), file)
    cut_short(file)
    with pytest.raises(UserError, match="is truncated or no safetensors file"):
        stream.streamed(model, file)
    with pytest.raises(UserError, match="There is no .*gone"):
        stream.streamed(model, tmp_path / "gone.safetensors")


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    dense = ViTDenseConfig(**SMALL, head_channels=8)
    with pytest.raises(UserError, match="has no MoE layer: nothing can be streamed"):
        stream.with_calls(build(dense))
    layer = Layer(layer_of(3, 3))
    x_ND, mask_N = np.ones((4, 8), np.float32), np.ones(4, bool)

    def nosy(m: Any, *given: Any) -> Any:
        return m(*given).y_ND + jnp.sum(m.moe.experts.fc1.bias.get_value())

    with pytest.raises(UserError, match="params/moe/experts/fc1/bias is read by more than its exp"):
        both_ways(layer, tmp_path / "a.safetensors", nosy, x_ND, mask_N)
    with pytest.raises(UserError, match="applies no stacked experts"):
        both_ways(layer, tmp_path / "b.safetensors", lambda m, x, mask: x, x_ND, mask_N)
    *_, again = both_ways(layer, tmp_path / "c.safetensors", lambda m, *g: m(*g), x_ND, mask_N)
    with pytest.raises(UserError, match="ask it outside of compiled functions"):
        jax.jit(again)(x_ND, mask_N)


def test_experts_that_are_changed_before_use_are_refused(tmp_path: Path) -> None:
    class Halved(MLPExperts):
        def stacked(self) -> Any:
            return jax.tree.map(lambda a: a / 2, super().stacked())

    model = Layer(layer_of(3, 3, kind=Halved))
    x_ND, mask_N = np.ones((4, 8), np.float32), np.ones(4, bool)
    with pytest.raises(UserError, match="experts of moe go through 'div' before they are applied"):
        both_ways(model, tmp_path / "w.safetensors", lambda m, *g: m(*g), x_ND, mask_N)


def test_calls_are_part_of_equal_definitions() -> None:
    assert ExpertCall("moe", reference) == ExpertCall("moe", reference)
