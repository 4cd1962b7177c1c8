"""Names of the parameters of Uni-Perceiver-MoE's published code, and of Uni-Perceiver's.

One table, both ways. What lies otherwise there than here:

- The special token is the last word of their table, without a position and a type, as in all
  released checkpoints (`OLD_CHECKPONT`); here it is a parameter of its own.
- An image's positions are the sum of a place's and a frame's; an image is frame 0. The type of an
  image is not added, so that the modality of images is 0 here.
- One norm of tokens has two names, one for words and one for images.
- Every mixed map has a gate there; that of attention's output is never asked, nor is that of an
  MLP's second layer where it shares the first one's decision, as in all released configurations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from moezoo.weights.names import (
    CONV,
    DECIMAL,
    LINEAR,
    NameTable,
    ParameterName,
    Translated,
    linear,
    norm,
    put,
    to_ours,
    to_theirs,
)

TOLD_BY = "video_embed.embeddings_st_pos.spatial_pos_embed.weight"
WORDS, TYPES = "token_embed.embeddings.weight", "token_embed.embeddings_token_type.weight"
FRAMES = "video_embed.embeddings_st_pos.temporal_pos_embed.weight"
NORMS = ("token_embed.embeddings_norm", "video_embed.embeddings_norm")
TABLE, SPECIAL, MODALITY = "tokens/embed/table", "tokens/special", "tokens/modality"
LAYER = "fused_encoder.layers.{0}"
# Maps by our path within a block, and whose gate decides about them: of which level, if of any.
MAPS = {
    "attn/qkv": ("self_attn.qkv_proj", "attn/level"),
    "attn/proj": ("self_attn.dense", None),
    "mlp/fc1": ("linear1", "mlp/level"),
    "mlp/fc2": ("linear2", "mlp/level2"),
}
PATCHES = "video_embed.embeddings.weight"
VECTORS = re.compile(r".*(norm\d?|ln_post|tag_transform\.[12])\.weight|.*\.(bias|gamma_[12])")
EXPERTS = re.compile(rf"(.*)\.experts\.deepspeed_experts\.{DECIMAL}\.(weight|bias)")
# What training alone needs: temperatures, queues of negatives, the type of images (not added).
BEYOND = re.compile(
    r"loss_prepare\.(logit_scale_\w+|queue_\w+)|video_embed\.embeddings_type\.weight"
    r"|fused_encoder\.layers\.\d+\.self_attn\.dense\.gate\..*"
)


def _map(ours: str, theirs: str, level: str | None) -> list[ParameterName]:
    """A map, dense or mixed, and the gate that decides about it."""
    ours, theirs = f"encoder/blocks/{{0}}/{ours}", f"{LAYER}.{theirs}"
    made = linear(ours, theirs)
    made += linear(f"{ours}/experts", f"{theirs}.experts", LINEAR)
    if level is None:
        return made
    router, gate = f"encoder/blocks/{{0}}/{level}/router", f"{theirs}.gate"
    made.append(ParameterName(f"{router}/kernel", f"{gate}.wg.weight", LINEAR))
    made += linear(f"{router}/embed", f"{gate}.tag_transform.0")
    return made + norm(f"{router}/norm", f"{gate}.tag_transform.norm")


UNI_PERCEIVER: NameTable = [
    ParameterName(TABLE, WORDS),
    ParameterName("tokens/text_positions", "token_embed.embeddings_pos.position_embeddings.weight"),
    ParameterName(MODALITY, TYPES),
    *norm("tokens/norm", NORMS[0]),
    *linear("tokens/patch_embed", "video_embed.embeddings", CONV),
    ParameterName("tokens/image_positions", TOLD_BY),
    *(line for name, (theirs, level) in MAPS.items() for line in _map(name, theirs, level)),
    *norm("encoder/blocks/{0}/norm1", f"{LAYER}.norm1"),
    *norm("encoder/blocks/{0}/norm2", f"{LAYER}.norm2"),
    *(ParameterName(f"encoder/blocks/{{0}}/scale{i}/scale", f"{LAYER}.gamma_{i}") for i in (1, 2)),
    *norm("encoder/norm", "loss_prepare.ln_post"),
    *linear("encoder/projection", "loss_prepare.proj"),
]


def is_uni_perceiver(names: Mapping[str, object]) -> bool:
    """Whether a file with arrays of these names is one of theirs."""
    return TOLD_BY in names or f"module.{TOLD_BY}" in names


def activated(names: Mapping[str, object]) -> bool:
    """Whether an activation stands between a gate's linear map and its norm."""
    return any(name.endswith(".gate.tag_transform.2.weight") for name in names)


def axes(name: str) -> int:
    """How many axes an array of this name has."""
    if name == PATCHES:
        return 4
    return 1 if VECTORS.fullmatch(name) else 2


def from_uni_perceiver(state: Mapping[str, np.ndarray]) -> Translated:
    """A state dictionary of the published code as flat parameters of ours, what is beyond left out.

    Raises ValueError where a stack lacks an expert, or two names are one array's. The norm of words
    stands for that of images: the caller has made sure that they are equal.
    """
    plain: dict[str, np.ndarray] = {}
    for name, array in state.items():
        put(plain, name.removeprefix("module."), array)
    plain = _one_norm(_stacked(plain))
    plain = {_gate_norm(name): array for name, array in plain.items()}
    if TOLD_BY in plain and (frames := plain.pop(FRAMES, None)) is not None:
        plain[TOLD_BY] = plain[TOLD_BY] + frames[:1]
    if (types := plain.get(TYPES)) is not None:
        plain[TYPES] = np.concatenate([0 * types[:1], types[:1]])
    found = to_ours({n: a for n, a in plain.items() if not BEYOND.fullmatch(n)}, UNI_PERCEIVER)
    if (table := found.arrays.get(TABLE)) is not None:
        found.arrays[TABLE], found.arrays[SPECIAL] = table[:-1], table[-1:]
    return found


def to_uni_perceiver(flat: Mapping[str, np.ndarray], gate_norm: int = 1) -> Translated:
    """Inverse of `from_uni_perceiver`, with one frame; what has no place there is `unknown`.

    gate_norm: the number of the norm in a gate, 2 behind an activation. The modality of images goes
    into their positions. Gates that are never asked are not written.
    """
    flat = dict(flat)
    if TABLE in flat and SPECIAL in flat:
        flat[TABLE] = np.concatenate([flat[TABLE], flat.pop(SPECIAL)])
    if MODALITY in flat:
        image_D, text_D = flat[MODALITY]
        flat["tokens/image_positions"] = flat["tokens/image_positions"] + image_D
        flat[MODALITY] = np.stack([text_D, 0 * text_D])
    arrays, unknown = to_theirs(flat, UNI_PERCEIVER)
    state: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if ".experts." in name:
            stem, _, kind = name.rpartition(".")
            own = f"{stem}.deepspeed_experts.{{}}.{kind}"
            state |= {own.format(e): part for e, part in enumerate(array)}
        else:
            state[name.replace("tag_transform.norm", f"tag_transform.{gate_norm}")] = array
    for kind in ("weight", "bias"):
        if (own := state.get(f"{NORMS[0]}.{kind}")) is not None:
            state[f"{NORMS[1]}.{kind}"] = own
    if TOLD_BY in state:
        state[FRAMES] = np.zeros((1, state[TOLD_BY].shape[1]), state[TOLD_BY].dtype)
    return Translated(state, unknown)


def _stacked(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One array for the experts of a map, [E, ...], where there is one for each."""
    made: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in state.items():
        if match := EXPERTS.fullmatch(name):
            stacks.setdefault(f"{match[1]}.experts.{match[3]}", {})[int(match[2])] = array
        else:
            made[name] = array
    for name, parts in stacks.items():
        if len({part.shape for part in parts.values()}) > 1:
            raise ValueError(f"{name} has other shapes for some experts than for others")
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"{name} has the experts {sorted(parts)} only")
        made[name] = np.stack([parts[e] for e in sorted(parts)])
    return made


def _one_norm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    made = dict(state)
    for kind in ("weight", "bias"):
        own, other = (f"{name}.{kind}" for name in NORMS)
        if own in made and other in made:
            if made[own].shape != made[other].shape:
                raise ValueError(f"{other} has another shape than {own}, which is the same norm")
            made.pop(other)
    return made


def _gate_norm(name: str) -> str:
    """The norm behind a gate's linear map is number 1, or 2 behind an activation."""
    return re.sub(r"\.gate\.tag_transform\.[12]\.", ".gate.tag_transform.norm.", name)
