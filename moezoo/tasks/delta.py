"""Delta_m: how much better a multi-task model is than single-task baselines, over all tasks."""

from __future__ import annotations

from collections.abc import Mapping

from moezoo.errors import UserError

# Single-task ResNet-18 (PASCAL-Context) and ResNet-50 (NYUD-v2) of M3ViT tables 1 and 2; fractions,
# degrees and metres.
PASCAL_RESNET18 = {
    "semseg": 0.662,
    "parts": 0.599,
    "saliency": 0.663,
    "normals": 13.9,
    "edge": 0.688,
}
NYUD_RESNET50 = {"semseg": 0.439, "depth": 0.585}


def delta_m(
    scores: Mapping[str, float],
    baselines: Mapping[str, float],
    lower_is_better: Mapping[str, bool],
) -> float:
    """Mean over the tasks of `scores` of the relative gain over the baseline, as a fraction.

    (1/J) * sum_j (-1)^l_j (M_j - S_j) / S_j with l_j = 1 if lower is better (M3ViT section
    4.1). Multiply by 100 for the papers' per cent.
    Raises UserError if a baseline is missing or 0, or if there is no score.
    """
    if not scores:
        raise UserError("Delta_m needs at least one task's score.")
    gains = []
    for name, score in scores.items():
        if not baselines.get(name):
            known = ", ".join(sorted(baselines)) or "none"
            raise UserError(f"Delta_m has no usable baseline for '{name}' (given: {known}).")
        sign = -1.0 if lower_is_better[name] else 1.0
        gains.append(sign * (score - baselines[name]) / baselines[name])
    return sum(gains) / len(gains)
