"""MixDA's second stage: two instructions that no domain has, from the first stage's adapters.

    python train.py text/mixda_tiny

Paper: Diao et al., arXiv:2306.05406; see `models/mixda`. Gate and task adapters train;
`text/mixda_domains_tiny` is trained first if necessary.

Expected: exact match 0.17, which is chance (README of `models/mixda`).
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.mixda_domains_tiny import config as first

config = replace(
    first,
    name="mixda_tiny",
    data=replace(first.data, only=("compare", "previous")),  # type: ignore[type-var]
    model=replace(first.model, stage="task"),  # type: ignore[type-var]
    start_from="text/mixda_domains_tiny",
    train=replace(first.train, steps=200),
    optimiser=replace(first.optimiser, weight_decay=0.0, warmup=20),
)
