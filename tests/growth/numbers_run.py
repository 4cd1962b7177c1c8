"""A run of a system and a domain that the package does not know."""

from moezoo.train.config import CheckpointConfig, OptimConfig, TrainConfig
from tests.growth.numbers import numbers

config = numbers(
    "numbers",
    optimiser=OptimConfig(lr=1e-2, warmup=0),
    train=TrainConfig(steps=4, batch=8, log_every=1),
    checkpoint=CheckpointConfig(every=2),
)
