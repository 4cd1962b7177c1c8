"""Paths of our parameters and the names that PyTorch checkpoints use, as one table per model.

A line of a table holds our path, their name and how the array lies there; `{0}`, `{1}` stand for
numbers or task names and are the same on both sides. `{e}` in a name of theirs stands for an
expert's number: they keep one array for each, we a stack with a leading axis E.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class ArrayLayout(NamedTuple):
    """`load` turns their array into ours, `store` back."""

    load: Callable[[np.ndarray], np.ndarray]
    store: Callable[[np.ndarray], np.ndarray]


def _swap(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a, -1, -2)


SAME = ArrayLayout(lambda a: a, lambda a: a)
# Linear [out, in], also stacked [E, out, in] -> [..., in, out].
LINEAR = ArrayLayout(_swap, _swap)
# Conv2d [out, in, kh, kw] -> [kh, kw, in, out].
CONV = ArrayLayout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
# ConvTranspose2d [in, out, kh, kw] -> [kh, kw, in, out], turned by 180 degrees.
CONV_TRANSPOSE = ArrayLayout(
    lambda a: a[:, :, ::-1, ::-1].transpose(2, 3, 0, 1),
    lambda a: a.transpose(2, 3, 0, 1)[:, :, ::-1, ::-1],
)


class ParameterName(NamedTuple):
    """One kind of parameter in both worlds."""

    ours: str
    theirs: str
    layout: ArrayLayout = SAME


NameTable = Sequence[ParameterName]

# What the published dense-prediction codes call tasks otherwise than this project.
TASKS = {"human_parts": "parts", "sal": "saliency"}


def linear(ours: str, theirs: str, layout: ArrayLayout = LINEAR) -> list[ParameterName]:
    """Kernel and bias of a linear layer or convolution."""
    return [
        ParameterName(f"{ours}/kernel", f"{theirs}.weight", layout),
        ParameterName(f"{ours}/bias", f"{theirs}.bias"),
    ]


def norm(ours: str, theirs: str) -> list[ParameterName]:
    """Scale and bias of a normalisation."""
    return [
        ParameterName(f"{ours}/scale", f"{theirs}.weight"),
        ParameterName(f"{ours}/bias", f"{theirs}.bias"),
    ]


def batch_norm(ours: str, theirs: str) -> list[ParameterName]:
    """As `norm`, with the running statistics."""
    return norm(ours, theirs) + [
        ParameterName(f"{ours}/mean", f"{theirs}.running_mean"),
        ParameterName(f"{ours}/var", f"{theirs}.running_var"),
    ]


VIT: NameTable = [
    ParameterName("cls_token", "cls_token"),
    ParameterName("pos_embed", "pos_embed"),
    *linear("patch_embed", "patch_embed.proj", CONV),
    *norm("blocks/{0}/norm1", "blocks.{0}.norm1"),
    *norm("blocks/{0}/norm2", "blocks.{0}.norm2"),
    *linear("blocks/{0}/attn/qkv", "blocks.{0}.attn.qkv"),
    *linear("blocks/{0}/attn/proj", "blocks.{0}.attn.proj"),
    *linear("blocks/{0}/mlp/fc1", "blocks.{0}.mlp.fc1"),
    *linear("blocks/{0}/mlp/fc2", "blocks.{0}.mlp.fc2"),
    *norm("norm", "norm"),
    *linear("head", "head"),
]


def rms_norm(ours: str, theirs: str) -> list[ParameterName]:
    """Scale of a normalisation without a bias."""
    return [ParameterName(f"{ours}/scale", f"{theirs}.weight")]


# Llama and Qwen in transformers, and what sparse decoders share with them.
DECODER: NameTable = (
    ParameterName("embed/table", "model.embed_tokens.weight"),
    *(
        name
        for part in ("q", "k", "v", "o")
        for name in linear(f"layers/{{0}}/attn/{part}", f"model.layers.{{0}}.self_attn.{part}_proj")
    ),
    *(
        name
        for part in ("gate", "up", "down")
        for name in linear(f"layers/{{0}}/mlp/{part}", f"model.layers.{{0}}.mlp.{part}_proj")
    ),
    *rms_norm("layers/{0}/attn/q_norm", "model.layers.{0}.self_attn.q_norm"),
    *rms_norm("layers/{0}/attn/k_norm", "model.layers.{0}.self_attn.k_norm"),
    *rms_norm("layers/{0}/norm1", "model.layers.{0}.input_layernorm"),
    *rms_norm("layers/{0}/norm2", "model.layers.{0}.post_attention_layernorm"),
    *rms_norm("norm", "model.norm"),
    *linear("lm_head", "lm_head"),
)


def routed(theirs: str, gate: str, up: str, down: str, router: str = "gate") -> NameTable:
    """Router and experts of a sparse layer, `theirs` within a layer; an expert's parts by name."""
    ours, within = "layers/{0}/mlp/routed", f"model.layers.{{0}}.{theirs}"
    parts = {"gate": gate, "up": up, "down": down}
    return [
        ParameterName(f"{ours}/router/kernel", f"{within}.{router}.weight", LINEAR),
        *(
            ParameterName(
                f"{ours}/experts/{part}/kernel", f"{within}.experts.{{e}}.{name}.weight", LINEAR
            )
            for part, name in parts.items()
        ),
    ]


MIXTRAL: NameTable = (*DECODER, *routed("block_sparse_moe", "w1", "w3", "w2"))
# Qwen2-MoE, Qwen3-MoE and OLMoE.
SPARSE_DECODER: NameTable = (
    *DECODER,
    *routed("mlp", "gate_proj", "up_proj", "down_proj"),
    *(
        name
        for part in ("gate", "up", "down")
        for name in linear(
            f"layers/{{0}}/mlp/shared/mlp/{part}",
            f"model.layers.{{0}}.mlp.shared_expert.{part}_proj",
        )
    ),
    *linear("layers/{0}/mlp/shared/weight", "model.layers.{0}.mlp.shared_expert_gate"),
)


# DeepSeek-V2 and V3, dots.llm1 and GLM-4.5, whose attention may be latent.
LATENT = {
    "q_down": "q_a_proj", "q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa", "kv_up": "kv_b_proj",
}  # fmt: skip
GROUPED_DECODER: NameTable = (
    *DECODER,
    *(
        name
        for ours, theirs in LATENT.items()
        for name in linear(f"layers/{{0}}/attn/{ours}", f"model.layers.{{0}}.self_attn.{theirs}")
    ),
    *rms_norm("layers/{0}/attn/q_down_norm", "model.layers.{0}.self_attn.q_a_layernorm"),
    *rms_norm("layers/{0}/attn/kv_down_norm", "model.layers.{0}.self_attn.kv_a_layernorm"),
    *routed("mlp", "gate_proj", "up_proj", "down_proj"),
    ParameterName(
        "layers/{0}/mlp/routed/router/bias", "model.layers.{0}.mlp.gate.e_score_correction_bias"
    ),
    *(
        name
        for part in ("gate", "up", "down")
        for name in linear(
            f"layers/{{0}}/mlp/shared/{part}",
            f"model.layers.{{0}}.mlp.shared_experts.{part}_proj",
        )
    ),
)


def _half(number: int) -> ArrayLayout:
    """One half of the rows of stacked [E, 2 * out, in]; `store` gives their shape alone."""

    def load(a: np.ndarray) -> np.ndarray:
        rows = a.shape[1] // 2
        return _swap(a[:, number * rows : (number + 1) * rows])

    def store(a: np.ndarray) -> np.ndarray:
        e, inputs, outputs = a.shape
        return np.broadcast_to(np.zeros((), a.dtype), (e, 2 * outputs, inputs))

    return ArrayLayout(load, store)


FUSED = "mlp.experts.gate_up_proj"
# The stacks that transformers 5 holds in memory and writes with `save_original_format=False`, in
# all of these families.
FUSED_STACKS: NameTable = tuple(
    ParameterName(
        f"layers/{{0}}/mlp/routed/experts/{ours}/kernel", f"model.layers.{{0}}.{name}", layout
    )
    for ours, name, layout in (
        ("gate", FUSED, _half(0)),
        ("up", FUSED, _half(1)),
        ("down", "mlp.experts.down_proj", LINEAR),
    )
)


def fused(names: NameTable) -> NameTable:
    """A family's table for files with such stacks, which are read only.

    The first line that fits a path counts. Mixtral's router is called as that of the others there.
    """
    return (*FUSED_STACKS, *(SPARSE_DECODER if names is MIXTRAL else names))


EXPERT = "{e}"


class Place(NamedTuple):
    """Where an array of ours lies in their files, and how.

    theirs: their name, with `EXPERT` in it where our stack is an array for each expert there.
    """

    theirs: str
    layout: ArrayLayout

    @property
    def stacked(self) -> bool:
        """Whether it is the stack of several of their arrays, each of this layout."""
        return EXPERT in self.theirs

    def of_expert(self, number: int) -> str:
        """Their name for one expert's array."""
        return self.theirs.replace(EXPERT, str(number))


def place(path: str, table: NameTable) -> Place:
    """Their name for one of our paths; raises KeyError where the table has none."""
    for line in table:
        if match := _pattern(line.ours).match(path):
            found = [match[f"g{i}"] for i in range(len(match.groups()))]
            return Place(line.theirs.format(*found, e=EXPERT), line.layout)
    raise KeyError(path)


class Translated(NamedTuple):
    """Arrays under their new names, and names that no line of the table knows."""

    arrays: dict[str, np.ndarray]
    unknown: list[str]


def to_ours(state: Mapping[str, np.ndarray], table: NameTable) -> Translated:
    """A PyTorch state dictionary under our paths and in our layouts."""
    lines = [(_pattern(line.theirs), line.ours, line.layout.load) for line in table]
    return _translate(state, lines)


def to_theirs(flat: Mapping[str, np.ndarray], table: NameTable) -> Translated:
    """Flat parameters and statistics under their names and in their layouts."""
    lines = [(_pattern(line.ours), line.theirs, line.layout.store) for line in table]
    return _translate(flat, lines)


# The number in a name: others would be a second name of the same thing.
DECIMAL = r"(0|[1-9][0-9]{0,8})"


def put(arrays: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
    """Add an array under a name that is not taken; raises ValueError where it is."""
    if name in arrays:
        raise ValueError(f"there are two arrays for {name}")
    arrays[name] = array


def of_tasks(arrays: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays that are there for every task, by name and number, as one each with a first axis.

    Raises ValueError where a number is missing, and for arrays of different shapes.
    """
    made = {}
    for name, found in arrays.items():
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"{name} is there for {sorted(found)} only")
        if len({array.shape for array in found.values()}) > 1:
            raise ValueError(f"{name} has other shapes for some tasks than for others")
        made[name] = np.stack([found[task] for task in sorted(found)])
    return made


def known(paths: Iterable[str], table: NameTable) -> set[str]:
    """Those of our paths that a line of the table has."""
    patterns = [_pattern(line.ours) for line in table]
    return {path for path in paths if any(pattern.match(path) for pattern in patterns)}


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\d)\}", template)
    texts = (re.escape(p) if i % 2 == 0 else rf"(?P<g{p}>\w+)" for i, p in enumerate(parts))
    return re.compile("".join(texts) + r"\Z")


def _translate(arrays: Mapping[str, np.ndarray], lines: Iterable[tuple]) -> Translated:
    lines = list(lines)
    done, unknown = {}, []
    for name, array in arrays.items():
        for pattern, template, layout in lines:
            if match := pattern.match(name):
                path = template.format(*(match[f"g{i}"] for i in range(len(match.groups()))))
                if path in done:
                    raise ValueError(f"there are two arrays for {path}")
                done[path] = layout(np.asarray(array))
                break
        else:
            unknown.append(name)
    return Translated(done, unknown)
