"""Names of the parameters of Mod-Squad's published code.

Its heads (`task_heads`, one linear map from a patch to its pixels or classes) have no place here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from moezoo.weights.names import (
    DECIMAL,
    VIT,
    ArrayLayout,
    NameTable,
    ParameterName,
    Translated,
    linear,
    of_tasks,
    put,
    to_ours,
    to_theirs,
)


def _rows(a: np.ndarray) -> np.ndarray:
    if a.ndim != 3 or len(a) != 1:
        raise ValueError(f"task_embedding is {list(a.shape)}, not one row for every task")
    return a[0]


# A row for every task, [1, J, D] there.
ROWS = ArrayLayout(_rows, lambda a: a[None])
GATE = "f_gate"  # a linear map for every task, which are one kernel [J, D, E] here
# Counts and running means that the losses keep between steps.
COUNTERS = (
    "acc_probs", "acc_gates", "acc_freq", "acc_lsesq", "acc_lsesq_count", "MI_task_gate",
    "topk_acc_probs", "task_gate_freq",
)  # fmt: skip
BEYOND = re.compile(rf"(task_heads|fc_norm|head)\..*|.*\.({'|'.join(COUNTERS)})")
TOLD_BY = ("blocks.0.attn.q_proj.experts.w", "blocks.0.mlp.experts.w", "blocks.1.mlp.experts.w")


def _experts(ours: str, theirs: str) -> list[ParameterName]:
    """Stacks [E, in, out], which lie there as here."""
    return [
        ParameterName(f"{ours}/kernel", f"{theirs}.w"),
        ParameterName(f"{ours}/bias", f"{theirs}.b"),
    ]


MOD_SQUAD: NameTable = [
    *VIT,
    ParameterName("task_bias/bias", "task_embedding", ROWS),
    *_experts("blocks/{0}/attn/experts/query", "blocks.{0}.attn.q_proj.experts"),
    *_experts("blocks/{0}/attn/experts/out", "blocks.{0}.attn.q_proj.output_experts"),
    ParameterName("blocks/{0}/attn/router/kernel", f"blocks.{{0}}.attn.q_proj.{GATE}"),
    *linear("blocks/{0}/attn/kv", "blocks.{0}.attn.kv_proj.0"),
    *_experts("blocks/{0}/mlp/experts/fc1", "blocks.{0}.mlp.experts"),
    *_experts("blocks/{0}/mlp/experts/fc2", "blocks.{0}.mlp.output_experts"),
    ParameterName("blocks/{0}/mlp/router/kernel", f"blocks.{{0}}.mlp.{GATE}"),
]


def plain(name: str) -> str:
    """A name without what training on several devices puts in front."""
    return name.removeprefix("module.")


def from_mod_squad(state: Mapping[str, np.ndarray]) -> Translated:
    """A state dictionary of the published code as flat parameters of ours.

    Its gates `f_gate.0.0.weight`, `f_gate.1.0.weight`, ... [E, D] become one kernel [J, D, E].
    """
    known: dict[str, np.ndarray] = {}
    plainly: dict[str, np.ndarray] = {}
    gates: dict[str, dict[int, np.ndarray]] = {}
    for name, array in state.items():
        name = plain(name)
        put(plainly, name, array)
    for name, array in plainly.items():
        if match := re.fullmatch(rf"(.*\.{GATE})\.{DECIMAL}\.0\.weight", name):
            gates.setdefault(match[1], {})[int(match[2])] = array.T
        else:
            known[name] = array
    return to_ours(known | of_tasks(gates), MOD_SQUAD)


def to_reference(flat: Mapping[str, np.ndarray]) -> Translated:
    """Inverse of `from_mod_squad`; what their code has no place for, as heads, is `unknown`."""
    arrays, unknown = to_theirs(flat, MOD_SQUAD)
    state: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith(f".{GATE}"):
            state |= {f"{name}.{task}.0.weight": kernel.T for task, kernel in enumerate(array)}
        else:
            state[name] = array
    return Translated(state, unknown)
