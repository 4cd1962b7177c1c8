"""What is taken over must compute what it did, and parts that stand still must be taken over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moezoo.domains.images.domain import DataConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.train import loop, start
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.config import Config, to_json
from moezoo.train.config_file import load
from moezoo.train.console import Console
from tests.train import tiny

SMALL = {"width": 8, "depth": 4, "heads": 2, "groups": 1, "hidden": 6}
BASE, LORA = "text/skills_tiny", "text/library_member"


def small(name: str, **changes: Any) -> Config:
    """A configuration of the package on a decoder of four narrow layers."""
    config: Any = load(name, [])
    decoder = replace(config.model.decoder, **SMALL)
    return replace(config, model=replace(config.model, decoder=decoder, **changes))


def checked(name: str, first: str, changes: Any = None, of_first: Any = None) -> None:
    start.check_first(small(first, **of_first or {}), "the run", small(name, **changes or {}))


HELD = [
    ("text/phatgoose_tiny", {}, r"the run of a LoRA \(text/library_member\)"),
    ("text/polytropon_tiny", {"trained": "table"}, "a run of model.trained all"),
    ("text/adapter_fusion_tiny", {}, r"a run of its first stage"),
    ("text/alter_tiny", {}, r"a run of its first stage \(text/alter_adapters_tiny\)"),
    ("text/mixda_tiny", {}, r"a run of its first stage \(text/mixda_domains_tiny\)"),
]


@pytest.mark.parametrize(("name", "changes", "says"), HELD)
def test_parts_that_are_fresh_and_stand_still_are_refused(
    name: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """They would add nothing, so that what is trained over them had no gradient."""
    with pytest.raises(UserError, match=rf"the run has no layers/\S+ \[.*must be {says}"):
        checked(name, BASE, changes)
    alone = replace(small(name, **changes), start_from=None, directory=str(tmp_path / "runs"))
    with pytest.raises(UserError, match="still, but begins with nothing that has learned"):
        loop.train(alone, Console())
    assert not (tmp_path / "runs").exists()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    """But what was there before stays, and what is not ours."""
    config: Any = tiny.config(str(tmp_path), data=DataConfig(name="folder"))
    folder = tmp_path / config.name
    with pytest.raises(UserError):
        loop.train(config, Console(), file=Path(__file__))
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes").write_text("mine")
    with pytest.raises(UserError):
        loop.train(config, Console())
    assert (folder / "notes").exists()


@pytest.mark.parametrize(
    ("name", "first", "changes"),
    [
        ("text/phatgoose_tiny", LORA, {}),
        ("text/polytropon_tiny", "text/polytropon_tiny", {"trained": "table", "tasks": 1}),
        ("text/adapter_fusion_tiny", "text/adapter_fusion_adapters_tiny", {}),
        ("text/alter_tiny", "text/alter_adapters_tiny", {}),
        ("text/mixda_tiny", "text/mixda_domains_tiny", {}),
        ("text/cpoly_tiny", BASE, {}),
        ("text/meteora_tiny", LORA, {}),  # nothing but the base fits
    ],
)
def test_the_recipes_of_the_package_go_on(name: str, first: str, changes: dict[str, Any]) -> None:
    checked(name, first, changes)


def test_a_lora_of_another_rank_or_of_fewer_layers_is_none() -> None:
    for of_first in ({"ranks": 4, "alpha": 8.0}, {"targets": ("layers/0/*",)}):
        with pytest.raises(UserError, match="must be the run of a LoRA"):
            checked("text/phatgoose_tiny", LORA, of_first=of_first)


POLY, MOCLE = "text/polytropon_tiny", "text/mocle_tiny"


@pytest.mark.parametrize(
    ("name", "first", "changes", "of_first", "says"),
    [
        ("text/phatgoose_tiny", LORA, {}, {"alpha": 1.0}, r"scale of .* is 2.0, but .* has 0.125"),
        ("text/phatgoose_tiny", LORA, {}, {"update": "rslora"}, "the scale of its updates"),
        (POLY, POLY, {"trained": "table"}, {"heads": 2}, "model.heads is 1, but the run has 2"),
        (POLY, POLY, {}, {"pace": 1.0}, "model.pace is 100.0, but the run has 1.0"),
        (POLY, POLY, {}, {"shares": "length"}, "model.shares is sigmoid, but the run has length"),
        (MOCLE, MOCLE, {}, {"temperature": 0.05}, "model.temperature is 0.1"),
        (MOCLE, MOCLE, {}, {"cluster_of_task": (3, 2, 1, 0, 0)}, "model.cluster_of_task is"),
        ("text/meteora_tiny", "text/meteora_tiny", {}, {"top_k": 1}, "model.top_k is 2"),
        (
            "text/cpoly_tiny",
            "text/cpoly_tiny",
            {"own": 2},
            {"shared": 12},
            "model.shared is 3, but",
        ),
        ("text/cpoly_tiny", POLY, {}, {"skills": 12, "rank": 4}, "the kind of its routers is Sh"),
        ("text/smora_tiny", "text/smora_tiny", {}, {"gate": "unbiased"}, "model.gate is published"),
        (LORA, LORA, {}, {"alpha": 4.0}, "the scale of its updates"),
    ],
)
def test_arrays_that_would_compute_something_else_are_refused(
    name: str, first: str, changes: dict[str, Any], of_first: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        checked(name, first, changes, of_first)


def test_a_run_is_asked_for_the_shapes_of_its_checkpoint(tmp_path: Path) -> None:
    first, gate = small(LORA, alpha=1.0), small("text/phatgoose_tiny")
    parts = module.abstract(lambda: first.model.build({"lm": 259}, (1, 64), nnx.Rngs(0)))
    shapes = {"params": parts.params, "stats": parts.stats}
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    with Checkpointer(tmp_path / "checkpoints", to_json(first), 1, print) as checkpoints:
        checkpoints.save(1, state, None)
        checkpoints.wait()
    with pytest.raises(UserError, match=f"is 2.0, but the run in {tmp_path} has 0.125"):
        start.check_fits(tmp_path, gate)
    start.check_fits(tmp_path, small("text/phatgoose_tiny", alpha=1.0))
