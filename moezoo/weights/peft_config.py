"""`adapter_config.json` of PEFT: what is read of it, and what it may not say.

Whatever an adapter computes beside scale * A B on an unchanged base is refused by name, and so is a
setting that is not known here, unless it is off.

`rank_pattern` and `alpha_pattern` choose layers by regular expressions. They come from outside, and
Python's take exponential time where they repeat what repeats. So only those are matched whose time
is bounded (`Patterns`): few repetitions, none of a group, few choices.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import linalg

from moezoo.errors import UserError
from moezoo.schema_check import FormatFault, flag, map_of, maybe, number, shown, table, text, whole
from moezoo.structured import read_object

PLAIN_NAME = re.compile(r"[\w.\-]+")  # "." stands for any character, as PEFT has it
REPEATED_GROUP = re.compile(r"\)\s*[*+?{]")
EXTENSION = re.compile(r"\(\?(?!:)|\\[1-9gk]")  # looking around, flags, names, back references
REPETITION = re.compile(r"(?<!\\)[*+]|(?<!\\)(?<!\()\?|(?<!\\)\{")
LONGEST, REPETITIONS, CHOICES, SECONDS = 2000, 3, 200, 5.0


class Patterns:
    """`of(name, default)` is the value of the first pattern that fits the end of a name at a dot.

    Raises FormatFault for what is no regular expression, or one whose time is not bounded.
    """

    def __init__(self, values: Mapping[str, Any], field: str):
        self.field, self._spent = field, 0.0
        self._values = [(self._compiled(pattern), value) for pattern, value in values.items()]

    def of(self, name: str, default: Any) -> Any:
        """The value for a module's name; FormatFault where matching takes longer than it may."""
        began = time.monotonic()
        found = next((v for pattern, v in self._values if pattern.fullmatch(name)), default)
        self._spent += time.monotonic() - began
        if self._spent > SECONDS:
            raise FormatFault(f"{self.field} has patterns that take too long")
        return found

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        bare = re.sub(r"\[[^\]]*\]", "x", pattern)  # inside brackets they are characters
        odd = (
            len(pattern) > LONGEST
            or REPEATED_GROUP.search(bare)
            or EXTENSION.search(bare)
            or len(REPETITION.findall(bare)) > REPETITIONS
            or bare.count("|") > CHOICES
            or len(re.findall(r"\([^()]*\|", bare)) > REPETITIONS
        )
        if odd and not PLAIN_NAME.fullmatch(pattern):
            raise FormatFault(
                f"{self.field} has the pattern {shown(pattern)}, which is too involved: name the "
                "layers instead"
            )
        try:
            return re.compile(rf"(?:.*\.)?(?:{pattern})")
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatFault(
                f"{self.field} has the pattern {shown(pattern)}, which is no regular expression: "
                f"{error}"
            ) from error


NAME = "adapter_config.json"
PLAIN, STACKED = "LORA", "MOEZOO_STACKED"
RANK = whole(1, 2**20)
FORM = table(
    {
        "peft_type": maybe(text(200)),
        "r": RANK,
        "lora_alpha": number(-1e6, 1e6),
        "use_rslora": maybe(flag),
        "rank_pattern": maybe(map_of(RANK, longest=10_000)),
        "alpha_pattern": maybe(map_of(number(-1e6, 1e6), longest=10_000)),
        "base_model_name_or_path": maybe(text()),
    }
)
# What says how an adapter was made, or to which layers it was put: its arrays show both.
SILENT = frozenset(
    (
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "base_model_name_or_path", "auto_mapping", "peft_version", "revision", "task_type",
        "inference_mode", "target_modules", "exclude_modules", "lora_dropout",
        "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config",
        "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "init_lora_weights", "experts", "chosen", "system",
    )
)  # fmt: skip
OFF: tuple[Any, ...] = (None, False, [], {}, "", "none")
ADVICE = "merge it with PEFT first"


class AdapterConfig:
    """The settings of an adapter folder.

    Raises UserError where the file is missing or damaged, or the adapter is more than plain LoRA.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.values: Mapping[str, Any] = read_object(self.path, absent="name an adapter's folder")
        kind = self.values.get("peft_type")
        if kind not in (PLAIN, STACKED):
            raise UserError(
                f"{self.path} is of peft_type {shown(kind)}; plain LoRA ({PLAIN}) can be read."
            )
        read_object(self.path, FORM)
        self._check_settings()
        self.init = self._init()
        try:
            for name in ("r", "lora_alpha"):
                if name not in self.values:
                    raise FormatFault(f"{name} is missing")
            self._ranks = Patterns(self.values.get("rank_pattern") or {}, "rank_pattern")
            self._alphas = Patterns(self.values.get("alpha_pattern") or {}, "alpha_pattern")
        except FormatFault as error:
            raise UserError(f"{self.path}: {error}.") from error

    def scale(self, name: str, rank: int) -> float:
        """What multiplies the update of a module; UserError where its rank is not the file's."""
        try:
            told = self._ranks.of(name, self.values["r"])
            alpha = self._alphas.of(name, self.values["lora_alpha"])
        except FormatFault as error:
            raise UserError(f"{self.path}: {error}.") from error
        if told != rank:
            raise UserError(
                f"{self.path} says rank {told} for {name}, whose arrays have {rank}: take both "
                "from the same adapter."
            )
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _check_settings(self) -> None:
        for name, value in self.values.items():
            if name not in SILENT and not any(type(value) is type(v) and value == v for v in OFF):
                raise UserError(
                    f"{self.path} has {name} = {shown(value)}, which may change what the adapter "
                    f"computes and is not supported; {ADVICE}."
                )

    def _init(self) -> str:
        """The name of how the base was changed before the adapter was trained."""
        value = self.values.get("init_lora_weights", True)
        if value is None or isinstance(value, bool):
            return UNCHANGED
        if isinstance(value, str) and value in REMOVED and value != UNCHANGED:
            return value
        why = (
            "which changed its base by chance or by data that the folder does not hold"
            if isinstance(value, str)
            else "which is no such setting"
        )
        raise UserError(
            f"{self.path} has init_lora_weights = {shown(value)}, {why}: save it as plain LoRA "
            f"(save_pretrained with path_initial_model_for_weight_conversion), or {ADVICE}."
        )


def _nothing(weight_OD: np.ndarray, rank: int, scale: float) -> np.ndarray | None:
    return None


def _largest(weight_OD: np.ndarray, rank: int, scale: float) -> np.ndarray:
    """The `rank` largest singular components, which PiSSA moves into the adapter.

    Meng et al., arXiv:2404.02948. From the eigenvectors of the smaller square, in float64.
    """
    wide = weight_OD.astype(np.float64)
    tall = wide.shape[0] >= wide.shape[1]
    square = wide.T @ wide if tall else wide @ wide.T
    size = len(square)
    _, basis = linalg.eigh(square, subset_by_index=(max(size - rank, 0), size - 1))
    return (wide @ basis) @ basis.T if tall else basis @ (basis.T @ wide)


def _first(weight_OD: np.ndarray, rank: int, scale: float) -> np.ndarray:
    """scale times the first `rank` columns of Q with rows of R, which OLoRA begins with.

    Büyükakyüz, arXiv:2406.01775, as PEFT has it.
    """
    q, r = np.linalg.qr(weight_OD.astype(np.float64))
    return scale * q[:, :rank] @ r[:rank]


UNCHANGED = "unchanged"
# What PEFT takes off a base [O, D] before it adds an adapter that was made so.
REMOVED: dict[str, Callable[[np.ndarray, int, float], np.ndarray | None]] = {
    UNCHANGED: _nothing,
    "gaussian": _nothing,
    "orthogonal": _nothing,
    "eva": _nothing,
    "pissa": _largest,
    "olora": _first,
}
