"""Certificates of routes over a library: constant weights fold exactly, others tell the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.backbones.generate import Settings
from moezoo.cli import generate
from moezoo.domains.text.data.example import plain
from moezoo.domains.text.data.tokenizer import ByteTokenizer
from moezoo.domains.text.inference import Speaker, answer_of, tokens_of
from moezoo.domains.text.library import BaseDecoder
from moezoo.domains.text.library_routes import RouteOptions, route
from moezoo.domains.text.route_certificate import certificate, rows_of, summary
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights.library import Library, create
from moezoo.weights.peft import Factors
from tests.domains.text.conftest import PROMPTS
from tests.weights.libraries import decoder, member

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
    weights = [1 / 3] * 3 if name == "uniform" else [1]
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
    both = capsys.readouterr()
    said, notes = both.out.splitlines(), both.err.splitlines()
    assert notes[0].startswith("A plain decoder with the mean weights: ")
    assert notes[-1] == f"Wrote {file}."
    assert len(said) == len(PROMPTS)
    with pytest.raises(UserError, match="--certificate compares"):
        generate.main(
            [*words, "--route", "arrow", "--certificate", str(file), "--temperature", "1"], "g"
        )


def test_a_decoder_whose_logits_are_the_same_here_only(base: BaseDecoder, held: Library) -> None:
    """One prompt has one nearest adapter; others would have others, so it is no such decoder."""
    told = certificate(route("nearest", base, held), PROMPTS[:1], SETTINGS)
    assert told["paths"]["mean"]["along"]["exact"] and told["used"] == ["a0"]
    first = summary(told).splitlines()[0]
    assert "the same logits on these prompts" in first and "the same decoder" not in first
    assert "another token is the likeliest at 0 of" in first


def test_with_downs_all_adapters_take_part(base: BaseDecoder, held: Library) -> None:
    chosen = route("nearest", base, held, RouteOptions("downs"))
    told = certificate(chosen, PROMPTS[:1], SETTINGS)
    assert told["used"] == ["a0", "a1", "a2"] and told["paths"]["mean"]["along"]["exact"]
    # The single path is that adapter's own update, A B, not A with all adapters' B.
    assert told["paths"]["single"]["adapter"] == "a0"
    assert not told["paths"]["single"]["along"]["exact"]


def test_weights_that_move_are_those_of_every_text_so_far(base: BaseDecoder, held: Library) -> None:
    chosen: Any = route("tle", base, held, RouteOptions(every=1))
    told = certificate(chosen, PROMPTS[:1], SETTINGS)
    (answer,) = chosen.answered(PROMPTS[:1], SETTINGS)
    text = tokens_of(chosen.speaker(base.model), PROMPTS[0])
    texts = [[*text, *answer.tokens[:k]] for k in range(min(len(answer.tokens) + 1, 3))]
    wanted = np.mean([chosen.gates(chosen, [text], ())[0] for text in texts], axis=0)
    np.testing.assert_allclose(list(told["mean_weights"].values()), wanted, rtol=1e-5)


def test_an_adapted_head_has_a_certificate(base: BaseDecoder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = {
        path: Factors(rng.normal(size=(8, 2)), rng.normal(size=(2, out)), 1.0, {})
        for path, out in (("lm_head", 20), ("layers/0/attn/q", 8))
    }
    layers = {
        p: f._replace(down=np.float32(f.down), up=np.float32(f.up)) for p, f in layers.items()
    }
    members = [member(name, 1)._replace(layers=layers) for name in ("x", "y")]
    made = create(tmp_path / "lib", base.told, members)
    told = certificate(route("uniform", base, made), PROMPTS[:1], SETTINGS)
    assert told["paths"]["mean"]["along"]["exact"] and told["used"] == ["x", "y"]


def test_rows_have_the_tokens_that_were_made() -> None:
    """Bytes that are no UTF-8 become others when their text is read again."""
    speaker = Speaker(module.split(decoder()), ByteTokenizer(), plain, (258,))
    made = answer_of(speaker, [97, 0xFF, 258])
    assert made.text == "a\ufffd" and made.tokens == (97, 0xFF)
    rows = rows_of(speaker, ["b"], [made])
    assert rows.tokens_BT.tolist() == [[257, 98, 10, 97, 0xFF]]
    assert rows.asked_BT.tolist() == [[False, False, True, True, True]]
