"""Examples in groups of prompts that pull a decoder the same way: what ELREA trains its experts on.

Li et al., arXiv:2502.00089, cluster the gradients of 5,000 examples by BIRCH and give all others to
the nearest cluster; here all examples take part in k-means. One run per group, then a library of
these with `--gradients`, is what route `elrea` asks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moezoo.domains.text.data.example import Chat, Instruction
from moezoo.domains.text.data.jsonl import InstructionFile
from moezoo.domains.text.gradients import gradient_features
from moezoo.domains.text.library import BaseDecoder, question_tokens
from moezoo.errors import UserError
from moezoo.json_text import json_text
from moezoo.nn import surgery
from moezoo.nn.layers import Linear
from moezoo.ops.kmeans import kmeans
from moezoo.weights.files import check_new, written_whole
from moezoo.weights.library import LayerForm


def adapted_forms(base: BaseDecoder, rank: int) -> dict[str, LayerForm]:
    """Adapters of one rank on all linear layers but the head."""
    found = {}
    for path, layer in surgery.find(base.model, Linear).items():
        if path.startswith("layers/"):
            inputs, outputs = layer.kernel.get_value().shape
            found[path] = LayerForm(inputs, outputs, rank, 1.0)
    return found


def split_examples(
    base: BaseDecoder, file: Path, clusters: int, rank: int, out: Path, seed: int = 0
) -> list[int]:
    """Write the examples of a file of JSON lines in groups by their prompts' gradients.

    `cluster_0.jsonl` and so on, in a folder that appears whole or not at all; returns how many
    examples each has. Raises UserError for a damaged file, and fewer different prompts than groups.
    """
    if clusters < 2:
        raise UserError(f"{clusters} groups split nothing: ask for 2 or more.")
    if rank < 1:
        raise UserError(f"The rank is {rank}; it must be at least 1.")
    check_new(out)
    examples = InstructionFile(file)
    rows = [question_tokens(base, examples[i].turns) for i in range(len(examples))]
    features = gradient_features(base.model, adapted_forms(base, rank), rows, base.tokenizer.pad)
    different = len(np.unique(features, axis=0))
    if different < clusters:
        raise UserError(
            f"{file} has {different} different prompts, which make no {clusters} groups: ask for "
            "fewer."
        )
    group_N = kmeans(features, clusters, np.random.default_rng(seed)).cluster_N
    with written_whole(out) as temporary:
        for group in range(clusters):
            lines = [_line(examples[int(i)]) for i in np.flatnonzero(group_N == group)]
            (temporary / f"cluster_{group}.jsonl").write_text("".join(lines), encoding="utf-8")
    return np.bincount(group_N, minlength=clusters).tolist()


def _line(example: Instruction | Chat) -> str:
    """An example as a line that `InstructionFile` reads."""
    turns = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    return json_text({"messages": turns, "task": example.task})
