"""MixDA's first stage on a small frozen decoder: adapters of two domains, and old tasks replayed.

    python train.py text/mixda_domains_tiny

Paper: Diao et al., arXiv:2306.05406; see `models/mixda`. Domain 1 are four instructions about
single letters, domain 2 three about whole words and numbers; general text are the eight
instructions that the base, `text/skills_tiny`, has learned. The base is trained first if necessary.
"""

from __future__ import annotations

from moezoo.backbones.decoder import DecoderConfig
from moezoo.configs.text.skills_tiny import SKILLS
from moezoo.domains.text.domain import TextDataConfig
from moezoo.models.mixda.model import MixDAConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)

LETTERS = ("count_a", "no_vowels", "sort", "swap_halves")
WORDS = ("double", "last_word", "subtract")
# The data's order of tasks.
TASKS = tuple(sorted((*SKILLS, *LETTERS, *WORDS)))
DOMAINS = tuple(1 * (task in LETTERS) + 2 * (task in WORDS) for task in TASKS)

config = Config(
    name="mixda_domains_tiny",
    tasks=("lm",),
    data=TextDataConfig(name="instructions", length=64, only=TASKS),
    model=MixDAConfig(
        decoder=DecoderConfig(
            vocabulary=259, width=128, depth=4, heads=4, groups=2, hidden=256, length=128
        ),
        stage="domain",
        layers=(2, 3),
        domains=DOMAINS,
        bottleneck=64,
        gate_hidden=128,
        reduction=8,
    ),
    start_from="text/skills_tiny",
    optimiser=OptimConfig(
        kind="adamw", lr=3e-3, schedule="cosine", warmup=40, weight_decay=0.05, clip=1.0
    ),
    train=TrainConfig(steps=400, batch=32, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=64),
    checkpoint=CheckpointConfig(every=200),
)
