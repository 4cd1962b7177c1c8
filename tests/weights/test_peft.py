"""Adapter folders: written, read back, and refused in one sentence where they cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.errors import UserError
from moezoo.models.cpoly.model import CPolyConfig
from moezoo.models.mocle.model import MoCLEConfig
from moezoo.models.polytropon.model import PolyConfig
from moezoo.nn import module
from moezoo.nn.injection import inject
from moezoo.nn.latent_attention import LatentConfig
from moezoo.nn.lowrank import LowRank, lora, rank_experts
from moezoo.weights import peft
from moezoo.weights.tensor_file import Planned, TensorFile, write
from tests.models.tiny import filled, quick_jit

TINY = DecoderConfig(vocabulary=11, width=8, depth=1, heads=2, groups=1, hidden=6)
TOKENS = jnp.asarray([[3, 1, 4, 1, 5]])


def plain(inputs: int, outputs: int) -> LowRank:
    ranks = 2 if outputs == 6 else 3  # not all layers alike
    return lora(inputs, outputs, ranks, alpha=5.0, rngs=nnx.Rngs(0))


def routed(inputs: int, outputs: int) -> LowRank:
    return rank_experts(inputs, outputs, 4, active=2, alpha=4.0, rngs=nnx.Rngs(0))


def build(make: Any = None) -> Any:
    model = TINY.build(nnx.Rngs(0))
    if make is not None:
        inject(model, ["layers/*"], make)
    return model


def adapted(make: Any) -> Any:
    return module.merge(*filled(lambda: build(make)))


def base_of(model: Any) -> Any:
    """The same base without updates."""
    params = module.flatten(module.split(model).params)
    parts = module.abstract(build)
    flat = {p: params.get(p, params.get(_inside(p))) for p in module.flatten(parts.params)}
    return module.merge(parts.definition, module.unflatten(flat), {})


def _inside(path: str) -> str:
    return path.replace("/kernel", "/base/kernel")


def logits(model: Any) -> np.ndarray:
    parts = module.split(model)

    def forward(params, stats):
        return module.merge(parts.definition, params, stats)(TOKENS).logits_BTV

    return np.asarray(quick_jit(forward)(parts.params, parts.stats))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, model = tmp_path_factory.mktemp("peft") / "adapter", adapted(plain)
    peft.save(folder, model, "somebody/base")
    return folder, model


def test_round_trip(written) -> None:
    folder, model = written
    base = base_of(model)
    adapter = peft.read(folder, base)
    assert adapter.config["base_model_name_or_path"] == "somebody/base"
    assert adapter.config["peft_type"] == "LORA"
    before = logits(base)
    peft.attach(base, adapter)
    np.testing.assert_allclose(logits(base), logits(model), rtol=1e-5, atol=1e-6)
    assert not np.allclose(before, logits(base))


def test_the_stacked_form_keeps_routers(tmp_path: Path) -> None:
    model = adapted(routed)
    peft.save(tmp_path / "s", model)
    adapter = peft.read(tmp_path / "s", base_of(model))
    assert adapter.config["peft_type"] == "MOEZOO_STACKED"
    own = model.layers[0].attn.q.update
    found = adapter.layers["layers/0/attn/q"]
    np.testing.assert_array_equal(found.down, own.down.get_value())
    np.testing.assert_array_equal(found.router["kernel"], own.router.kernel.get_value())
    np.testing.assert_array_equal(found.router["bias"], own.router.bias.get_value())
    assert found.scale == own.scale
    with pytest.raises(UserError, match="routers"):
        peft.attach(build(), adapter)


def with_arrays(folder: Path, change: Any) -> Path:
    """The folder with other arrays."""
    file = TensorFile(folder / peft.ARRAYS)
    arrays = {name: file.read(name, np.array) for name in file.entries}
    change(arrays)
    write(
        folder / peft.ARRAYS,
        {n: Planned(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()},
    )
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ONE = np.ones(8, np.float32)
ODD = {
    "half of a pair": (
        lambda a: a.pop(f"{Q}.lora_B.weight"),
        r"q_proj\.lora_A\.weight without its lora_B\.weight: it is not whole",
    ),
    "the other half": (
        lambda a: a.pop(f"{Q}.lora_A.weight"),
        r"q_proj\.lora_B\.weight without its lora_A\.weight: it is not whole",
    ),
    "DoRA": (
        lambda a: a.update({f"{Q}.lora_magnitude_vector": ONE}),
        "an array of DoRA, which is more than plain LoRA; merge it",
    ),
    "DoRA as newer versions write it": (
        lambda a: a.update({f"{Q}.lora_magnitude_vector.weight": ONE}),
        "an array of DoRA, which is more than plain LoRA; merge it",
    ),
    "an embedding": (
        lambda a: a.update({"base_model.model.model.embed_tokens.lora_embedding_A": ONE}),
        "an update of an embedding, which is more than plain LoRA",
    ),
    "a router": (
        lambda a: a.update({f"{Q}.router.kernel": np.ones((8, 1), np.float32)}),
        "holds a router of layers/0/attn/q, but adapter_config.json says LORA",
    ),
    "a router's other array": (
        lambda a: a.update({f"{Q}.router.evil": ONE}),
        "and of routers kernel and bias alone can be read",
    ),
    "nothing": (lambda a: a.clear() or a.update(x=ONE), "for which this model has no layer"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_wrong_with_arrays_is_said(written, tmp_path: Path, name: str) -> None:
    change, said = ODD[name]
    own = with_arrays(changed(written[0], tmp_path), change)
    with pytest.raises(UserError, match=said) as error:
        peft.read(own, base_of(written[1]))
    assert ("another base" in str(error.value)) == (name == "nothing")


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update({f"{Q}.router.kernel": np.ones((8, 3), np.float32)}),
        lambda a: a.update({f"{Q}.router.kernel": np.ones((7, 4), np.float32)}),
        lambda a: a.update({f"{Q}.router.bias": np.ones(3, np.float32)}),
        lambda a: a.pop(f"{Q}.router.kernel"),
    ],
)
def test_routers_that_do_not_fit_are_refused(tmp_path: Path, change: Any) -> None:
    model = adapted(routed)
    peft.save(tmp_path / "s", model)
    with pytest.raises(UserError, match="router of layers/0/attn/q that does not fit"):
        peft.read(with_arrays(tmp_path / "s", change), base_of(model))


def test_the_stacked_form_names_its_system(tmp_path: Path) -> None:
    model, told = adapted(routed), {"name": "SMoRAConfig", "gate": "published"}
    peft.save(tmp_path / "s", model, system=told)
    assert peft.read(tmp_path / "s", base_of(model)).config["system"] == told
    peft.save(tmp_path / "plain", adapted(plain), system=told)  # which PEFT reads
    assert "system" not in json.loads((tmp_path / "plain" / peft.CONFIG).read_text())


@pytest.mark.parametrize(
    "config",
    [
        MoCLEConfig(decoder=TINY, cluster_width=4, rank=2),
        PolyConfig(decoder=TINY, rank=2, heads=2),
        PolyConfig(decoder=TINY, rank=2, trained="skills"),
        CPolyConfig(decoder=TINY, rank=2),
    ],
)
def test_routers_that_have_no_form_are_refused(tmp_path: Path, config: Any) -> None:
    targets = ("layers/*/attn/q",)
    model = replace(config, targets=targets).build({"lm": 11}, (1, 1), nnx.Rngs(0))
    with pytest.raises(UserError, match="no form for: write a whole decoder .*--merge.*--task"):
        peft.save(tmp_path / "x", model)
    assert not list(tmp_path.iterdir())


def changed(folder: Path, tmp_path: Path, **values: Any) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / peft.ARRAYS).write_bytes((folder / peft.ARRAYS).read_bytes())
    config = json.loads((folder / peft.CONFIG).read_text()) | values
    (copy / peft.CONFIG).write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_alpha": None, "alpha_pattern": {}}, "lora_alpha is None, it must be a number"),
    ],
)
def test_adapters_that_are_more_than_lora(written, tmp_path: Path, values, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft.read(changed(written[0], tmp_path, **values), base_of(written[1]))


def test_scale_of_rs_lora(written, tmp_path: Path) -> None:
    folder, model = written
    config = json.loads((folder / peft.CONFIG).read_text())
    read = peft.read(changed(folder, tmp_path, use_rslora=True), base_of(model))
    for path, factors in peft.read(folder, base_of(model)).layers.items():
        root = np.sqrt(factors.down.shape[1])
        assert read.layers[path].scale == pytest.approx(factors.scale * root)
    assert config["rank_pattern"], "layers of another rank are listed"


def test_patterns_are_regular_expressions(written, tmp_path: Path) -> None:
    folder, model = written
    given = {r"layers\.0\.self_attn\.[qk]_proj": 1.0, "up_proj": 2.0, "proj": 3.0, "attn.v_": 4.0}
    own = changed(folder, tmp_path, lora_alpha=8.0, alpha_pattern=given)
    scaled = peft.read(own, base_of(model)).layers
    alphas = {path: factors.scale * factors.down.shape[1] for path, factors in scaled.items()}
    wanted = {path: 8.0 for path in alphas} | {
        "layers/0/attn/q": 1.0, "layers/0/attn/k": 1.0, "layers/0/mlp/up": 2.0
    }  # fmt: skip
    assert alphas == pytest.approx(wanted)


def test_a_pattern_that_is_none(written, tmp_path: Path) -> None:
    own = changed(written[0], tmp_path, alpha_pattern={"layers.(0": 1.0})
    with pytest.raises(UserError, match="no regular expression"):
        peft.read(own, base_of(written[1]))


def test_another_base(written, tmp_path: Path) -> None:
    folder, _ = written
    wider = DecoderConfig(vocabulary=11, width=16, depth=1, heads=2, groups=1, hidden=6)
    with pytest.raises(UserError, match="is 16 x 16: the adapter was made for another base"):
        peft.read(folder, wider.build(nnx.Rngs(0)))
    other = {"base_model_name_or_path": "somebody/deeper"}
    deeper = DecoderConfig(vocabulary=11, width=8, depth=2, heads=2, groups=1, hidden=6)
    model = module.merge(*module.split(deeper.build(nnx.Rngs(0))))
    inject(model, ["layers/*"], plain)
    peft.save(tmp_path / "deep", model)
    with pytest.raises(UserError, match=r"layers\.1.*another base \(somebody/deeper\)"):
        peft.read(changed(tmp_path / "deep", tmp_path, **other), build())


def test_folders_that_cannot_be_used(written, tmp_path: Path) -> None:
    folder, model = written
    with pytest.raises(UserError, match="There is no .*adapter_config"):
        peft.read(tmp_path, build())
    with pytest.raises(UserError, match="exists already"):
        peft.save(folder, model)
    with pytest.raises(UserError, match="has updates already"):
        peft.read(folder, model)
    with pytest.raises(UserError, match="no adapted layer"):
        peft.save(tmp_path / "x", build())
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="Could not write"):
        peft.save(blocked / "adapter", model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_shared_expert_is_adapted_under_its_name(tmp_path: Path) -> None:
    config = replace(TINY, experts=ExpertsConfig(3, 2, 4, shared=5))

    def sparse() -> Any:
        return config.build(nnx.Rngs(0))

    model = sparse()
    inject(model, ["layers/*/mlp/*"], plain)
    peft.save(tmp_path / "adapter", model)
    told = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    shared = "model.layers.0.mlp.shared_expert"
    assert told == [f"{shared}.{part}_proj" for part in ("down", "gate", "up")] + [f"{shared}_gate"]
    assert sorted(peft.read(tmp_path / "adapter", sparse()).layers) == [
        *(f"layers/0/mlp/shared/mlp/{part}" for part in ("down", "gate", "up")),
        "layers/0/mlp/shared/weight",
    ]


def test_latent_attention_and_a_plain_shared_expert_are_adapted_under_their_names(
    tmp_path: Path,
) -> None:
    experts = ExpertsConfig(3, 2, 4, shared=5, shared_weight="one")
    config = replace(TINY, experts=experts, head_width=None, latent=LatentConfig(3, 4, 2, 4, 2))

    def deepseek() -> Any:
        return config.build(nnx.Rngs(0))

    model = deepseek()
    inject(model, ["layers/*/attn/*", "layers/*/mlp/shared/*"], plain)
    peft.save(tmp_path / "adapter", model)
    told = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    layer = "model.layers.0"
    parts = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")
    wanted = [f"{layer}.mlp.shared_experts.{part}_proj" for part in ("down", "gate", "up")]
    assert sorted(told) == sorted([*wanted, *(f"{layer}.self_attn.{part}" for part in parts)])
    assert len(peft.read(tmp_path / "adapter", deepseek()).layers) == 8
