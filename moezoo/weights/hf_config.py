"""`config.json` of a Hugging Face model as a `DecoderConfig`, and back.

Both spellings of rotary positions are read: `rope_theta` beside `rope_scaling`, and
`rope_parameters` of transformers 5. Written is the older one, which both versions read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moezoo.backbones.decoder import DecoderConfig
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.errors import UserError, unknown
from moezoo.nn.causal_attention import NormOver
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
from moezoo.weights.names import DECODER, MIXTRAL, SPARSE_DECODER, NameTable


def _slides_from_a_layer(values: Mapping[str, Any]) -> bool:
    first = values.get("max_window_layers") or 0
    return _slides_if_asked(values) and first < values["num_hidden_layers"]


def _slides_if_asked(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_sliding_window")) and _slides_if_given(values)


def _slides_if_given(values: Mapping[str, Any]) -> bool:
    return values.get("sliding_window") is not None


@dataclass(frozen=True)
class SparseFamily:
    """How a family says what its experts are: names of `config.json`, and defaults of its class.

    hidden: the name of an expert's hidden units, with its default. count, top_k: defaults.
    selection: None: `norm_topk_prob` decides. spaced: whether some layers may be dense.
    shared: hidden units of the shared expert by default; 0: the family has none.
    """

    hidden: tuple[str, int]
    count: int
    top_k: int
    selection: str | None = None
    spaced: bool = False
    shared: int = 0


@dataclass(frozen=True)
class Family:
    """What a family's name in `model_type` stands for, and defaults of its configuration class.

    names: how its files call arrays. slides: whether a configuration asks for sliding windows.
    qkv_option: the name that decides about biases of q, k and v where `qkv_bias` is only a default.
    """

    architecture: str
    qkv_bias: bool | None
    out_bias: bool | None
    qk_norm: bool
    mlp_bias: bool = False
    head_width: int | None = None
    length: int = 32_768
    norm_over: NormOver = "head"
    qkv_option: str | None = None
    names: NameTable = DECODER
    sparse: SparseFamily | None = None
    slides: Callable[[Mapping[str, Any]], bool] = _slides_from_a_layer


RENORMALISED, SHARES = "softmax_then_top_k_renormalised", "softmax_then_top_k"
# None: `attention_bias` decides.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", None, None, False, mlp_bias=True, length=2048),
    "qwen2": Family("Qwen2ForCausalLM", True, False, False),
    "qwen3": Family("Qwen3ForCausalLM", None, None, True, head_width=128),
    "mixtral": Family(
        "MixtralForCausalLM", False, False, False, length=131_072, names=MIXTRAL,
        sparse=SparseFamily(("intermediate_size", 14_336), 8, 2, RENORMALISED),
        slides=_slides_if_given,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", None, None, True, names=SPARSE_DECODER,
        sparse=SparseFamily(("moe_intermediate_size", 768), 128, 8, spaced=True),
        slides=_slides_if_asked,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM", None, None, True, length=4096, norm_over="width",
        names=SPARSE_DECODER, sparse=SparseFamily(("intermediate_size", 2048), 64, 8),
        slides=_slides_if_given,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", True, False, False, qkv_option="qkv_bias", names=SPARSE_DECODER,
        sparse=SparseFamily(("moe_intermediate_size", 1408), 60, 4, spaced=True, shared=5632),
        slides=_slides_if_asked,
    ),
}  # fmt: skip
LATENT = "its attention has latent keys and values, which are not supported"
# Models with experts that are known and not read, and why.
REFUSED = {
    "deepseek": "transformers has no code of its own to compare it with",
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
}


SIZE = whole(1, 2**24)
LENGTH = maybe(whole(1, 2**31 - 1))
COUNT = maybe(whole(1, 2**16))
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
        "num_experts": COUNT, "num_local_experts": COUNT, "num_experts_per_tok": COUNT,
        "moe_intermediate_size": maybe(SIZE), "shared_expert_intermediate_size": maybe(SIZE),
        "norm_topk_prob": maybe(flag), "decoder_sparse_step": maybe(whole(1, 2**16)),
        "mlp_only_layers": maybe(list_of(whole(0, 2**16), longest=1000)),
        "clip_qkv": maybe(number()), "qkv_bias": maybe(flag),
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
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(f"{where}: model_type {kind} is not supported, because {REFUSED[kind]}.")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown(f"model_type in {where}", shortened(str(kind), 100), list(FAMILIES))
    try:
        CONFIG(values, "")
        for name in NEEDED:
            if name not in values:
                raise FormatFault(f"{name} is missing")
    except FormatFault as error:
        raise UserError(f"{where}: {error}; download it again.") from error
    _check_supported(values, FAMILIES[kind], where)
    try:
        return DecoderConfig(**{**_fields(values, FAMILIES[kind], where), **changes})
    except UserError as error:  # sizes that do not go together
        raise error if where in str(error) else UserError(f"{where}: {error}") from error


def _fields(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    def given(name: str | None, default: Any = None) -> Any:
        return _given(values, name, default)

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
        "qkv_bias": bias if family.qkv_bias is None else given(family.qkv_option, family.qkv_bias),
        "out_bias": bias if family.out_bias is None else family.out_bias,
        "mlp_bias": given("mlp_bias", False) and family.mlp_bias,
        "qk_norm": family.qk_norm,
        "qk_norm_over": family.norm_over,
        "experts": _experts(values, family.sparse),
        "tied_head": given("tie_word_embeddings", False),
    }


def _given(values: Mapping[str, Any], name: str | None, default: Any) -> Any:
    """An entry; the default where it is null or absent, or the family has no such option."""
    value = None if name is None else values.get(name)
    return default if value is None else value


def _experts(values: Mapping[str, Any], family: SparseFamily | None) -> ExpertsConfig:
    if family is None:
        return ExpertsConfig()
    renormalised = RENORMALISED if _given(values, "norm_topk_prob", False) else SHARES
    dense = _given(values, "mlp_only_layers", []) if family.spaced else []
    return ExpertsConfig(
        # transformers has two names for this and writes either.
        count=_given(values, "num_local_experts", _given(values, "num_experts", family.count)),
        top_k=_given(values, "num_experts_per_tok", family.top_k),
        hidden=_given(values, *family.hidden),
        selection=family.selection or renormalised,  # type: ignore[arg-type]
        every=_given(values, "decoder_sparse_step", 1) if family.spaced else 1,
        # Numbers beyond the last layer name nothing, there as well.
        dense=tuple(sorted(i for i in set(dense) if i < values["num_hidden_layers"])),
        shared=_given(values, "shared_expert_intermediate_size", family.shared)
        if family.shared
        else 0,
    )


def names_of(config: DecoderConfig) -> NameTable:
    """How the files of its family call a decoder's arrays; UserError where it has none."""
    return FAMILIES[_family(config)].names


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
        **_told_experts(config, FAMILIES[kind]),
        **({"mlp_bias": config.mlp_bias} if FAMILIES[kind].mlp_bias else {}),
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "torch_dtype": config.param_dtype,
    }


def _told_experts(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The entries about experts, for readers of either name of their number."""
    experts, sparse = config.experts, family.sparse
    if sparse is None:
        return {}
    told: dict[str, Any] = {"num_experts": experts.count, "num_local_experts": experts.count}
    told |= {"num_experts_per_tok": experts.top_k, sparse.hidden[0]: experts.hidden}
    if sparse.selection is None:
        told["norm_topk_prob"] = experts.selection == RENORMALISED
    if sparse.spaced:
        told["decoder_sparse_step"] = experts.every
        told["mlp_only_layers"] = list(experts.dense)
    if sparse.shared:
        told["shared_expert_intermediate_size"] = experts.shared
    if family.qkv_option is not None:
        told[family.qkv_option] = config.qkv_bias
    return told


def _family(config: DecoderConfig) -> str:
    for kind, family in FAMILIES.items():
        if _same_attention(config, family) and _same_experts(config.experts, family.sparse):
            return kind
    told = {k: v for k, v in asdict(config).items() if k.endswith("bias") or k.startswith("qk_")}
    if config.experts.count:
        told["experts"] = asdict(config.experts)
    raise UserError(
        f"No model of transformers has {told}: only {', '.join(FAMILIES)} can be written."
    )


def _same_attention(config: DecoderConfig, family: Family) -> bool:
    asked = family.qkv_option is not None  # then there may be biases or not
    same = (family.qkv_bias, family.out_bias) == (config.qkv_bias or asked, config.out_bias)
    either = family.qkv_bias is None and config.qkv_bias == config.out_bias
    over = config.qk_norm_over if config.qk_norm else "head"
    return (
        (family.qk_norm, family.norm_over) == (config.qk_norm, over)
        and (same or either)
        and (family.mlp_bias or not config.mlp_bias)
    )


def _same_experts(experts: ExpertsConfig, family: SparseFamily | None) -> bool:
    if family is None or not experts.count:
        return family is None and not experts.count
    return (
        (family.selection or experts.selection) == experts.selection
        and bool(family.shared) == bool(experts.shared)
        and (family.spaced or (experts.every, experts.dense) == (1, ()))
    )


def _check_supported(values: Mapping[str, Any], family: Family, where: str) -> None:
    def refuse(option: str, why: str) -> UserError:
        return UserError(f"{where}: {option} is {shown(values.get(option))}, {why}.")

    if values.get("hidden_act") not in ("silu", None):
        raise refuse("hidden_act", "but only silu is supported")
    if values.get("quantization_config"):
        raise refuse("quantization_config", "but quantised weights are not supported: take others")
    if family.slides(values):
        option = "use_sliding_window" if values.get("use_sliding_window") else "sliding_window"
        raise refuse(option, "but sliding windows are not supported: take full ones")
    if values.get("clip_qkv") is not None:
        raise refuse("clip_qkv", "but clipped queries, keys and values are not supported")
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
