"""Loss and scores of language models: slow oracles, chunks, merged sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo.tasks import language
from moezoo.tasks.base import merge

V, D = 11, 8
TASKS = ("a", "b", "c")


def rows(seed: int, batch: int, length: int) -> dict[str, np.ndarray]:
    """Random documents packed into rows, some targets without loss, padding at the end."""
    rng = np.random.default_rng(seed)
    targets = np.full((batch, length), -1, np.int32)
    segments, task = np.zeros_like(targets), np.zeros_like(targets)
    for b in range(batch):
        start, number = 0, 1
        while start < length and rng.random() < 0.9:
            stop = min(start + int(rng.integers(1, 7)), length)
            own = rng.integers(0, V, stop - start)
            targets[b, start:stop] = np.where(rng.random(stop - start) < 0.5, own, -1)
            segments[b, start:stop] = number
            task[b, start:stop] = rng.integers(0, len(TASKS))
            start, number = stop, number + 1
    return {"targets": targets, "segments": segments, "task": task}


def logits_for(label: dict[str, np.ndarray], seed: int, right: float = 0.7) -> np.ndarray:
    """Random logits [B,T,V] whose argmax is the target in a share of places."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(*label["targets"].shape, V)).astype(np.float32)
    chosen = (rng.random(label["targets"].shape) < right) & (label["targets"] >= 0)
    places = np.nonzero(chosen)
    logits[(*places, label["targets"][places])] += 8
    return logits


def slow_scores(logits: np.ndarray, label: dict[str, np.ndarray], valid: np.ndarray) -> dict:
    """The scores a document at a time, in float64."""
    losses: dict[str, list[float]] = {t: [] for t in TASKS}
    right: dict[str, list[bool]] = {t: [] for t in TASKS}
    exact: dict[str, list[bool]] = {t: [] for t in TASKS}
    for b in np.flatnonzero(valid):
        for number in range(1, label["segments"][b].max() + 1):
            own: list[bool] = []
            places = np.flatnonzero(label["segments"][b] == number)
            name = TASKS[label["task"][b, places[0]]]
            for t in places:
                target = label["targets"][b, t]
                if target < 0:
                    continue
                z = logits[b, t].astype(np.float64)
                losses[name].append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[target])
                own.append(bool(z.argmax() == target))
            right[name] += own
            if own:
                exact[name].append(all(own))

    def mean(values: list) -> float:
        return float(np.mean(values)) if values else float("nan")

    kinds = {"loss": losses, "accuracy": right, "exact_match": exact}
    result = {f"{t}/{kind}": mean(values[t]) for kind, values in kinds.items() for t in TASKS}
    for kind in kinds:
        result[kind] = mean([result[f"{t}/{kind}"] for t in TASKS if losses[t]])
    return result


METRIC = language.ByTask(TASKS)
COUNT = jax.jit(METRIC.count)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), right=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_scores_by_task_are_those_of_the_oracle(seed: int, right: float) -> None:
    label = rows(seed, 4, 14)
    logits = logits_for(label, seed, right)
    valid = np.random.default_rng(seed).random(4) < 0.8
    found = METRIC.compute(merge(METRIC.init(), COUNT(logits, label, valid)))
    expected = slow_scores(logits, label, valid)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_exact_match_needs_every_target() -> None:
    """Two documents in a row; a wrong token without loss does not count, one with loss does."""
    label = {
        "targets": np.array([[-1, 3, 4, -1, 5, 6, -1, -1]], np.int32),
        "segments": np.array([[1, 1, 1, 2, 2, 2, 3, 0]], np.int32),
        "task": np.array([[0, 0, 0, 1, 1, 1, 2, 0]], np.int32),
    }
    best = np.array([9, 3, 4, 9, 5, 6, 9, 9])
    state = COUNT(np.eye(V, dtype=np.float32)[best][None], label, np.ones(1, bool))
    assert state["documents"].tolist() == [1, 1, 0] and state["exact"].tolist() == [1, 1, 0]
    best[5] = 9
    state = COUNT(np.eye(V, dtype=np.float32)[best][None], label, np.ones(1, bool))
    assert state["exact"].tolist() == [1, 0, 0] and state["right"].tolist() == [2, 1, 0]


def test_an_exact_match_is_what_greedy_decoding_gives() -> None:
    """A model that looks at the last token only; answers are its own chains, some changed."""
    rng = np.random.default_rng(2)
    table = rng.normal(size=(V, V)).astype(np.float32)
    for token in range(1, V):  # towards smaller tokens, so that every chain ends
        table[token, rng.integers(0, token)] += 9
    end, after = 0, table.argmax(-1)
    label = {name: np.zeros((1, 200), np.int32) for name in ("targets", "segments", "task")}
    label["targets"][:] = -1
    tokens, place, expected = np.zeros((1, 200), np.int64), 0, []
    for number in range(1, 15):
        prompt = rng.integers(1, V, 4).tolist()
        answer = chain(after, prompt[-1], end)
        if number % 2:
            answer[rng.integers(len(answer))] = int(rng.integers(0, V))
        expected.append(answer == chain(after, prompt[-1], end))
        document = [*prompt, *answer]
        here = slice(place, place + len(document) - 1)
        tokens[0, here], label["segments"][0, here] = document[:-1], number
        label["targets"][0, here] = [-1] * (len(prompt) - 1) + answer
        place = here.stop
    assert 0 < sum(expected) < len(expected)
    state = jax.jit(METRIC.count)(table[tokens], label, np.ones(1, bool))
    assert state["documents"].tolist() == [len(expected), 0, 0]
    assert state["exact"].tolist() == [sum(expected), 0, 0]


def chain(after: np.ndarray, start: int, end: int) -> list[int]:
    """Greedy decoding until the end token."""
    answer: list[int] = []
    while not answer or answer[-1] != end:
        answer.append(int(after[answer[-1] if answer else start]))
    return answer


def test_states_of_parts_merge() -> None:
    label = rows(1, 4, 14)
    logits = logits_for(label, 1)
    total = METRIC.init()
    for share in ([1, 1, 0, 0], [0, 0, 1, 1]):
        total = merge(total, COUNT(logits, label, np.array(share, bool)))
    whole = COUNT(logits, label, np.ones(4, bool))
    assert total.keys() == whole.keys()
    for name in total:
        np.testing.assert_allclose(total[name], whole[name], rtol=1e-6)
    assert total["targets"].dtype == np.int64 and total["loss"].dtype == np.float64


def test_without_data_scores_are_nan() -> None:
    assert all(np.isnan(value) for value in METRIC.compute(METRIC.init()).values())


def test_cross_entropy_is_the_mean_over_targets() -> None:
    label = rows(3, 4, 14)
    logits = logits_for(label, 3)
    targets = label["targets"]
    exact = logits.astype(np.float64)
    log_p = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    b, t = np.nonzero(targets >= 0)
    expected = -log_p[b, t, targets[b, t]].mean()
    value_and_gradient = jax.jit(jax.value_and_grad(language.cross_entropy))
    value, gradient = value_and_gradient(logits, targets)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    softmax = np.exp(log_p)
    softmax[b, t, targets[b, t]] -= 1
    slow = softmax * (targets >= 0)[..., None] / len(b)
    np.testing.assert_allclose(gradient, slow, rtol=1e-4, atol=1e-6)
    value, gradient = value_and_gradient(logits, np.full_like(targets, -1))
    assert value == 0 and not np.asarray(gradient).any()


def test_large_bfloat16_logits_are_safe() -> None:
    targets = np.array([[0, 1, -1]], np.int32)
    logits = jnp.array([[[3e4, -3e4, 0.0], [0.0, 1e3, 990.0], [1e38, 1e38, 1e38]]], jnp.bfloat16)
    value, gradient = jax.jit(jax.value_and_grad(language.cross_entropy))(logits, targets)
    exact = np.asarray(logits[0, 1], np.float64)
    expected = (0 + np.log(np.exp(exact - exact.max()).sum()) + exact.max() - exact[1]) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    assert value.dtype == jnp.float32 and np.isfinite(np.asarray(gradient, np.float32)).all()


def values(loss, score):
    """Value, gradients and token scores as one compiled function of (hidden, kernel)."""
    gradient = jax.value_and_grad(loss, (0, 1))
    return jax.jit(lambda hidden, kernel: (gradient(hidden, kernel), score(hidden, kernel)))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", (4, 20))
def test_chunks_change_neither_value_nor_gradient(chunk: int) -> None:
    rng = np.random.default_rng(0)
    targets = rows(5, 3, 14)["targets"]
    factors = (
        rng.normal(size=(3, 14, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
    )
    plain = values(
        lambda h, k: language.cross_entropy(language.logits_of(h, k), targets),
        lambda h, k: language.of_logits(language.logits_of(h, k), targets),
    )
    chunked = values(
        lambda h, k: language.chunked_cross_entropy(h, k, targets, chunk),
        lambda h, k: language.of_hidden(h, k, targets, chunk),
    )
    found, expected = jax.tree.leaves(chunked(*factors)), jax.tree.leaves(plain(*factors))
    assert [x.shape for x in found] == [x.shape for x in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_all_logits_never_exist_at_once() -> None:
    """Neither the forward nor the backward pass holds an array of B * T * V numbers."""
    batch, length, vocabulary, chunk = 2, 256, 4096, 8
    shapes = (
        jax.ShapeDtypeStruct((batch, length, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((D, vocabulary), jnp.bfloat16),
    )
    targets = jnp.zeros((batch, length), jnp.int32)

    def temporary(loss) -> int:
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = batch * length * vocabulary * 4
    plain = temporary(lambda h, k: language.cross_entropy(language.logits_of(h, k), targets))
    chunked = temporary(lambda h, k: language.chunked_cross_entropy(h, k, targets, chunk))
    assert plain >= all_logits > 4 * chunked
