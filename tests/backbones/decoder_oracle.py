"""A decoder written out slowly, token by token and head by head, in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np

from moezoo.backbones.decoder import DecoderConfig
from moezoo.nn.rope import RopeConfig

Params = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    """One vector."""
    return x / math.sqrt(sum(v * v for v in x) / len(x) + epsilon) * scale


def frequencies(rope: RopeConfig, width: int, length: int) -> list[float]:
    """Of every pair of features, in radians per token; `length` is that of the text."""
    theta, found = rope.theta, []
    if rope.scaling == "dynamic":
        longest = max(length, rope.original_length)
        grown = rope.factor * longest / rope.original_length - (rope.factor - 1)
        theta *= grown ** (width / (width - 2))
    for pair in range(width // 2):
        f = theta ** (-2 * pair / width)
        if rope.scaling == "linear":
            f /= rope.factor
        elif rope.scaling == "llama3":
            wavelength = 2 * math.pi / f
            if wavelength > rope.original_length / rope.low_frequency:
                f /= rope.factor
            elif wavelength > rope.original_length / rope.high_frequency:
                smooth = rope.original_length / wavelength - rope.low_frequency
                smooth /= rope.high_frequency - rope.low_frequency
                f = (1 - smooth) * f / rope.factor + smooth * f
        found.append(f)
    return found


def rotated(x: np.ndarray, position: int, rope: RopeConfig, length: int) -> np.ndarray:
    """One head of one token."""
    half, y = len(x) // 2, np.zeros_like(x)
    for i, f in enumerate(frequencies(rope, len(x), length)):
        pair = complex(x[i], x[i + half]) * complex(math.cos(position * f), math.sin(position * f))
        y[i], y[i + half] = pair.real, pair.imag
    return y


def attention(
    q_TD: np.ndarray,
    k_TD: np.ndarray,
    v_TD: np.ndarray,
    seen_TT: np.ndarray,
    times: float = 1.0,
) -> np.ndarray:
    """One head, its scores `times` as large; tokens that see nobody give 0."""
    out = np.zeros((len(q_TD), v_TD.shape[1]))
    for t, q in enumerate(q_TD):
        seen = [s for s in range(len(k_TD)) if seen_TT[t, s]]
        if seen:
            scores = np.array([q @ k_TD[s] for s in seen]) / math.sqrt(len(q)) * times
            weights = np.exp(scores - scores.max())
            out[t] = (weights / weights.sum()) @ v_TD[seen]
    return out


def logits(
    config: DecoderConfig,
    params: Params,
    tokens: list[int],
    real: list[bool] | None = None,
    segments: list[int] | None = None,
    *,
    longest: int,
) -> np.ndarray:
    """[T, V] of one row; `real` False is padding, `segments` are packed documents.

    `longest` is the number of tokens of the longest text in the row's batch.
    """
    params = {path: np.asarray(value, np.float64) for path, value in params.items()}
    count = len(tokens)
    real = real or [True] * count
    segments = segments or [1] * count
    same = [[real[s] and segments[s] == segments[t] for s in range(count)] for t in range(count)]
    seen = np.array([[s <= t and same[t][s] for s in range(count)] for t in range(count)])
    positions = [sum(same[t][:t]) for t in range(count)]
    x = np.stack([params["embed/table"][token] for token in tokens])
    for layer in range(config.depth):
        here = {
            path.removeprefix(f"layers/{layer}/"): value
            for path, value in params.items()
            if path.startswith(f"layers/{layer}/")
        }
        attend = _attend_latent if config.latent.rank else _attend
        x = x + attend(config, here, x, seen, positions, longest)
        y = np.stack([rms_norm(v, here["norm2/scale"], config.norm_epsilon) for v in x])
        if config.experts.in_layer(layer):
            x = x + np.stack([_experts(config, here, v) for v in y])
        else:
            x = x + _gated(*(here.get(f"mlp/{n}/kernel") for n in PARTS), y, here)
    x = np.stack([rms_norm(v, params["norm/scale"], config.norm_epsilon) for v in x])
    return x @ params["embed/table"].T if config.tied_head else _linear(params, "lm_head", x)


PARTS = ("gate", "up", "down")


def _gated(gate, up, down, y: np.ndarray, here: Params | None = None) -> np.ndarray:
    biases = [(here or {}).get(f"mlp/{name}/bias", 0.0) for name in PARTS]
    g, u = y @ gate + biases[0], y @ up + biases[1]
    return (g / (1 + np.exp(-g)) * u) @ down + biases[2]


def _experts(config: DecoderConfig, here: Params, y: np.ndarray) -> np.ndarray:
    """What the experts that one token chooses make of it."""
    experts = config.experts
    logits = y @ here["mlp/routed/router/kernel"]
    share = np.exp(logits) / np.exp(logits).sum()
    if experts.selection.startswith("sigmoid"):
        share = 1 / (1 + np.exp(-logits))
    chosen = _chosen(config, share + here.get("mlp/routed/router/bias", 0.0))
    whole = sum(share[e] for e in chosen) if "renormalised" in experts.selection else 1.0
    stacks = [here[f"mlp/routed/experts/{name}/kernel"] for name in PARTS]
    found = sum(share[e] / whole * _gated(*(s[e] for s in stacks), y) for e in chosen)
    found = experts.factor * found
    if experts.shared and experts.shared_weight == "one":
        return found + _gated(*(here[f"mlp/shared/{n}/kernel"] for n in PARTS), y)
    if experts.shared:
        weight = 1 / (1 + np.exp(-(y @ here["mlp/shared/weight/kernel"])))
        found = found + weight * _gated(*(here[f"mlp/shared/mlp/{n}/kernel"] for n in PARTS), y)
    return np.asarray(found)


def _chosen(config: DecoderConfig, score: np.ndarray) -> list[int]:
    """The best experts of the best groups."""
    experts = config.experts
    size = experts.count // experts.groups
    members = [range(g * size, (g + 1) * size) for g in range(experts.groups)]
    counted = {"best": 1, "two_best": 2}[experts.group_score]

    def worth(group: range) -> float:
        return sum(sorted((score[e] for e in group), reverse=True)[:counted])

    best = sorted(members, key=worth, reverse=True)[: experts.top_groups]
    allowed = [e for group in best for e in group]
    return sorted(allowed, key=lambda e: -score[e])[: experts.top_k]


def _attend_latent(
    config: DecoderConfig,
    here: Params,
    x: np.ndarray,
    seen: np.ndarray,
    positions: list[int],
    longest: int,
) -> np.ndarray:
    """Keys and values written out for every head and token."""
    sizes, heads = config.latent, config.heads
    y = np.stack([rms_norm(v, here["norm1/scale"], config.norm_epsilon) for v in x])

    def normed(latent: np.ndarray, name: str) -> np.ndarray:
        return np.stack([rms_norm(v, here[f"attn/{name}/scale"], 1e-6) for v in latent])

    def turned(part: np.ndarray) -> np.ndarray:
        if sizes.neighbours:
            part = np.concatenate([part[:, 0::2], part[:, 1::2]], axis=1)
        placed = zip(part, positions, strict=True)
        return np.stack([rotated(v, p, config.rope, longest) for v, p in placed])

    if sizes.query_rank:
        q = _linear(here, "attn/q_up", normed(_linear(here, "attn/q_down", y), "q_down_norm"))
    else:
        q = _linear(here, "attn/q", y)
    down = _linear(here, "attn/kv_down", y)
    shared = turned(down[:, sizes.rank :])
    both = _linear(here, "attn/kv_up", normed(down[:, : sizes.rank], "kv_down_norm"))
    factor = 1.0 if config.rope.scaling == "none" else config.rope.factor
    times = (0.1 * sizes.growth * math.log(factor) + 1) ** 2
    out = []
    for h in range(heads):
        own_q = np.split(q, heads, axis=1)[h]
        own = np.split(both, heads, axis=1)[h]
        query = np.concatenate([own_q[:, : sizes.plain], turned(own_q[:, sizes.plain :])], axis=1)
        key = np.concatenate([own[:, : sizes.plain], shared], axis=1)
        out.append(attention(query, key, own[:, sizes.plain :], seen, times))
    return _linear(here, "attn/o", np.concatenate(out, axis=1))


def _attend(
    config: DecoderConfig,
    here: Params,
    x: np.ndarray,
    seen: np.ndarray,
    positions: list[int],
    longest: int,
) -> np.ndarray:
    y = np.stack([rms_norm(v, here["norm1/scale"], config.norm_epsilon) for v in x])
    width, shared = config.width_of_head, config.heads // config.groups
    parts = {name: _linear(here, f"attn/{name}", y) for name in "qkv"}
    if config.qk_norm and config.qk_norm_over == "width":
        for name in "qk":
            scale = here[f"attn/{name}_norm/scale"]
            parts[name] = np.stack([rms_norm(v, scale, config.norm_epsilon) for v in parts[name]])

    def head(name: str, number: int) -> np.ndarray:
        found = parts[name][:, number * width : (number + 1) * width]
        if name != "v":
            if config.qk_norm and config.qk_norm_over == "head":
                scale = here[f"attn/{name}_norm/scale"]
                found = np.stack([rms_norm(v, scale, config.norm_epsilon) for v in found])
            placed = zip(found, positions, strict=True)
            turned = int(width * config.rope.share)
            found = np.stack(
                [
                    np.concatenate([rotated(v[:turned], p, config.rope, longest), v[turned:]])
                    for v, p in placed
                ]
            )
        return found

    heads = [
        attention(head("q", h), head("k", h // shared), head("v", h // shared), seen)
        for h in range(config.heads)
    ]
    return _linear(here, "attn/o", np.concatenate(heads, axis=1))


def _linear(here: Params, path: str, x: np.ndarray) -> np.ndarray:
    return x @ here[f"{path}/kernel"] + here.get(f"{path}/bias", 0.0)
