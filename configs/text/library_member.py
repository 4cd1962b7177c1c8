"""A member of a library: plain LoRA of one instruction task on a small frozen decoder.

    for t in compare count_a double last_word no_vowels previous sort subtract swap_halves; do
        python train.py text/library_member --name lora_$t --data.only $t
    done
    moezoo library build runs/lora_* --base runs/skills_tiny --clusters 3 --out library
    moezoo bench library library runs/skills_tiny

Rank 8 on every linear layer; the base, `text/skills_tiny`, is trained first if necessary. Expected
exact match of each and of all routes over them: README of `domains/text`.
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.smora_tiny import config as smora
from moezoo.models.smora.model import SMoRAConfig

config = replace(
    smora,
    name="library_member",
    data=replace(smora.data, only=("sort",), test=200),  # type: ignore[type-var]
    model=SMoRAConfig(
        decoder=smora.model.decoder,  # type: ignore[attr-defined]
        update="lora",
        ranks=8,
    ),
    train=replace(smora.train, steps=600),
    checkpoint=replace(smora.checkpoint, every=600),
)
