"""MeteoRA begins with a library's LoRAs: which stands where, that gates alone train, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.domains.text.domain import TextDataConfig
from moezoo.errors import UserError
from moezoo.models.meteora.model import MeteoRAConfig
from moezoo.nn import module, surgery
from moezoo.nn.context import NO_TASK
from moezoo.nn.injection import Adapted
from moezoo.nn.upcycle import Carried
from moezoo.train import start
from moezoo.weights.library import BaseModel, Library, add, create, remove
from tests.weights import libraries

TASKS = ("t2", "t0")  # t1's member stands behind


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return libraries.library(tmp_path_factory.mktemp("library") / "lib")


def configured(held: Library, **changes: Any) -> MeteoRAConfig:
    told: dict[str, Any] = {"loras": 3, "rank": 2, "alpha": 1.0, "library": str(held.folder)}
    return MeteoRAConfig(decoder=libraries.CONFIG, **told | changes)


def begun(config: MeteoRAConfig, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A fresh model's definition, and its state over the library's base."""
    parts = module.create(lambda: config.build({"lm": 20}, (1, 16), nnx.Rngs(0)))
    base = module.split(libraries.decoder(seed))
    own = module.flatten(base.params) | module.flatten(base.stats)
    found = {
        path: own.get(path.replace("/base/", "/"), array)
        for path, array in module.flatten(parts.stats).items()
    }
    stats = module.unflatten({path: jnp.asarray(a) for path, a in found.items()})
    return parts.definition, {"params": parts.params, "stats": stats}


def checked(config: MeteoRAConfig, path: str | None, only: tuple[str, ...]) -> None:
    data: Any = TextDataConfig(only=only)
    start.check_bank(SimpleNamespace(model=config, data=data), path)  # type: ignore[arg-type]


def test_loras_stand_at_their_tasks_and_gates_alone_train(held: Library) -> None:
    config = configured(held)
    definition, state = begun(config)
    assert all(path.endswith("/router/kernel") for path in module.flatten(state["params"]))
    run: Any = SimpleNamespace(model=config)  # what `completed` asks of a configuration
    after = start.completed(run, state, TASKS)
    model = module.merge(definition, after["params"], after["stats"])
    layer: Any = surgery.find(model, Adapted)["layers/0/mlp/up"]
    members = [held.factors(name)["layers/0/mlp/up"] for name in ("a2", "a0", "a1")]
    x_ND = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    gates = x_ND @ np.asarray(layer.update.router.kernel.get_value())
    found = np.asarray(layer.update(jnp.asarray(x_ND), NO_TASK)[0])
    for n, x in enumerate(x_ND):
        best = np.argsort(-gates[n])[:2]
        weights = np.exp(gates[n][best]) / np.exp(gates[n][best]).sum()
        kept = [(w, members[e]) for w, e in zip(weights, best, strict=True)]
        wanted = sum(0.5 * w * x @ m.down @ m.up for w, m in kept)
        np.testing.assert_allclose(found[n], wanted, rtol=1e-4, atol=1e-5)
    assert start.completed(SimpleNamespace(model=replace(config, library=None)), state, ()) is state  # type: ignore[arg-type]


def instructed(folder: Path, *tasks: str) -> Library:
    """A library with a LoRA of each of these generated tasks."""
    base = BaseModel("tiny", libraries.sha(libraries.decoder()))
    members = [libraries.member(f"a_{task}", i, tasks=(task,)) for i, task in enumerate(tasks)]
    return create(folder / "instructed", base, members)


def test_data_with_a_task_that_has_no_member_are_refused_before_training(tmp_path: Path) -> None:
    library = instructed(tmp_path, "sort", "double")
    config = configured(library, loras=2)
    checked(config, "base", ("sort", "double"))
    with pytest.raises(UserError, match="no member for reverse: .* with --data.only double sort"):
        checked(config, "base", ("reverse", "sort", "double"))
    with pytest.raises(UserError, match="no member for reverse: add one; it has members for a_"):
        checked(config, "base", ("reverse",))


def test_what_the_library_gives_is_not_told_as_fresh() -> None:
    fresh = ("l/q/update/down", "l/q/update/up", "l/q/update/router/kernel")
    carried = Carried(dict.fromkeys((*fresh, "l/q/base/kernel"), 0), fresh, ())
    said = start.summary("there", carried, "lib")
    assert "1 of 4 arrays taken over; 2 come from the library lib; fresh are 1 of low-rank" in said
    assert "fresh are 3 of low-rank" in start.summary("there", carried)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loras": 3}, "loras is 3, but the library .* has 2 members"),
        ({"rank": 1}, "rank is 1, but the library .* has rank 2"),
        ({"alpha": 2.0}, "has scale 0.5 in .*: take alpha 1"),
        ({"library": "nowhere"}, "nowhere"),
    ],
)
def test_banks_that_are_not_the_library_s_are_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    library = instructed(tmp_path, "sort", "double")
    with pytest.raises(UserError, match=says):
        checked(configured(library, **{"loras": 2} | changes), "base", ("sort", "double"))


def test_what_has_no_place_is_refused_by_name(held: Library, tmp_path: Path) -> None:
    config = configured(held)
    with pytest.raises(UserError, match="name it by --start-from"):
        checked(config, None, ())

    def further(config: MeteoRAConfig, tasks: tuple[str, ...], seed: int = 0) -> None:
        _, state = begun(config, seed)
        start.completed(SimpleNamespace(model=config), state, tasks)  # type: ignore[arg-type]

    with pytest.raises(UserError, match="trained on tiny, whose arrays are others"):
        further(config, TASKS, seed=1)
    with pytest.raises(UserError, match="model.targets leaves out layers/0/mlp"):
        further(replace(config, targets=("layers/*/attn/*",)), TASKS)
    with pytest.raises(UserError, match="has no member for t7: add one; it has members for a0, a1"):
        further(config, ("t7",))
    more = libraries.library(tmp_path / "more")
    more = add(more, [libraries.member("b", 9, tasks=("t1", "t2"))])
    with pytest.raises(UserError, match=r"has 2 members for t1 \(a1, b\), but .* remove \S+ NAME"):
        further(configured(more, loras=4), ("t0", "t1"))
    with pytest.raises(UserError, match="Member b of .* was trained on t2 and on t1"):
        further(configured(remove(more, ["a1", "a2"]), loras=2), ("t0", "t1", "t2"))
