"""SMoRA on Qwen2.5-7B-Instruct with the paper's recipe; see `text/smora_llama2_7b`.

    python train.py text/smora_qwen25_7b --start-from Qwen2.5-7B-Instruct \\
      --data.tokenizer Qwen2.5-7B-Instruct \\
      --data.train_file train.jsonl --data.test_file test.jsonl

161 M parameters in ranks and 72 M in routers, plus 7.6 billion frozen ones. Not trained by us.
"""

from __future__ import annotations

from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.nn.rope import RopeConfig
from moezoo.train.config import Config, EvaluateConfig, MeshConfig, OptimConfig, TrainConfig

STEPS = 3 * 100_000 // 128

config = Config(
    name="smora_qwen25_7b",
    tasks=("lm",),
    data=TextDataConfig(name="jsonl", length=2048, trained="everything", template="chatml"),
    model=SMoRAConfig(
        decoder=DecoderConfig(
            vocabulary=152_064,
            width=3584,
            depth=28,
            heads=28,
            groups=4,
            hidden=18_944,
            length=32_768,
            rope=RopeConfig(theta=1_000_000.0),
            norm_epsilon=1e-6,
            qkv_bias=True,
            dtype="bfloat16",
            remat=True,
            layers="scanned",
        ),
        base_dtype="bfloat16",
    ),
    optimiser=OptimConfig(
        kind="adamw",
        lr=1e-4,
        schedule="cosine",
        warmup=STEPS // 10,
        weight_decay=0.0,
        clip=1.0,
    ),
    train=TrainConfig(steps=STEPS, batch=128, gradient_accumulation=4, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=128),
    mesh=MeshConfig(data=1, fsdp=-1),
)
