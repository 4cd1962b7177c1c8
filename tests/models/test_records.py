"""What every system records of its routers has the documented shapes, whatever the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from moezoo.nn import module
from moezoo.ops.routing import Routing
from moezoo.train.setup import make_builder, make_tasks
from tests.models.test_gradients import TINY, shrunk


def check(routing: Routing) -> None:
    """Every field is [N, K], [N, E] or [N] with the same N, K and E."""
    (n, k), e = routing.experts_NK.shape, routing.logits_NE.shape[1]
    shapes = {name: a.shape for name, a in routing._asdict().items() if a is not None}
    letters = {"NK": (n, k), "NE": (n, e), "N": (n,)}
    assert shapes == {name: letters[name.rpartition("_")[2]] for name in shapes}


# Without a router.
DENSE = {
    "rooms/vit_dense_tiny", "rooms/swin_dense_tiny", "sounds/ast_tiny", "text/skills_tiny",
    "rooms/mosa_tiny", "rooms/mtlora_tiny", "rooms/mtlora_vit_tiny",
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("train", [False, True], ids=["evaluated", "trained"])
def test_every_record_has_the_documented_shapes(name: str, train: bool, tmp_path: Path) -> None:
    config = shrunk(name, tmp_path)
    domain = config.data.domain
    batch, classes = domain.example(config)
    tasks = make_tasks(config, classes)
    parts = module.abstract(make_builder(config, tasks))

    def read(params: Any, stats: Any, batch: Any, key: Any) -> Any:
        model = module.merge(parts.definition, params, stats)
        return domain.read(model, batch, key=key if train else None, train=train).records

    records = jax.eval_shape(read, parts.params, parts.stats, batch, jax.random.key(0))
    assert bool(records) == (name not in DENSE)
    for record in records.values():
        check(record.routing)
        assert record.task_N.shape == record.routing.mask_N.shape
