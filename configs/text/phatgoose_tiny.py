"""A gate for a LoRA that is done: one task of `text/library_member`, frozen.

    python train.py text/library_member --name lora_sort --data.only sort
    python train.py text/phatgoose_tiny --name gate_sort --start-from runs/lora_sort
    moezoo library build runs/gate_sort runs/gate_double --base runs/skills_tiny --out library

Paper: Muqeeth et al., arXiv:2402.05859; see `models/phatgoose`. 100 steps, as the paper's.
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.library_member import config as member
from moezoo.models.phatgoose.model import PhatgooseConfig

config = replace(
    member,
    name="phatgoose_tiny",
    model=PhatgooseConfig(decoder=member.model.decoder),  # type: ignore[attr-defined]
    start_from="text/library_member",
    train=replace(member.train, steps=100),
    checkpoint=replace(member.checkpoint, every=100),
)
