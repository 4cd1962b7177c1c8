"""Soft-MoA on UrbanSound8K with the published recipe.

    python train.py sounds/soft_moa_urbansound8k --data.archive UrbanSound8K \\
      --start-from ast-finetuned-audioset-10-10-0.4593

Paper: Cappellazzo et al., arXiv:2402.00828, settings of its public code: seven experts of one slot
beside attention (923,640 parameters without the head), AdamW at 5e-3 without warm-up, weight decay
0.1 on everything that trains, 30 epochs with batches of 32. Fold `--data.fold` is for testing and
the next for validation; the published code trains on nine and chooses its epoch on the test fold.
The last parameters are scored, as in that code. The paper's numbers could not be read, and we have
not trained this: neither data set nor AST could be downloaded where it was written. The AST is the
folder of `MIT/ast-finetuned-audioset-10-10-0.4593` from Hugging Face; its positions are cut to 400
frames, while the published code sets them to zero (`reference_quirks` "zero_positions").
"""

from __future__ import annotations

from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

CLIPS = 6_985  # in eight folds, on average

config = Config(
    name="soft_moa_urbansound8k",
    tasks=("event",),
    data=AudioDataConfig(
        name="urbansound8k", frames=400, mel=128, augment=("freq_mask", "time_mask")
    ),
    model=SoftMoAConfig(),
    optimiser=OptimConfig(
        kind="adamw", lr=5e-3, schedule="cosine", b2=0.98, eps=1e-6, weight_decay=0.1, decay="all"
    ),
    train=TrainConfig(steps=30 * CLIPS // 32, batch=32, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=32, every=1000, pictures=8),
    checkpoint=CheckpointConfig(every=1000),
)
