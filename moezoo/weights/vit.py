"""A pretrained vision transformer's trunk: whether it fits a model, and its arrays in our form.

Whether they go together, and why not, is told from shapes alone (`misfits`), before an array is
read and before data is made.

Of these forms: the JAX checkpoints of vision_transformer and big_vision (.npz: "augreg" and
others), PyTorch ones with the names of timm and DeiT (.safetensors, .pth), those of transformers
(ViT, DeiT, DINOv2 with registers and without), and those of whole models by M3ViT's, MLoRE's and
Mod-Squad's published code, with experts, routers and the heads that the model has too. What
pre-training put on top of the trunk (a classifier, a decoder) stays behind, LayerScale is folded
into the matrices that it follows, and an array that is neither is refused.

Positions are resized bicubically (A = -0.75, pixel centres correspond), as where TaskPrompter and
MLoRE begin; M3ViT's code does it bilinearly. Where a folder tells how its pixels are normalised,
the patches' map is changed so that it sees the same; a file does not tell: its pixels are
normalised by the mean and deviation of ImageNet, as in those papers' code, although augreg saw
pixels from -1 to 1. GELU stays exact, as timm reads these files, although they were trained with
its approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError
from moezoo.nn.upcycle import Beginning, copied, sources
from moezoo.ops.interpolate import bicubic, resize_position_embedding
from moezoo.schema_check import shortened
from moezoo.weights import files, fold, vit_source, vit_tasks
from moezoo.weights.fold import Normalisation
from moezoo.weights.vit_source import Shape, ViTSource, blocks, source

POSITIONS, CLASS, DISTILLED = "pos_embed", "cls_token", "dist_token"
REGISTERS = "register_tokens"


class Target(NamedTuple):
    """The model that begins with the weights: shapes of its parameters by path, patches in height
    and width, attention heads; what the user says of the file's heads; its tasks in order; and how
    its experts begin where the weights have an MLP."""

    shapes: Mapping[str, Shape]
    grid: tuple[int, int]
    heads: int
    told: int | None = None
    tasks: tuple[str, ...] = ()
    beginning: Beginning = copied


class Misfit(NamedTuple):
    """Why weights and model do not go together: a clause, and the array that it is about."""

    why: str
    path: str | None = None


def misfits(given: ViTSource, target: Target, without: Sequence[str] = ()) -> list[Misfit]:
    """Why the trunk cannot be the model's, most telling first; nothing where all of it can.

    without: patterns of what the user leaves out on purpose, by our path or the file's name.
    A model that has no class token or no last norm at all does without the file's.
    """
    found = {
        path: vit_tasks.shape_of(path, given, target.shapes, target.tasks)
        for path in _taken(given, target, without)
    }
    wrong = _sizes(given, target) + _scales(found) + _positions_fit(given, target)
    wrong += [
        Misfit(
            f"its {path} is for the tasks {', '.join(given.tasks)}, the model's for "
            f"{', '.join(target.tasks)}",
            path,
        )
        for path in vit_tasks.strangers(given, target.shapes, target.tasks)
        if path in found
    ]
    if given.depth == blocks(target.shapes):  # else every block would be one too many, or too few
        wrong += _places(found, target, given, without)
    return (
        wrong
        + [
            Misfit(f"it has {shortened(name, 200)}, for which there is no place", name)
            for name in given.unknown
            if not named(name, without)
        ]
        + [Misfit(why) for why in idle(without, [*given.shapes, *given.unknown, *given.beyond])]
    )


def left(given: ViTSource, target: Target) -> tuple[str, ...]:
    """Heads and branches between tasks of the weights that the model has not got."""
    return vit_tasks.idle_parts(given, target.shapes, target.tasks)


def _taken(given: ViTSource, target: Target, without: Sequence[str]) -> list[str]:
    """The paths of the weights that the model has to have a place for."""
    apart = set(left(given, target))
    return [
        path
        for path in given.shapes
        if not named(path, without) and vit_tasks.part_of(path) not in apart
    ]


def _places(
    found: Mapping[str, Shape], target: Target, given: ViTSource, without: Sequence[str]
) -> list[Misfit]:
    """What the model asks for and is not there, and what is there and has no place."""
    found = {path: shape for path, shape in found.items() if not fold.is_scale(path)}
    if POSITIONS in found:  # they are resized
        features = found[POSITIONS][-1:]
        found[POSITIONS] = (1, 1 + target.grid[0] * target.grid[1], *features)
    wrong = [
        Misfit(f"it lacks {path}, which the model begins with", path)
        for path in vit_source.wanted(target.shapes, given.kind)
        if path not in found and not named(path, without)
    ]
    taken = set(sources(found, target.shapes, target.beginning).values())
    return wrong + [
        Misfit(_no_place(path, shape, target), path)
        for path, shape in found.items()
        if path not in taken and not _absent(path, target)
    ]


def check(given: ViTSource, target: Target, without: Sequence[str] = ()) -> None:
    """UserError with the first of `misfits`."""
    wrong = misfits(given, target, without)
    if wrong:
        raise UserError(f"'{given.path}' does not fit the model: {told(wrong)}.")


def told(wrong: Sequence[Misfit]) -> str:
    """Reasons in one clause."""
    more = f"; and {len(wrong) - 4} more" if wrong[4:] else ""
    return "; ".join(one.why for one in wrong[:4]) + more


def named(path: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is this path, or a module around it."""
    parts = path.split("/")
    around = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in around for pattern in patterns)


def idle(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Clauses about patterns that name none of these paths and names."""
    return [
        f"it has nothing that start_without's {shortened(pattern, 100)!r} names"
        for pattern in patterns
        if not any(named(path, (pattern,)) for path in paths)
    ]


def _sizes(given: ViTSource, target: Target) -> list[Misfit]:
    """Blocks and heads, which shapes alone would not show."""
    wrong, depth = [], blocks(target.shapes)
    if given.depth != depth:
        wrong.append(Misfit(f"it has {given.depth} blocks, the model {depth}"))
    heads = given.heads or target.told
    if heads is None:
        wrong.append(Misfit("it does not tell its attention heads"))
    elif given.heads and target.told not in (None, given.heads):
        wrong.append(Misfit(f"it has {given.heads} attention heads, start_heads is {target.told}"))
    elif heads != target.heads:
        wrong.append(Misfit(f"it has {heads} attention heads, the model {target.heads}"))
    return wrong


def _scales(found: Mapping[str, Shape]) -> list[Misfit]:
    """LayerScale that is none, and an MLP whose second map does not take what the first gives."""
    wrong = []
    for path, shape in found.items():
        block, _, name = path.rpartition("/")
        if fold.is_scale(path):
            follows = found.get(f"{block}/{fold.SCALES[name]}/kernel", ())
            if len(shape) != 1 or follows[-1:] != shape:
                wrong.append(Misfit(f"its {path} of {list(shape)} scales no output", path))
        if path.endswith("/mlp/fc1/kernel"):
            second = found.get(path.replace("/fc1/", "/fc2/"), ())
            if len(shape) == 2 and len(second) == 2 and shape[1] != second[0]:
                wrong.append(Misfit(f"its {block.rpartition('/')[0]} is gated, ours is not", path))
    return wrong


def special(shapes: Mapping[str, Shape]) -> int:
    """Tokens in front of the patches that have a position; -1 where there is no square behind them.

    Class tokens and registers of the file have one, or class tokens, or only the patches.
    """
    shape, tokens = shapes[POSITIONS], sum(name in shapes for name in (CLASS, DISTILLED))
    registers = shapes.get(REGISTERS, (0, 0))[1]
    count = shape[1] if len(shape) == 3 and shape[0] == 1 else 0
    for first in (tokens, tokens + registers, 0):
        side = math.isqrt(max(count - first, 0))
        if side and side * side == count - first:
            return first
    return -1


def _over(given: ViTSource, target: Target) -> int | None:
    """Positions beside those of the model's own grid, where the weights' lie on the same."""
    shape = given.shapes[POSITIONS]
    over = shape[1] - target.grid[0] * target.grid[1] if len(shape) == 3 else -1
    return over if given.kind.own_grid and over in (0, 1) else None


def _positions_fit(given: ViTSource, target: Target) -> list[Misfit]:
    found = given.shapes
    if POSITIONS not in found or _over(given, target) is not None or special(found) >= 0:
        return []
    shape = found[POSITIONS]
    count = shape[1] if len(shape) > 1 else 0
    return [Misfit(f"it has positions of {count} tokens, which are no square grid of patches")]


def _absent(path: str, target: Target) -> bool:
    """Whether the architecture of the model has no such part, so that none could take it."""
    if path == CLASS:
        return CLASS not in target.shapes
    return path.startswith("norm/") and not any(p.startswith("norm/") for p in target.shapes)


def _no_place(path: str, shape: Shape, target: Target) -> str:
    if path in target.shapes:
        return f"its {path} is {list(shape)}, the model's {list(target.shapes[path])}"
    return f"the model has no place for its {path} of {list(shape)}"


def options(given: ViTSource) -> dict[str, object]:
    """Options of a model's configuration with which it has the file's sizes, as far as it tells."""
    shapes = given.shapes
    width = shapes.get("patch_embed/bias", (0,))[-1]
    made: dict[str, object] = {"width": width, "depth": given.depth, "stem": "patch"}
    patch = shapes.get("patch_embed/kernel", (0,))[0]
    made |= {"patch": patch} if patch else {}
    made |= {"heads": given.heads} if given.heads else {}
    hidden = shapes.get("blocks/0/mlp/fc1/kernel", (0, 0))[-1]
    made |= {"mlp_ratio": hidden / width} if hidden and width else {}
    made |= {"registers": shapes.get(REGISTERS, (1, 0, 0))[1]}
    made |= {"qk_norm": "layer" if "blocks/0/attn/query_norm/scale" in shapes else "none"}
    stacks = (s for path, s in shapes.items() if path.endswith("/mlp/experts/fc1/kernel"))
    experts = next((shape for shape in stacks if len(shape) == 3), None)
    if experts and width:
        made |= {"experts": experts[0], "expert_ratio": experts[2] / width}
    return made


# Of ImageNet, what models here see where nobody says otherwise.
PIXELS = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def trunk(
    path: Path, target: Target, without: Sequence[str] = (), pixels: Normalisation = PIXELS
) -> files.Arrays:
    """What `read` gives of a file or folder."""
    return read(source(path), target, without, pixels)


def read(
    given: ViTSource, target: Target, without: Sequence[str] = (), pixels: Normalisation = PIXELS
) -> files.Arrays:
    """The trunk's parameters by our paths, in float32 and with positions of the model's grid.

    Positions [1, 1 + h*w, D] have the class token's in front. pixels: what the model will see of
    them. Raises UserError as `misfits` tells, for damage, and for values that are not finite.
    """
    check(given, target, without)
    skipped = {*given.beyond, *given.unknown}
    plain = given.kind.plain
    names = [n for n in given.weights.stored if not skipped & {n, plain(n)}]
    arrays = {name: files.finite(given.weights, name) for name in names}
    wanted = set(_taken(given, target, without))
    found = {
        path: vit_tasks.taken(path, array, given, target.shapes, target.tasks)
        for path, array in given.kind.translate(arrays).arrays.items()
        if path in wanted
    }
    found = fold.layer_scale(found)
    if given.pixels is not None and "patch_embed/kernel" in found:
        found = fold.inputs(found, given.pixels, pixels)
    if POSITIONS in found:
        found |= _without_registers(found, given, target)
        found[POSITIONS] = _positions(found[POSITIONS], given, target)
    return found


def _without_registers(found: files.Arrays, given: ViTSource, target: Target) -> files.Arrays:
    """Positions of registers are added to these once and for all: nothing else is added to them."""
    registers = found.get(REGISTERS)
    first = sum(name in given.shapes for name in (CLASS, DISTILLED))
    if registers is None or _over(given, target) is not None:
        return {}
    behind = first + registers.shape[1]
    if special(given.shapes) != behind:
        return {}
    positions = found[POSITIONS]
    left = np.concatenate([positions[:, :first], positions[:, behind:]], axis=1)
    return {REGISTERS: registers + positions[:, first:behind], POSITIONS: left}


def _positions(positions_1TD: np.ndarray, given: ViTSource, target: Target) -> np.ndarray:
    over = _over(given, target)
    if (special(given.shapes) if over is None else over) == 0:
        # Only patches have positions: what is added to a class token is nothing.
        positions_1TD = np.pad(positions_1TD, ((0, 0), (1, 0), (0, 0)))
    if over is not None:
        return positions_1TD
    return np.asarray(resize_position_embedding(jnp.asarray(positions_1TD), target.grid, bicubic))
