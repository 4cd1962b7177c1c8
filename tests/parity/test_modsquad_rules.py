"""Mod-Squad's learned weights of tasks and its rule for which experts a task keeps."""

from __future__ import annotations

import numpy as np

from moezoo.deploy import scores
from moezoo.tasks.losses import learned_total
from tests.fixtures import load
from tests.parity.vmoe import close


def test_learned_weights_of_tasks() -> None:
    z = load("modsquad", "awl_and_pruning")
    close(learned_total(z["losses"], z["awl_params"]), z["awl_total"])


def test_experts_that_a_task_keeps() -> None:
    z = load("modsquad", "awl_and_pruning")
    k = int(z["k"])
    for task, usage_E in enumerate(z["usage_percent"]):
        for i, threshold in enumerate(z["thresholds"]):
            kept = scores.above(usage_E, float(threshold) / k, k)
            np.testing.assert_array_equal(kept, np.flatnonzero(z["kept_experts"][task, i]))
