"""Model-based clustering: kept entries, cosines and groups are the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.ops import adapter_clusters as clusters
from tests.fixtures import load, names

FILES = names("mbc", "k", ["k3", "k4_sparsity05"])


@pytest.mark.parametrize("name", FILES)
def test_groups_are_the_published_ones(name: str) -> None:
    f = load("mbc", name)
    dropped, parts = float(f["sparsity_threshold"]), int(f["n_components"])
    kept = clusters.sparsified(f["flat"], dropped)
    np.testing.assert_array_equal((kept != 0).sum(1), f["sparsified_nnz"])
    # The published SVD draws, and finds what is beyond the signal only roughly.
    np.testing.assert_allclose(clusters.cosines(kept, parts), f["cos_sim"], atol=2.2e-2)
    rng = np.random.default_rng(int(f["random_state"]))
    found = clusters.alike(f["flat"], int(f["k"]), rng, dropped=dropped, parts=parts)
    together = found.group_N[:, None] == found.group_N
    np.testing.assert_array_equal(together, f["labels"][:, None] == f["labels"])


def test_more_groups_than_different_members_are_refused() -> None:
    with pytest.raises(UserError, match="2 different members make no 3 clusters"):
        clusters.kmeans(np.array([[0.0], [1.0], [1.0]]), 3, np.random.default_rng(0))
