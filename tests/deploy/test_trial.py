"""Trials of removed experts against paths from which they are really gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moezoo.deploy import calibrate, compare, novices, task_path
from moezoo.deploy.compare import Tally
from moezoo.deploy.trial import Trial
from tests.deploy.conftest import CONFIG, Case, batches

WAYS = [("mean", False), ("affine:2", False), ("mean", True)]


@pytest.fixture(scope="module")
def found(case: Case) -> calibrate.Calibration:
    return calibrate.calibrate(case.whole, batches(case.images, 8), "data", moments=True)


@pytest.mark.parametrize(("novice", "cut"), WAYS)
def test_a_trial_answers_as_the_path_without_the_experts(
    case: Case, found: calibrate.Calibration, novice: str, cut: bool
) -> None:
    widths = dict.fromkeys(case.whole.layers, CONFIG.width)
    trial, kind = Trial(case.whole, widths, rank=2, cut=cut), novices.by_name(novice)
    remove = task_path.REMOVALS["cut" if cut else "whole"]
    for seed in range(2):
        rng = np.random.default_rng(seed)
        kept = {
            name: tuple(sorted(int(e) for e in rng.permutation(CONFIG.experts)[: 2 + seed]))
            for name in case.whole.layers
        }
        path = remove(case.whole, replace(case.plan, kept=kept, novices=novice), found, kind)
        wanted, got = compare.runner(path)(case.images), trial.of(kept, found, kind)(case.images)
        np.testing.assert_array_equal(got.violations_BL, wanted.violations_BL)
        for name in Tally._fields:
            a, b = getattr(got, name), getattr(wanted, name)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
    everything = {name: layer.kept for name, layer in case.whole.layers.items()}
    same = trial.of(everything, found, kind)(case.images)
    np.testing.assert_allclose(
        same.logits, compare.runner(case.whole)(case.images).logits, rtol=1e-4, atol=1e-5
    )
    assert not np.asarray(same.violations_BL).any()
