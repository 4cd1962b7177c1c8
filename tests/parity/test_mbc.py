"""Model-based clustering: kept entries, cosines and groups are the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.ops import adapter_clusters as clusters
from tests.fixtures import load, names

OVERSAMPLED = 10  # of scikit-learn's TruncatedSVD
FILES = names("mbc", "k", ["k3", "k4_sparsity05"])


@pytest.mark.parametrize("name", FILES)
def test_groups_are_the_published_ones(name: str) -> None:
    f = load("mbc", name)
    dropped, parts = float(f["sparsity_threshold"]), int(f["n_components"])
    kept = clusters.sparsified(f["flat"], dropped)
    np.testing.assert_array_equal((kept != 0).sum(1), f["sparsified_nnz"])
    np.testing.assert_array_equal(kept != 0, np.abs(f["flat"]) > f["threshold"][:, None])
    # The published SVD draws as many directions as it keeps and OVERSAMPLED besides: it is exact
    # where these are all there are, and otherwise rough, within what the fixtures' notes say.
    close = {"rtol": 1e-4, "atol": 1e-5} if len(kept) <= parts + OVERSAMPLED else {"atol": 2.2e-2}
    np.testing.assert_allclose(clusters.cosines(kept, parts), f["cos_sim"], **close)
    rng = np.random.default_rng(int(f["random_state"]))
    found = clusters.alike(f["flat"], int(f["k"]), rng, dropped=dropped, parts=parts)
    together = found.cluster_N[:, None] == found.cluster_N
    np.testing.assert_array_equal(together, f["labels"][:, None] == f["labels"])
