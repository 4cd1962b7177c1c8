"""SMoRA on a small frozen decoder: instruction tasks that conflict with each other.

    python train.py text/smora_tiny
    python train.py text/smora_tiny --name lora_64 --model.update lora --model.alpha 128
    python train.py text/smora_tiny --name lora_8 --model.update lora --model.ranks 8
    python train.py text/smora_tiny --name mix_1 --model.update mixture --model.top_k 1
    python train.py text/smora_tiny --name mix_2 --model.update mixture --model.top_k 2
    python train.py text/smora_tiny --name block_4 --model.block 4
    python train.py text/smora_tiny --name block_8 --model.block 8 --model.gate score

Paper: Zhao et al., arXiv:2501.15103; see `models/smora`. The base, `text/skills_tiny`, is trained
first if necessary, on eight other tasks. 64 ranks, of which 8 are active per token, on every linear
layer, as in the paper; the nine tasks are generated, so that every answer is exact. A block that
works alone is weighted by its bare score, a LoRA that works alone by its probability: weights that
add up to 1 would always be 1, and the routers would not learn.
"""

from __future__ import annotations

from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)

NEW = (
    "compare",
    "count_a",
    "double",
    "last_word",
    "no_vowels",
    "previous",
    "sort",
    "subtract",
    "swap_halves",
)

config = Config(
    name="smora_tiny",
    tasks=("lm",),
    data=TextDataConfig(name="instructions", length=64, only=NEW),
    model=SMoRAConfig(
        decoder=DecoderConfig(
            vocabulary=259, width=128, depth=4, heads=4, groups=2, hidden=256, length=128
        ),
        rate=1e-3,
    ),
    start_from="text/skills_tiny",
    optimiser=OptimConfig(
        kind="adamw", lr=3e-3, schedule="cosine", warmup=40, weight_decay=0.0, clip=1.0
    ),
    train=TrainConfig(steps=400, batch=32, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=64),
    checkpoint=CheckpointConfig(every=200),
)
