"""LoRA, Poly and Arrow on a tiny Llama: PEFT's own classes, and ours over its folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.domains.text.library import member_of_peft
from moezoo.nn import module, surgery
from moezoo.nn.context import NO_TASK, Context
from moezoo.nn.injection import inject
from moezoo.nn.skill_tables import skill_mixture
from moezoo.weights import hf, library_bank
from moezoo.weights.library import BaseModel, Library, create
from tests.weights.libraries import sha

torch = pytest.importorskip("torch", reason="the extra 'parity' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'parity' is not installed")
theirs = pytest.importorskip("peft", reason="the extra 'parity' is not installed")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 6))
TARGETS = ["q_proj", "v_proj", "down_proj"]
PATHS = ("layers/*/attn/q", "layers/*/attn/v", "layers/*/mlp/down")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("llama") / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs that PEFT wrote."""
    folder, found = tmp_path_factory.mktemp("adapters"), []
    for number in range(3):
        torch.manual_seed(number + 1)
        options = theirs.LoraConfig(
            r=2, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM",
            init_lora_weights=False,
        )  # fmt: skip
        theirs.get_peft_model(their_base(llama), options).save_pretrained(folder / f"a{number}")
        found.append(folder / f"a{number}")
    return found


@pytest.fixture(scope="module")
def held(llama: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A library of them."""
    ours: Any = our_base(llama)

    class Base:
        name, model = "base", ours

    members = [member_of_peft(folder, Base, [], None) for folder in adapters]  # type: ignore[arg-type]
    out = tmp_path_factory.mktemp("library") / "lib"
    return create(out, BaseModel("base", sha(ours)), members)


def their_base(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def our_base(folder: Path) -> Any:
    return module.merge(*hf.load(folder).parts)


def their_logits(model: Any, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS), **options).logits.numpy()


def our_logits(model: Any, context: Context = NO_TASK) -> np.ndarray:
    return np.asarray(model(jnp.asarray(TOKENS, jnp.int32), context=context).logits_BTV)


@pytest.mark.slow
def test_lora_and_rows_of_several_adapters(
    llama: Path, adapters: list[Path], held: Library
) -> None:
    model = theirs.PeftModel.from_pretrained(their_base(llama), adapters[0], adapter_name="a0")
    for folder in adapters[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    for name in held.names:
        model.set_adapter(name)
        ours = our_base(llama)
        library_bank.attach_merged(ours, held, {name: 1.0})
        np.testing.assert_allclose(our_logits(ours), their_logits(model), **CLOSE)
    names = ["a2", "a0", "__base__"]
    shares = jnp.asarray([[0, 0, 1], [1, 0, 0], [0, 0, 0]], jnp.float32)
    bank = our_base(llama)
    library_bank.attach_bank(bank, held, held.names, library_bank.shares_routers(held.names))
    wanted = their_logits(model, adapter_names=names)
    np.testing.assert_allclose(our_logits(bank, Context(attributes_RA=shares)), wanted, **CLOSE)


@pytest.mark.slow
def test_arrow_of_peft(llama: Path, adapters: list[Path], held: Library) -> None:
    from peft.tuners.lora.arrow import create_arrow_model

    config = theirs.ArrowConfig(top_k=2, router_temperature=1.0)
    model = create_arrow_model(their_base(llama), [str(p) for p in adapters], config)
    ours = our_base(llama)
    make = library_bank.prototype_routers(held, held.names, 2)
    library_bank.attach_bank(ours, held, held.names, make, "outputs")
    wanted = their_logits(model)
    # Their prototypes are 15 power iterations, so ours give way to them here: what is compared is
    # routing and combination, and that their updates make these vectors nearly as long as ours.
    for path, own in surgery.find(ours, library_bank.PrototypeRouter).items():
        layer = dict(model.named_modules())[
            f"base_model.model.{_theirs(path)}.lora_arrow.arrow_router"
        ]
        got, exact_ED = layer.prototypes.numpy(), np.asarray(own.prototypes.get_value())
        for name, rough_D, exact_D in zip(held.names, got, exact_ED, strict=True):
            factors = held.factors(name)[path.removesuffix("/update/router")]
            delta = factors.down @ factors.up
            longest = np.linalg.norm(exact_D @ delta)
            assert 0.99 * longest < np.linalg.norm(rough_D @ delta) <= longest * 1.0001
        own.prototypes.set_value(jnp.asarray(got))
    np.testing.assert_allclose(our_logits(ours), wanted, **CLOSE)


def _theirs(path: str) -> str:
    """PEFT's name of the layer that a router stands on."""
    _, number, part, kind, *_ = path.split("/")
    return f"model.layers.{number}.{'self_attn' if part == 'attn' else 'mlp'}.{kind}_proj"


@pytest.mark.slow
def test_poly_of_peft(llama: Path) -> None:
    torch.manual_seed(5)
    options = theirs.PolyConfig(
        r=2, n_tasks=3, n_skills=2, n_splits=2, target_modules=TARGETS, task_type="CAUSAL_LM",
        init_weights=False,
    )  # fmt: skip
    model = theirs.get_peft_model(their_base(llama), options)
    task_ids = torch.tensor([2, 0, 1])
    wanted = their_logits(model, task_ids=task_ids)
    ours, rngs = our_base(llama), nnx.Rngs(0)

    def make(inputs: int, outputs: int) -> Any:
        return skill_mixture(inputs, outputs, 2, tasks=3, skills=2, heads=2, alpha=1.0, rngs=rngs)

    layers = dict(model.named_modules())
    for path in inject(ours, PATHS, make):
        layer = layers[f"base_model.model.{_theirs(path)}"]
        a_SEdr = layer.poly_lora_A["default"].detach().numpy()
        b_SEro = layer.poly_lora_B["default"].detach().numpy()
        s, e, d, r = a_SEdr.shape
        update = surgery.get(ours, path).update
        # Heads are parts of the inputs and of the outputs, skills blocks of ranks.
        a_DR = a_SEdr.transpose(0, 2, 1, 3).reshape(s * d, e * r)
        b_RO = b_SEro.transpose(1, 2, 0, 3).reshape(e * r, -1)
        update.down.set_value(jnp.asarray(a_DR))
        update.up.set_value(jnp.asarray(b_RO))
        logits = layer.poly_router["default"].module_logits.detach().numpy()
        update.router.kernel.set_value(jnp.asarray(logits))
    np.testing.assert_allclose(our_logits(ours, Context(jnp.asarray([2, 0, 1]))), wanted, **CLOSE)
