"""SMoRA's models: sizes of the paper, kinds, refusals."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.models.language.model import LanguageConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.nn import exploration, module
from moezoo.train.config_file import load
from tests.models.tiny import filled, quick_jit

DECODER = DecoderConfig(vocabulary=20, width=8, depth=1, heads=2, groups=1, hidden=6, length=16)
SMALL = SMoRAConfig(decoder=DECODER, ranks=8, active=2)
TEXT = {"lm": 20}
SIZE = (1, 16)


@pytest.mark.parametrize(
    ("name", "ranks", "routers"),
    [("text/smora_llama2_7b", 159.91, 72.88), ("text/smora_qwen25_7b", 161.48, 72.48)],
)
def test_sizes_of_the_paper(name: str, ranks: float, routers: float) -> None:
    """Millions of parameters of all seven kinds of linear layer, from shapes."""
    model = load(name).model
    depth = model.decoder.depth  # only layers have updates, and all have the same
    model = replace(model, decoder=replace(model.decoder, depth=1))
    parts = module.abstract(lambda: model.build({"lm": 300}, SIZE, nnx.Rngs(0)))
    flat = module.flatten(parts.params)
    own = depth * sum(leaf.size for path, leaf in flat.items() if "/router/" in path)
    assert own / 1e6 == pytest.approx(routers, abs=0.01)
    assert (depth * module.count(parts.params) - own) / 1e6 == pytest.approx(ranks, abs=0.01)
    frozen = [n for p, n in module.flatten(parts.stats).items() if not p.endswith("router/bias")]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smora", "lora", "rslora", "mixture"])
def test_kinds_read_rows(kind: str) -> None:
    config = replace(SMALL, update=kind, loras=4)
    parts = filled(lambda: config.build(TEXT, SIZE, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    rows = {
        "tokens": rng.integers(0, 20, (1, 6)),
        "segments": segments,
        "positions": np.array([[0, 1, 2, 0, 1, 0]]),
        "task": np.array([[3, 3, 3, 1, 1, 0]]),
    }
    rows = {name: jnp.asarray(value, jnp.int32) for name, value in rows.items()}

    def read(params, stats, rows):
        model = module.merge(parts.definition, params, stats)
        output = model.read(rows, train=True)
        plain = model(
            rows["tokens"], segments_BT=rows["segments"], positions_BT=rows["positions"]
        ).logits_BTV
        hidden = output.predictions["lm"]
        return hidden.x_BTD @ hidden.kernel_DV, plain, output.records

    logits, plain, records = quick_jit(read)(parts.params, parts.stats, rows)
    np.testing.assert_allclose(logits[:, :5], plain[:, :5], rtol=1e-5, atol=1e-5)
    assert bool(records) == (kind in ("smora", "mixture"))
    for record in records.values():
        np.testing.assert_array_equal(record.task_N, rows["task"].reshape(-1))
        np.testing.assert_array_equal(record.routing.mask_N, segments.reshape(-1) > 0)


def test_a_base_whose_every_parameter_is_trained() -> None:
    parts = module.abstract(lambda: LanguageConfig(DECODER).build(TEXT, SIZE, nnx.Rngs(0)))
    decoder = module.abstract(lambda: DECODER.build(nnx.Rngs(0)))
    assert set(module.flatten(parts.params)) == set(module.flatten(decoder.params))
    assert not parts.stats


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 0}, "ranks is 0"),
        ({"active": 9}, "9 active ranks of 8"),
        ({"block": 3}, "Blocks of 3"),
        ({"update": "mixture", "loras": 3}, "8 ranks cannot be split evenly among 3"),
        ({"update": "mixture", "loras": 4, "top_k": 5}, "Cannot choose 5 of 4"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ()}, "nothing would train"),
    ],
)
def test_impossible_sizes(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


@pytest.mark.slow
def test_refusals_when_built() -> None:
    with pytest.raises(UserError, match="fits no linear layer"):
        replace(SMALL, targets=("blocks/*",)).build(TEXT, SIZE, nnx.Rngs(0))
    for target in ("lm_head", "*"):
        with pytest.raises(UserError, match="lm_head, which cannot be adapted"):
            replace(SMALL, targets=(target,)).build(TEXT, SIZE, nnx.Rngs(0))
    with pytest.raises(UserError, match="tokenizer has 21 ids"):
        SMALL.build({"lm": 21}, SIZE, nnx.Rngs(0))
    with pytest.raises(UserError, match="one task"):
        SMALL.build({"semseg": 4}, SIZE, nnx.Rngs(0))


@pytest.mark.slow
def test_layers_in_a_loop_read_choose_and_learn_as_layers_written_out() -> None:
    deep = replace(DECODER, depth=3, remat=True)
    rows = {
        "tokens": jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 6)), jnp.int32),
        "segments": jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], jnp.int32),
        "positions": jnp.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]], jnp.int32),
        "task": jnp.zeros((2, 6), jnp.int32),
    }

    def results(layers: str):
        config = replace(SMALL, decoder=replace(deep, layers=layers), dropout=0.3)
        parts = filled(lambda: config.build(TEXT, SIZE, nnx.Rngs(0)))

        def loss(params):
            model = module.merge(parts.definition, params, parts.stats)
            output = model.read(rows, key=jax.random.key(1), train=True)
            chosen = exploration.choices(model, output.records)
            return jnp.sum(output.predictions["lm"].x_BTD ** 2), (chosen, output.records)

        # Optimised, as outside of tests: unoptimised code adds up in another order in a loop.
        options = {"xla_backend_optimization_level": 3}
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)
        return step(parts.params)

    wanted, found = results("unrolled"), results("scanned")
    assert len(wanted[0][1][0]) == 3 * 7
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), found, wanted)
