"""Names of the parameters of MLoRE's published code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moezoo.weights.names import (
    CONV,
    TASKS,
    VIT,
    ArrayLayout,
    NameTable,
    ParameterName,
    Translated,
    batch_norm,
    linear,
    norm,
    put,
    to_ours,
)

# Conv2d 1x1 [out, in, 1, 1] -> [in, out].
POINT = ArrayLayout(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])


def _block(ours: str, theirs: str) -> list[ParameterName]:
    own, router = f"{ours}/{{0}}/tasks/{{1}}/", f"{theirs}.{{0}}.router_1.{{1}}."
    expert = f"{ours}/{{0}}/experts/experts/{{1}}/"
    their_expert = f"{theirs}.{{0}}.lora_list_1.{{1}}."
    return [
        *linear(f"{expert}down", f"{their_expert}W", CONV),
        *linear(f"{expert}up", f"{their_expert}M", CONV),
        *linear(f"{ours}/{{0}}/shared", f"{theirs}.{{0}}.share_conv", CONV),
        *linear(f"{own}enter", f"{theirs}.{{0}}.conv1.{{1}}", CONV),
        *linear(f"{own}own/down", f"{theirs}.{{0}}.conv2.{{1}}.W", CONV),
        *linear(f"{own}own/up", f"{theirs}.{{0}}.conv2.{{1}}.M", CONV),
        *linear(f"{own}leave", f"{theirs}.{{0}}.conv3.{{1}}", CONV),
        *batch_norm(f"{own}norm", f"{theirs}.{{0}}.bn.{{1}}"),
        *batch_norm(f"{own}norm_mixture", f"{theirs}.{{0}}.bn_all.{{1}}"),
        *linear(f"{own}router/describe", f"{router}0.conv1", POINT),
        *norm(f"{own}router/norm", f"{router}0.ln"),
        *linear(f"{own}router/project", f"{router}0.conv3", POINT),
        *linear(f"{own}router/weigh", f"{router}0.convsp"),
        *norm(f"{own}router/norm_sum", f"{router}0.ln_sp"),
        *linear(f"{own}router/describe_sum", f"{router}0.conv2", POINT),
        *linear(f"{own}router/out", f"{router}1", POINT),
    ]  # fmt: skip


_ENCODER: NameTable = [
    *VIT,
    *linear("fuse/{0}", "fea_fuse.{0}", CONV),
    *_block("first", "MLoRE_1"),
    *_block("second", "MLoRE_2"),
    *linear("mix/{0}/look/conv", "task_mask.{0}.0", CONV),
    *batch_norm("mix/{0}/look/norm", "task_mask.{0}.1"),
    *linear("mix/{0}/out", "task_mask.{0}.3", CONV),
]

MLORE: NameTable = [
    *(ParameterName(n.ours, f"backbone.{n.theirs}", n.layout) for n in _ENCODER),
    *linear("heads/{0}/conv", "heads.{0}.mt_proj.0", CONV),
    *batch_norm("heads/{0}/norm", "heads.{0}.mt_proj.1"),
    *linear("heads/{0}/out", "heads.{0}.linear_pred", CONV),
]


def plain(name: str) -> str:
    """A name of the published code in our words for tasks."""
    return ".".join(TASKS.get(part, part) for part in name.removeprefix("module.").split("."))


def from_mlore(state: Mapping[str, np.ndarray]) -> Translated:
    """A state dictionary of MLoRE's published code as flat parameters and statistics of ours.

    Its tasks `human_parts` and `sal` are `parts` and `saliency` here.

    Its position of a class token, which the model has not got, is left out, and so are the batch
    counters of its normalisations.
    """
    known: dict[str, np.ndarray] = {}
    for name, array in state.items():
        name = plain(name)
        if name.endswith("num_batches_tracked"):
            continue
        if name == "backbone.pos_embed":
            array = array[:, 1:]
        put(known, name, array)
    return to_ours(known, MLORE)
