"""The `protocol` section of runs on images: where benchmarks pose or score a task differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moezoo.fields import Range


@dataclass(frozen=True)
class ProtocolConfig:
    """How tasks are posed and scored, where benchmarks differ."""

    saliency_channels: Literal[1, 2] = 1
    """1: a sigmoid (M3ViT); 2: a softmax (TaskPrompter's code base)."""
    edge_positive_weight: Annotated[float, Range(0, 1)] = 0.95
    """Share of the edge loss that edge pixels get; the rest goes to the others."""
    edge: Literal["rooms", "pascal", "pascal_regions", "nyud"] | None = None
    """Boundary benchmark (tolerance, thresholds, truth); default: the data set's own. pascal scores
    drawn lines, pascal_regions (PASCAL-Context's own) the region maps."""
