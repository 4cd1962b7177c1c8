"""Slow, obvious NumPy: routing, MoE layers and balance quantities, one token at a time."""

from __future__ import annotations

from math import erf, sqrt

import numpy as np


def softmax(values: np.ndarray) -> np.ndarray:
    up = np.exp(values - values.max())
    return up / up.sum()


def best(scores: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest, the lowest index first among equals."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def choose(name: str, logits: np.ndarray, k: int) -> dict[int, float]:
    """One token's experts and their weights under the selection called `name`."""
    experts = best(logits, k)
    if name == "top_k_then_softmax":
        return dict(zip(experts, softmax(logits[experts]), strict=True))
    scores = 1.0 / (1.0 + np.exp(-logits)) if name.startswith("sigmoid") else softmax(logits)
    total = sum(scores[e] for e in experts) if name.endswith("_renormalised") else 1.0
    extra = 1e-4 if name.startswith("smoothed") else 0.0
    return {e: scores[e] / total + extra for e in experts}


def probs(name: str, logits: np.ndarray) -> np.ndarray:
    """What losses see under the selection called `name`."""
    if name.startswith("sigmoid"):
        scores = 1.0 / (1.0 + np.exp(-logits))
        return scores / scores.sum()
    return softmax(logits)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.vectorize(erf, otypes=[float])(x / sqrt(2.0)))


def expert(params: dict[str, np.ndarray], e: int, x: np.ndarray) -> np.ndarray:
    """The e-th two-layer MLP on one token."""
    hidden = gelu(x @ params["w1"][e] + params["b1"][e])
    return hidden @ params["w2"][e] + params["b2"][e]


def layer(
    params: dict[str, np.ndarray], x_ND: np.ndarray, chosen: list[dict[int, float]]
) -> np.ndarray:
    """Weighted sum of each token's chosen experts; `chosen[n]` maps expert to weight."""
    y_ND = np.zeros(x_ND.shape)
    for n, experts in enumerate(chosen):
        for e, weight in experts.items():
            y_ND[n] += weight * expert(params, e, x_ND[n])
    return y_ND


def keep_by_capacity(
    chosen: list[dict[int, float]], slots: int, order: list[tuple[int, int]]
) -> list[dict[int, float]]:
    """What is left when every expert takes `slots` choices, (token, rank) in `order`."""
    kept: list[dict[int, float]] = [{} for _ in chosen]
    used: dict[int, int] = {}
    for n, rank in order:
        if rank < len(chosen[n]):
            e = list(chosen[n])[rank]
            if used.get(e, 0) < slots:
                kept[n][e] = chosen[n][e]
            used[e] = used.get(e, 0) + 1
    return kept


def importance(chosen: list[dict[int, float]], experts: int) -> np.ndarray:
    total = np.zeros(experts)
    for choice in chosen:
        for e, weight in choice.items():
            total[e] += weight
    return total


def load(clean_NE: np.ndarray, noisy_NE: np.ndarray, scale: float, k: int) -> np.ndarray:
    """Expected tokens per expert if one expert's noise at a time were drawn again."""
    total = np.zeros(clean_NE.shape[1])
    for clean, noisy in zip(clean_NE, noisy_NE, strict=True):
        for e in range(len(clean)):
            others = sorted(np.delete(noisy, e), reverse=True)
            above = (clean[e] - others[k - 1]) / scale
            total[e] += 0.5 * (1.0 + erf(above / sqrt(2.0)))
    return total


def cv_squared(values: np.ndarray) -> float:
    if len(values) == 1:
        return 0.0
    return float(np.var(values, ddof=1) / (np.mean(values) ** 2 + 1e-10))


def entropy(amounts: np.ndarray) -> float:
    """In nats, of how something is divided."""
    shares = [a / np.sum(amounts) for a in np.ravel(amounts) if a > 0]
    return float(-sum(p * np.log(p) for p in shares))
