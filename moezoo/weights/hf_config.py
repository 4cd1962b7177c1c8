"""`config.json` of a Hugging Face model as a `DecoderConfig`, and back.

Both spellings of rotary positions are read: `rope_theta` beside `rope_scaling`, and
`rope_parameters` of transformers 5. Written is the older one, which both versions read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError, unknown
from moezoo.nn.rope import RopeConfig
from moezoo.schema_check import (
    FormatFault,
    either,
    flag,
    list_of,
    maybe,
    number,
    shortened,
    shown,
    table,
    text,
    whole,
)
from moezoo.structured import read_object


@dataclass(frozen=True)
class Family:
    """What a family's name in `model_type` stands for, and defaults of its configuration class."""

    architecture: str
    qkv_bias: bool | None
    out_bias: bool | None
    qk_norm: bool
    mlp_bias: bool = False
    head_width: int | None = None
    length: int = 32_768


# None: `attention_bias` decides.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", None, None, False, mlp_bias=True, length=2048),
    "qwen2": Family("Qwen2ForCausalLM", True, False, False),
    "qwen3": Family("Qwen3ForCausalLM", None, None, True, head_width=128),
}


SIZE = whole(1, 2**24)
LENGTH = maybe(whole(1, 2**31 - 1))
FACTOR = maybe(number(0, 1e12))
ABOVE = maybe(number(1e-6, 1e12))
ROPE = table(
    {
        "rope_theta": ABOVE, "factor": ABOVE, "rope_type": maybe(text(100)),
        "type": maybe(text(100)), "partial_rotary_factor": FACTOR,
        "original_max_position_embeddings": LENGTH, "low_freq_factor": FACTOR,
        "high_freq_factor": FACTOR, "beta_fast": FACTOR, "beta_slow": FACTOR,
        "truncate": maybe(flag), "attention_factor": FACTOR, "mscale": FACTOR,
        "mscale_all_dim": FACTOR,
    },
    # Not an object: settings per kind of layer are others than these.
    others=either(number(), flag, maybe(text()), list_of(number())),
)  # fmt: skip
CONFIG = table(
    {
        "model_type": maybe(text(200)), "hidden_act": maybe(text(100)),
        "vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": SIZE,
        "num_hidden_layers": whole(1, 1000), "num_attention_heads": whole(1, 2**16),
        "num_key_value_heads": maybe(whole(1, 2**16)), "head_dim": maybe(whole(1, 2**16)),
        "max_position_embeddings": LENGTH, "rms_norm_eps": maybe(number(0, 1)),
        "rope_theta": ABOVE, "rope_scaling": maybe(ROPE), "rope_parameters": maybe(ROPE),
        "partial_rotary_factor": FACTOR, "original_max_position_embeddings": LENGTH,
        "attention_bias": maybe(flag), "mlp_bias": maybe(flag),
        "tie_word_embeddings": maybe(flag), "use_sliding_window": maybe(flag),
        "sliding_window": maybe(whole()), "max_window_layers": maybe(whole()),
        "layer_types": maybe(list_of(text(100), longest=1000)),
    }
)  # fmt: skip
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "intermediate_size")  # fmt: skip
FOLDER = "give the folder of a Hugging Face model, with config.json and *.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder, its values unchecked; UserError where there is none."""
    return read_object(path, absent=FOLDER)


def read_config(folder: Path | str, **changes: Any) -> DecoderConfig:
    """The sizes of the model in `folder`; `changes` are fields of `DecoderConfig`, such as dtype.

    Raises UserError naming what is missing, malformed or not supported.
    """
    path = Path(folder) / "config.json"
    return from_hf(read_json(path), str(path), **changes)


def from_hf(values: Mapping[str, Any], where: str, **changes: Any) -> DecoderConfig:
    """The content of a `config.json`, see `read_config`; `where` stands in messages."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown(f"model_type in {where}", shortened(str(kind), 100), list(FAMILIES))
    try:
        CONFIG(values, "")
        for name in NEEDED:
            if name not in values:
                raise FormatFault(f"{name} is missing")
    except FormatFault as error:
        raise UserError(f"{where}: {error}; download it again.") from error
    _check_supported(values, where)
    try:
        return DecoderConfig(**{**_fields(values, FAMILIES[kind], where), **changes})
    except UserError as error:  # sizes that do not go together
        raise error if where in str(error) else UserError(f"{where}: {error}") from error


def _fields(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    def given(name: str, default: Any = None) -> Any:
        value = values.get(name)
        return default if value is None else value

    bias = given("attention_bias", False)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    length = given("max_position_embeddings", family.length)
    head_width = values.get("head_dim", family.head_width)  # null is none of the family, too
    if head_width is None and width % heads == 0:
        head_width = width // heads
    return {
        "vocabulary": values["vocab_size"],
        "width": width,
        "depth": values["num_hidden_layers"],
        "heads": heads,
        "groups": given("num_key_value_heads", heads),
        "head_width": head_width,
        "hidden": values["intermediate_size"],
        "length": length,
        "rope": _rope(values, length, where),
        "norm_epsilon": float(given("rms_norm_eps", 1e-6)),
        "qkv_bias": bias if family.qkv_bias is None else family.qkv_bias,
        "out_bias": bias if family.out_bias is None else family.out_bias,
        "mlp_bias": given("mlp_bias", False) and family.mlp_bias,
        "qk_norm": family.qk_norm,
        "tied_head": given("tie_word_embeddings", False),
    }


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The content of a `config.json` from which transformers builds the same model.

    Raises UserError where none of the families has this combination of biases and norms.
    """
    kind = _family(config)
    rope = {"rope_theta": config.rope.theta}
    scaling = _scaling(config.rope, config.length)
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.width_of_head,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.length,
        **rope,
        **({"rope_scaling": scaling} if scaling else {}),
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.out_bias,
        **({"mlp_bias": config.mlp_bias} if FAMILIES[kind].mlp_bias else {}),
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "torch_dtype": config.param_dtype,
    }


def _family(config: DecoderConfig) -> str:
    for kind, family in FAMILIES.items():
        same = (family.qkv_bias, family.out_bias) == (config.qkv_bias, config.out_bias)
        either = family.qkv_bias is None and config.qkv_bias == config.out_bias
        if (
            family.qk_norm == config.qk_norm
            and (same or either)
            and (family.mlp_bias or not config.mlp_bias)
        ):
            return kind
    told = {k: v for k, v in asdict(config).items() if k.endswith("bias") or k == "qk_norm"}
    raise UserError(
        f"No model of transformers has {told}: only {', '.join(FAMILIES)} can be written."
    )


def _check_supported(values: Mapping[str, Any], where: str) -> None:
    def refuse(option: str, why: str) -> UserError:
        return UserError(f"{where}: {option} is {shown(values.get(option))}, {why}.")

    if values.get("hidden_act") not in ("silu", None):
        raise refuse("hidden_act", "but only silu is supported")
    if values.get("quantization_config"):
        raise refuse("quantization_config", "but quantised weights are not supported: take others")
    first = values.get("max_window_layers") or 0
    slides = values.get("use_sliding_window") and values.get("sliding_window") is not None
    if slides and first < values["num_hidden_layers"]:
        raise refuse("use_sliding_window", "but sliding windows are not supported: take full ones")
    others = set(values.get("layer_types") or []) - {"full_attention"}
    if others:
        raise refuse("layer_types", "but only full_attention is supported")


def _rope(values: Mapping[str, Any], length: int, where: str) -> RopeConfig:
    told = values.get("rope_parameters") or values.get("rope_scaling") or {}
    found = {name: value for name, value in told.items() if value is not None}
    theta = found.get("rope_theta", values.get("rope_theta") or 10_000.0)
    kind = found.get("rope_type", found.get("type", "default"))
    share = found.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is {share}, but only 1 is supported.")
    if kind == "default":
        return RopeConfig(theta=float(theta))
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise unknown(f"rope_type in {where}", str(kind), ["linear", "dynamic", "llama3", "yarn"])
    original = length if kind == "dynamic" else found.get("original_max_position_embeddings")
    original = original or values.get("original_max_position_embeddings") or length
    factor = found.get("factor") or length / original
    return RopeConfig(
        theta=float(theta),
        scaling=kind,
        factor=float(factor),
        original_length=int(original),
        low_frequency=float(found.get("low_freq_factor", 1.0)),
        high_frequency=float(found.get("high_freq_factor", 4.0)),
        beta_fast=float(found.get("beta_fast") or 32.0),
        beta_slow=float(found.get("beta_slow") or 1.0),
        truncate=bool(found.get("truncate", True)),
        magnitude=_magnitude(found, float(factor)) if kind == "yarn" else None,
    )


def _magnitude(found: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's attention factor, given itself or as DeepSeek's two scales."""
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    if not (found.get("mscale") and found.get("mscale_all_dim")) or factor <= 1:
        return None
    grown = 0.1 * math.log(factor)
    return (grown * found["mscale"] + 1) / (grown * found["mscale_all_dim"] + 1)


def _scaling(rope: RopeConfig, length: int) -> dict[str, Any]:
    if rope.scaling == "none":
        return {}
    told: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "dynamic" and rope.original_length != length:
        raise UserError(
            f"rope: original_length is {rope.original_length}; for dynamic scaling transformers "
            f"takes max_position_embeddings, which is {length}."
        )
    if rope.scaling in ("llama3", "yarn"):
        told["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        told |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.scaling == "yarn":
        told |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        told |= {} if rope.truncate else {"truncate": False}
        told |= {} if rope.magnitude is None else {"attention_factor": rope.magnitude}
    return told
