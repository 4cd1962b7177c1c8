"""Soft-MoA on Speech Commands v2, 35 words, with the published recipe.

    python train.py sounds/soft_moa_speech_commands --data.archive speech_commands_v0.02 \\
      --start-from ast-finetuned-audioset-10-10-0.4593

Paper: Cappellazzo et al., arXiv:2402.00828, settings of its public code: seven experts of one slot
beside attention (923,640 parameters without the head), AdamW at 5e-3 without warm-up, weight decay
0.1 on everything that trains, 75 epochs with batches of 128. The official split. The last
parameters are scored, as in that code. The paper's numbers could not be read, and we have not
trained this: neither data set nor AST could be downloaded where it was written. The AST is the
folder of `MIT/ast-finetuned-audioset-10-10-0.4593` from Hugging Face; its positions are cut to 100
frames, while the published code sets them to zero (`reference_quirks` "zero_positions").
"""

from __future__ import annotations

from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

CLIPS = 84_843  # in the official split

config = Config(
    name="soft_moa_speech_commands",
    tasks=("word",),
    data=AudioDataConfig(name="speech_commands", frames=100, mel=128),
    model=SoftMoAConfig(),
    optimiser=OptimConfig(
        kind="adamw", lr=5e-3, schedule="cosine", b2=0.98, eps=1e-6, weight_decay=0.1, decay="all"
    ),
    train=TrainConfig(steps=75 * CLIPS // 128, batch=128, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=128, every=2000, pictures=8),
    checkpoint=CheckpointConfig(every=2000),
)
