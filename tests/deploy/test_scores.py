"""Budgets, selections and plans."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.deploy import scores
from moezoo.deploy.certificate import at_most
from moezoo.deploy.plan import Plan, keep_all
from moezoo.deploy.usage import Usage, removal_errors, weighted_mean_outputs
from moezoo.errors import UserError


def layer(seed: int = 0, e: int = 6, d: int = 4, n: int = 200) -> Usage:
    """Consistent statistics of random tokens, two experts each."""
    rng = np.random.default_rng(seed)
    g, y = np.zeros((n, e)), rng.normal(size=(n, e, d)) + rng.normal(size=(e, d))
    for row in g:
        row[rng.choice(e, 2, replace=False, p=np.arange(1, e + 1) / (e * (e + 1) / 2))] = (0.5, 0.3)
    used = g > 0
    y = y * used[..., None]
    norm = np.linalg.norm(y, axis=-1)
    return Usage(
        tokens=np.float64(n),
        choices=np.float64(used.sum()),
        count_E=used.sum(0).astype(np.float64),
        first_E=(g == 0.5).sum(0).astype(np.float64),
        first_prob_E=np.where(g == 0.5, g, 0).sum(0),
        gate_E=g.sum(0),
        gate2_E=(g**2).sum(0),
        norm_E=norm.sum(0),
        norm2_E=(norm**2).sum(0),
        gated_norm_E=(g * norm).sum(0),
        peak_E=norm.max(0),
        chosen_EE=used.astype(float).T @ used,
        logits_EE=np.eye(e),
        output_ED=y.sum(0),
        gated_output_ED=np.einsum("ne,ned->ed", g**2, y),
        gates_EE=g.T @ g,
        energy_EE=np.einsum("ne,nf,ned,nfd->ef", g, g, y, y),
        cross_EED=np.einsum("ne,nf,nfd->efd", g, g, y),
    )


def permuted(usage: Usage, order: np.ndarray) -> Usage:
    """The same tokens with experts renumbered: new expert i is old expert order[i]."""
    moved = {}
    for name, value in usage._asdict().items():
        axes = name.split("_")[-1].count("E")
        moved[name] = value[order] if axes == 1 else value
        moved[name] = value[order][:, order] if axes == 2 else moved[name]
    return Usage(**moved)


def among(usage: Usage, within: tuple[int, ...] | None = None) -> scores.Candidates:
    """A layer of which every token chooses two experts."""
    e = len(usage.count_E)
    return scores.Candidates(usage, tuple(range(e)) if within is None else within, 2)


LAYERS = {"blocks/1/mlp": among(layer(0)), "blocks/3/mlp": among(layer(1))}


def test_the_random_baseline_is_another_draw_in_every_layer() -> None:
    drawn = [tuple(scores.random(layer(seed))) for seed in range(8)]
    assert len(set(drawn)) > 4 and drawn == [tuple(scores.random(layer(s))) for s in range(8)]
    assert all(sorted(one) == list(range(6)) for one in drawn)


@pytest.mark.parametrize("score", scores.SELECTIONS)
def test_uniform_budget_keeps_so_many_of_every_layer(score: str) -> None:
    for keep in (1, 3, 6):
        kept = scores.uniform(LAYERS, score, keep)
        assert kept.keys() == LAYERS.keys()
        for ids in kept.values():
            assert len(set(ids)) == keep and list(ids) == sorted(ids)
            assert all(isinstance(e, int) and 0 <= e < 6 for e in ids)


@pytest.mark.parametrize("score", [s for s in scores.SELECTIONS if s != "random"])
@given(seed=st.integers(0, 99))
def test_renumbering_experts_renumbers_the_choice(score: str, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(6)
    usage = layer(seed)
    kept = scores.uniform({"a": among(usage)}, score, 3)["a"]
    moved = scores.uniform({"a": among(permuted(usage, order))}, score, 3)["a"]
    assert {int(order[e]) for e in moved} == set(kept)


def test_scores_rank_as_their_names_say() -> None:
    usage = LAYERS["blocks/1/mlp"].usage
    assert scores.uniform(LAYERS, "frequency", 1)["blocks/1/mlp"] == (int(usage.count_E.argmax()),)
    assert scores.uniform(LAYERS, "reap", 1)["blocks/1/mlp"] == (int(usage.gated_norm_E.argmax()),)


def test_gram_is_the_least_error_of_all_subsets_and_search_comes_close(monkeypatch) -> None:
    usage = layer(4, e=8)
    error_EE = removal_errors(usage, weighted_mean_outputs(usage))

    def error(kept: tuple[int, ...]) -> float:
        out = [e for e in range(8) if e not in kept]
        return float(error_EE[np.ix_(out, out)].sum())

    best = scores.least_error(among(usage), 4)
    assert error(best) == pytest.approx(min(error(c) for c in combinations(range(8), 4)))
    monkeypatch.setattr(scores, "SUBSETS", 0)
    searched = scores.least_error(among(usage), 4)
    assert len(searched) == 4
    assert error(searched) <= 1.1 * error(best)


def test_global_budget_meets_total_and_floor() -> None:
    weak = LAYERS["blocks/1/mlp"].usage
    peaked = weak._replace(gated_norm_E=np.array([100.0, 1, 1, 1, 1, 1]))
    flat = weak._replace(gated_norm_E=np.full(6, 10.0))
    layers = {"a": among(peaked), "b": among(flat)}
    kept = scores.spread(layers, "reap", 8)
    assert sum(map(len, kept.values())) == 8
    assert kept["a"] == (0, 1) and len(kept["b"]) == 6
    with pytest.raises(UserError, match="between 4 .* and 12"):
        scores.spread(layers, "reap", 3)


def test_a_price_decides_what_leaves_first() -> None:
    layers = {"a": among(layer(0)), "b": among(layer(1), (0, 1, 3, 5))}
    count = lambda kept: float(10 * len(kept["a"]) + len(kept["b"]))  # noqa: E731
    order = scores.removals(layers, "reap", {"a": 1.0, "b": 1.0})
    assert len(order) == 4 + 2 and {e for name, e in order if name == "b"} <= {0, 1, 3, 5}
    dear = scores.removals(layers, "reap", {"a": 1000.0, "b": 1.0})
    assert [name for name, _ in dear] == ["a"] * 4 + ["b"] * 2
    kept = scores.cheapest(layers, "reap", {"a": 10.0, "b": 1.0}, count, 44.0)
    assert count(kept) <= 44 and len(kept["a"]) == 4
    assert scores.cheapest(layers, "reap", {"a": 1.0, "b": 1.0}, count, 64.0) == {
        "a": (0, 1, 2, 3, 4, 5), "b": (0, 1, 3, 5)
    }  # fmt: skip
    with pytest.raises(UserError, match="costs 22 even with"):
        scores.cheapest(layers, "reap", {"a": 1.0, "b": 1.0}, count, 21.0)


def test_published_scores_by_their_equations() -> None:
    usage = layer(3)
    rng = np.random.default_rng(3)
    g, y = np.zeros((200, 6)), rng.normal(size=(200, 6, 4)) + rng.normal(size=(6, 4))
    for row in g:
        row[rng.choice(6, 2, replace=False, p=np.arange(1, 7) / 21)] = (0.5, 0.3)
    for e in range(6):
        mine = g[:, e] > 0
        outputs, weights = y[mine, e], g[mine, e]
        norms = np.linalg.norm(outputs, axis=1)
        assert scores.reap_mean(usage)[e] == pytest.approx((weights * norms).mean(), rel=1e-4)
        deviation = np.sqrt(outputs.var(axis=0).sum())
        assert scores.mone(usage)[e] == pytest.approx(deviation * weights.sum() / 200, rel=1e-4)
        first = weights == 0.5
        nllb = first.sum() / 200 * np.exp(0.5 if first.any() else 0.0)
        assert scores.importance(usage)[e] == pytest.approx(nllb, rel=1e-4)


def test_bad_budgets_and_names_are_refused() -> None:
    with pytest.raises(UserError, match="between 1 and 6"):
        scores.uniform(LAYERS, "reap", 7)
    with pytest.raises(UserError, match="did you mean reap"):
        scores.uniform(LAYERS, "reep", 2)


def test_plan_survives_json_and_hashes_by_content() -> None:
    plan = Plan("depth", {"a": (0, 2), "b": (1,)}, {"a": 4, "b": 2}, "reap", "uniform 2", "ab12")
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.digest() == plan.digest()
    swapped = Plan("depth", {"b": (1,), "a": (0, 2)}, {"b": 2, "a": 4}, "reap", "uniform 2", "ab12")
    assert swapped.digest() == plan.digest()
    assert Plan("depth", {"a": (0, 3), "b": (1,)}, {"a": 4, "b": 2}).digest() != plan.digest()
    assert plan.removed("a") == (1, 3) and plan.removed("b") == (0,)
    assert keep_all("depth", {"a": 4}).removed("a") == ()


@pytest.mark.parametrize("ids", [(), (1, 1), (2, 0), (0, 4), (-1,)])
def test_impossible_plans_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="layer 'a'"):
        Plan("depth", {"a": ids}, {"a": 4})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"kept": 3}', '{"kept": {}, "colour": 1}', "[" * 100_000,
        '{"task": "a", "kept": {"a": ["0"]}, "experts": {"a": 2}}',
        '{"task": "a", "kept": {"a": [0.5]}, "experts": {"a": 2}}',
        '{"task": "a", "kept": {"a": [0]}, "experts": {"a": "2"}}',
        '{"task": "a", "kept": {"a": [0]}, "experts": ["a"]}',
        '{"task": [], "kept": {"a": [0]}, "experts": {"a": 2}}',
        '{"task": "a", "kept": {}, "experts": {}, "score": 3}',
    ],
)  # fmt: skip
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="plan.json is not a pruning plan"):
        Plan.from_json(text, "plan.json")


def test_bound_on_a_rate() -> None:
    # Values of the Clopper-Pearson table that every statistics book prints.
    for n, v, bound in [(300, 0, 0.0099), (300, 20, 0.0954), (1000, 5, 0.0105), (59, 0, 0.0495)]:
        assert at_most(v, n) == pytest.approx(bound, rel=0.01)
    assert at_most(0, 0) == at_most(7, 7) == 1.0
    with pytest.raises(ValueError):
        at_most(3, 2)
