"""SMoRA on Llama-2-7B with the paper's recipe, for instruction data of your own.

Paper: Zhao et al., arXiv:2501.15103, on 48 tasks of FLAN-v2: 64 ranks, of which 8 are active per
token, on every linear layer, alpha 16, AdamW at 1e-4 with a cosine schedule after 10 % warm-up,
batches of 128 rows of 2,048 tokens, clip 1, three epochs, the loss on prompts too. 160 M parameters
in ranks and 73 M in routers. Its training mixture was not published in a form we could get; give
files of your own (JSON lines of instruction, input, output, task):

    python train.py text/smora_llama2_7b --start-from Llama-2-7b-hf \\
      --data.tokenizer Llama-2-7b-hf --data.train_file train.jsonl --data.test_file test.jsonl

Steps are for 100,000 rows; set `--train.steps` to three epochs of yours. Packing several examples
into a row is our addition. Not trained by us: it needs accelerators. One chip's share of a step:

    moezoo plan text/smora_llama2_7b --topology v5p:2x2x4 --data.name instructions
"""

from __future__ import annotations

from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.train.config import Config, EvaluateConfig, MeshConfig, OptimConfig, TrainConfig

STEPS = 3 * 100_000 // 128

config = Config(
    name="smora_llama2_7b",
    tasks=("lm",),
    data=TextDataConfig(name="jsonl", length=2048, trained="everything"),
    model=SMoRAConfig(
        decoder=DecoderConfig(dtype="bfloat16", remat=True, layers="scanned"),
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
