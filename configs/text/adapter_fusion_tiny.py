"""Second stage of AdapterFusion: two instructions that no adapter has seen, from seven that have.

    python train.py text/adapter_fusion_tiny

Paper: Pfeiffer et al., arXiv:2005.00247; see `models/adapter_fusion`. Queries, keys and values
train; `text/adapter_fusion_adapters_tiny` is trained first if necessary.

Not trained by us; no score is expected.
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.adapter_fusion_adapters_tiny import TARGETS
from moezoo.configs.text.adapter_fusion_adapters_tiny import config as first

config = replace(
    first,
    name="adapter_fusion_tiny",
    data=replace(first.data, only=TARGETS),  # type: ignore[type-var]
    model=replace(first.model, stage="fusion"),  # type: ignore[type-var]
    start_from="text/adapter_fusion_adapters_tiny",
    train=replace(first.train, steps=200),
)
