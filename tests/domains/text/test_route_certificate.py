"""Certificates of routes over a library: constant weights fold exactly, others tell the loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moezoo.backbones.generate import Settings
from moezoo.cli import generate
from moezoo.domains.text.library import BaseDecoder
from moezoo.domains.text.library_routes import RouteOptions, route
from moezoo.domains.text.route_certificate import certificate, summary
from moezoo.errors import UserError
from moezoo.weights.library import Library
from tests.domains.text.conftest import PROMPTS

SETTINGS = Settings(new=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "combination"), [("uniform", "outputs"), ("uniform", "factors"), ("task:t1", None)]
)
def test_constant_weights_fold_exactly(
    name: str, combination: str | None, base: BaseDecoder, held: Library
) -> None:
    told = certificate(route(name, base, held, RouteOptions(combination)), PROMPTS, SETTINGS)
    mean = told["paths"]["mean"]
    assert mean["along"]["exact"] and mean["along"]["likeliest_token"]["differ"] == 0
    assert mean["answers"]["differ"] == 0 and mean["answers"]["of"] == len(PROMPTS)
    weights = [1 / 3] * 3 if name == "uniform" else [0, 1, 0]
    np.testing.assert_allclose(list(told["mean_weights"].values()), weights, rtol=1e-5)
    # One adapter alone is the route where the route is one adapter.
    assert told["paths"]["single"]["along"]["exact"] == (name != "uniform")
    assert len(told["used"]) == (3 if name == "uniform" else 1)
    assert "the same decoder" in summary(told)


@pytest.mark.slow
def test_other_weights_say_what_is_lost(base: BaseDecoder, held: Library) -> None:
    routes = {name: route(name, base, held) for name in ("nearest", "arrow", "mbc", "tle")}
    told = {name: certificate(r, PROMPTS, SETTINGS) for name, r in routes.items()}
    # Every prompt has another adapter, so no constant one is the same.
    nearest = told["nearest"]["paths"]
    lengths = np.array([len(r) for r in routes["nearest"].asked(PROMPTS).context.attributes_RA])
    assert lengths.tolist() == [3, 3, 3]
    assert not nearest["mean"]["along"]["exact"] and nearest["mean"]["along"]["likeliest_token"]
    assert nearest["single"]["adapter"] == max(
        told["nearest"]["mean_weights"], key=told["nearest"]["mean_weights"].__getitem__
    )
    assert sum(told["arrow"]["mean_weights"].values()) == pytest.approx(1, rel=1e-5)
    assert not told["arrow"]["paths"]["mean"]["along"]["exact"]
    assert set(told["mbc"]["mean_weights"]) == {" + ".join(g) for g in held.clusters.values()}
    assert told["tle"]["paths"]["mean"]["along"] is None  # weights that move have no one reading
    for found in told.values():
        for path in found["paths"].values():
            assert 0 <= path["answers"]["differ"] / 3 <= path["answers"]["rate_at_most"] <= 1
    with pytest.raises(UserError, match="adds up what several decoders answer"):
        certificate(route("elrea", base, held), PROMPTS, SETTINGS)
    with pytest.raises(UserError, match="give some like those to come"):
        certificate(routes["arrow"], [], SETTINGS)


@pytest.mark.slow
def test_the_command_writes_it_and_answers(
    folder: Path, held: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.json"
    words = [str(folder), *PROMPTS, "--new", "3", "--library", str(held.folder)]
    generate.main([*words, "--route", "arrow", "--certificate", str(file)], "generate")
    told = json.loads(file.read_text())
    assert told["route"] == "arrow" and told["weights"] == "each token in each layer"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Held still, mean:") and len(said) == 2 + len(PROMPTS)
    with pytest.raises(UserError, match="--certificate compares"):
        generate.main(
            [*words, "--route", "arrow", "--certificate", str(file), "--temperature", "1"], "g"
        )
