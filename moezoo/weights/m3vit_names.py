"""Names of the published M3ViT code's parameters.

Its tasks `human_parts` and `sal` are `parts` and `saliency` here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from moezoo.weights.names import (
    CONV,
    CONV_TRANSPOSE,
    DECIMAL,
    LINEAR,
    TASKS,
    VIT,
    NameTable,
    ParameterName,
    Translated,
    batch_norm,
    linear,
    norm,
    of_tasks,
    put,
    to_ours,
    to_theirs,
)

ENCODER: NameTable = [
    *VIT,
    ParameterName("blocks/{0}/mlp/router/kernel", "blocks.{0}.mlp.gate.w_gate"),
    *linear("blocks/{0}/mlp/experts/fc1", "blocks.{0}.mlp.experts.htoh4", LINEAR),
    *linear("blocks/{0}/mlp/experts/fc2", "blocks.{0}.mlp.experts.h4toh", LINEAR),
    *linear("task_embedding/fc1", "gate_task_represent.fc1"),
    *linear("task_embedding/fc2", "gate_task_represent.fc2"),
    *norm("task_embedding/norm", "gate_task_represent.norm"),
]

HEAD: NameTable = [
    *norm("norm", "norm"),
    *linear("convs/{0}", "conv_{0}", CONV),
    *batch_norm("norms/{0}", "syncbn_fc_{0}"),
]

TAM: NameTable = [
    *(
        line
        for ours, theirs in (("fuse", "layers0"), ("attend", "layers1"), ("mix", "layers2"))
        for line in (
            *linear(f"{ours}/conv", f"{theirs}.0", CONV),
            *batch_norm(f"{ours}/norm", f"{theirs}.1"),
        )
    ),
    *linear("down/{0}/conv", "encoder{0}.0", CONV),
    *batch_norm("down/{0}/norm", "encoder{0}.1"),
    *linear("up/{0}/conv", "decoder{0}.0", CONV_TRANSPOSE),
    *batch_norm("up/{0}/norm", "decoder{0}.1"),
    *linear("refine/{0}/conv", "layers3.{0}.0", CONV),
    *batch_norm("refine/{0}/norm", "layers3.{0}.1"),
    *linear("project/{0}", "layers4.{0}.0", CONV),
]


def _inside(table: NameTable, ours: str, theirs: str) -> list[ParameterName]:
    """A table of sub-modules under a prefix that takes the first placeholder."""
    shifted = [(n.ours.replace("{0}", "{1}"), n.theirs.replace("{0}", "{1}"), n) for n in table]
    return [ParameterName(ours + a, theirs + b, n.layout) for a, b, n in shifted]


MODEL: NameTable = [
    *(ParameterName(n.ours, f"backbone.{n.theirs}", n.layout) for n in ENCODER),
    *_inside(HEAD, "heads/{0}/", "decoders.{0}."),
    *_inside(TAM, "tam/{0}/", "tam_model{0}."),
]


OUTSIDE = ("backbone.", "decoders.", "tam_model")


def from_m3vit(state: Mapping[str, np.ndarray], table: NameTable = MODEL) -> Translated:
    """A state dictionary of the published code as flat parameters and statistics of ours.

    Its routers of several tasks are separate arrays `gate.0.w_gate`, `gate.1.w_gate`, ... and
    become one kernel [J, D, E]. A leading `module.` and BatchNorm's batch counters are left out.
    """
    plain: dict[str, np.ndarray] = {}
    routers: dict[str, dict[int, np.ndarray]] = {}
    for name, array in state.items():
        name = name.removeprefix("module.")
        if name.endswith("num_batches_tracked"):
            continue
        put(plain, _renamed(name, TASKS), array)
    for name in list(plain):
        if match := re.fullmatch(rf"(.*\bgate)\.{DECIMAL}\.w_gate", name):
            routers.setdefault(f"{match[1]}.w_gate", {})[int(match[2])] = plain.pop(name)
    for name, kernel in of_tasks(routers).items():
        put(plain, name, kernel)
    return to_ours(plain, table)


def whole(name: str) -> str:
    """A name of the code's whole model in our words, for one of that or of its encoder alone."""
    name = _renamed(name.removeprefix("module."), TASKS)
    return name if name.startswith(OUTSIDE) else f"backbone.{name}"


def from_checkpoint(state: Mapping[str, np.ndarray]) -> Translated:
    """As `from_m3vit`, of the whole model or of its encoder alone, as it was pretrained."""
    named: dict[str, np.ndarray] = {}
    for name, array in state.items():
        put(named, whole(name), array)
    return from_m3vit(named)


def to_reference(flat: Mapping[str, np.ndarray], table: NameTable = MODEL) -> Translated:
    """Inverse of `from_m3vit`."""
    arrays, unknown = to_theirs(flat, table)
    state = {}
    for name, array in arrays.items():
        name = _renamed(name, {ours: theirs for theirs, ours in TASKS.items()})
        if name.endswith("gate.w_gate") and array.ndim == 3:
            prefix = name.removesuffix("w_gate")
            state |= {f"{prefix}{task}.w_gate": kernel for task, kernel in enumerate(array)}
        else:
            state[name] = array
    return Translated(state, unknown)


def _renamed(name: str, tasks: Mapping[str, str]) -> str:
    return ".".join(tasks.get(part, part) for part in name.split("."))
