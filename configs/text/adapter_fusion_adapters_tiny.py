"""First stage of AdapterFusion on a small frozen decoder: an adapter for each of seven tasks.

    python train.py text/adapter_fusion_adapters_tiny

Paper: Pfeiffer et al., arXiv:2005.00247; see `models/adapter_fusion`. Base and optimiser are those
of `text/smora_tiny`; the base, `text/skills_tiny`, is trained first if necessary.

Not trained by us; no score is expected.
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.smora_tiny import NEW
from moezoo.configs.text.smora_tiny import config as smora
from moezoo.models.adapter_fusion.model import AdapterFusionConfig

TARGETS = ("compare", "previous")  # kept for the second stage
SOURCES = tuple(task for task in NEW if task not in TARGETS)

config = replace(
    smora,
    name="adapter_fusion_adapters_tiny",
    data=replace(smora.data, only=SOURCES),  # type: ignore[type-var]
    model=AdapterFusionConfig(
        decoder=smora.model.decoder,  # type: ignore[attr-defined]
        stage="adapters",
        tasks=len(SOURCES),
        bottleneck=16,
    ),
)
