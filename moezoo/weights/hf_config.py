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
from moezoo.nn.latent_attention import LatentConfig
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
from moezoo.weights.hf_experts import RENORMALISED, ExpertsForm, GroupedFamily, SparseFamily
from moezoo.weights.hf_experts import given as given_of
from moezoo.weights.names import DECODER, GROUPED_DECODER, MIXTRAL, SPARSE_DECODER, NameTable


def _slides_from_a_layer(values: Mapping[str, Any]) -> bool:
    first = values.get("max_window_layers") or 0
    return _slides_if_asked(values) and first < values["num_hidden_layers"]


def _slides_if_asked(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_sliding_window")) and _slides_if_given(values)


def _slides_unless_null(values: Mapping[str, Any]) -> bool:
    """Of dots.llm1, whose class has a window by default, for layers from the 62nd on."""
    first = given_of(values, "max_window_layers", 62)
    given = values.get("sliding_window", 4096) is not None
    return given and not values.get("layer_types") and first < values["num_hidden_layers"]


def _slides_if_given(values: Mapping[str, Any]) -> bool:
    return values.get("sliding_window") is not None


@dataclass(frozen=True)
class Family:
    """What a family's name in `model_type` stands for, and defaults of its configuration class.

    names: how its files call arrays. slides: whether a configuration asks for sliding windows.
    qkv_option: the name that decides about biases of q, k and v where `qkv_bias` is only a default;
    norm_option: the same about norms on queries and keys. latent: whether keys and values are made
    of latents; pairs: whether `rope_interleave` says which features turn together. turned: what
    share of a head turns by default; None: all of it, always. ahead: whether files may have layers
    behind the last one, which predict tokens further ahead and are left behind.
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
    sparse: ExpertsForm | None = None
    slides: Callable[[Mapping[str, Any]], bool] = _slides_from_a_layer
    norm_option: str | None = None
    latent: bool = False
    pairs: bool = False
    turned: float | None = None
    ahead: bool = False


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
    "dots1": Family(
        "Dots1ForCausalLM", None, None, True, length=2048, names=GROUPED_DECODER,
        sparse=GroupedFamily(
            None, None, 1408, None, dense=0, groups=1, top_groups=1, factor=1.0, normalised=False
        ),
        slides=_slides_unless_null,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM", False, False, False, length=131_072, names=GROUPED_DECODER,
        qkv_option="attention_bias", norm_option="use_qk_norm", turned=0.5, ahead=True,
        sparse=GroupedFamily(
            128, 8, 1408, 1, dense=1, groups=1, top_groups=1, factor=1.0, normalised=True
        ),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", None, None, False, length=4096, names=GROUPED_DECODER,
        latent=True, pairs=True, ahead=True,
        sparse=GroupedFamily(
            256, 8, 2048, 1, dense=3, groups=8, top_groups=4, factor=2.5, normalised=True
        ),
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", None, None, False, length=2048, names=GROUPED_DECODER,
        latent=True,
        sparse=GroupedFamily(
            64, None, 1407, 2, dense=0, groups=1, top_groups=1, factor=1.0, normalised=False,
            sigmoids=False,
        ),
    ),
}  # fmt: skip
# Models with experts that are known and not read, and why.
REFUSED = {
    "deepseek": "transformers has no code of its own to compare it with",
    "deepseek_v32": "its attention looks at a learned choice of tokens",
    "deepseek_v4": "its attention looks at a learned choice of tokens",
    "glm4_moe_lite": "it has not been compared with transformers' code yet",
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
        "n_routed_experts": COUNT, "n_shared_experts": maybe(whole(1, 2**16)),
        "first_k_dense_replace": maybe(whole(0, 1000)), "n_group": COUNT, "topk_group": COUNT,
        "routed_scaling_factor": ABOVE, "topk_method": maybe(text(100)),
        "kv_lora_rank": maybe(SIZE), "q_lora_rank": maybe(SIZE),
        "qk_nope_head_dim": maybe(SIZE), "qk_rope_head_dim": maybe(SIZE),
        "v_head_dim": maybe(SIZE), "rope_interleave": maybe(flag), "use_qk_norm": maybe(flag),
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
        return given_of(values, name, default)

    bias = given("attention_bias", False)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    length = given("max_position_embeddings", family.length)
    head_width = values.get("head_dim", family.head_width)  # null is none of the family, too
    if head_width is None and width % heads == 0:
        head_width = width // heads
    rope = _rope(values, length, where, family.turned)
    latent, norms = LatentConfig(), given(family.norm_option, family.qk_norm)
    groups = given("num_key_value_heads", heads)
    if family.latent:
        latent, head_width, groups = _latent(values, family, rope, where), None, heads
    return {
        "vocabulary": values["vocab_size"],
        "width": width,
        "depth": values["num_hidden_layers"],
        "heads": heads,
        "groups": groups,
        "head_width": head_width,
        "hidden": values["intermediate_size"],
        "length": length,
        "rope": rope,
        "norm_epsilon": float(given("rms_norm_eps", 1e-6)),
        "qkv_bias": bias if family.qkv_bias is None else given(family.qkv_option, family.qkv_bias),
        "out_bias": bias if family.out_bias is None else family.out_bias,
        "mlp_bias": given("mlp_bias", False) and family.mlp_bias,
        "qk_norm": norms,
        "qk_norm_over": family.norm_over,
        "latent": latent,
        "experts": family.sparse.read(values, where) if family.sparse else ExpertsConfig(),
        "tied_head": given("tie_word_embeddings", False),
    }


def _latent(
    values: Mapping[str, Any], family: Family, rope: RopeConfig, where: str
) -> LatentConfig:
    """The widths of latent attention, with the defaults that both of its families have."""
    heads = values["num_attention_heads"]
    if given_of(values, "num_key_value_heads", heads) != heads:
        raise UserError(
            f"{where}: num_key_value_heads is {values['num_key_value_heads']}, but latent "
            f"attention has as many as num_attention_heads, {heads}."
        )
    told = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return LatentConfig(
        rank=given_of(values, "kv_lora_rank", 512),
        # Null says that there is none; where nothing is said, the class has one.
        query_rank=values.get("q_lora_rank", 1536) or 0,
        plain=given_of(values, "qk_nope_head_dim", 128),
        rotated=given_of(values, "qk_rope_head_dim", 64),
        values=given_of(values, "v_head_dim", 128),
        neighbours=given_of(values, "rope_interleave", True) if family.pairs else True,
        # Where texts are no longer than at first it means nothing.
        growth=0.0 if rope.scaling == "none" else float(given_of(told, "mscale_all_dim", 0.0)),
    )


def names_of(config: DecoderConfig) -> NameTable:
    """How the files of its family call a decoder's arrays; UserError where it has none."""
    return FAMILIES[_family(config)].names


def looks_ahead(config: DecoderConfig) -> bool:
    """Whether files of its family may have layers behind the last one, for tokens further ahead."""
    return FAMILIES[_family(config)].ahead


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The content of a `config.json` from which transformers builds the same model.

    Raises UserError where none of the families has this combination of biases and norms.
    """
    kind = _family(config)
    rope = {"rope_theta": config.rope.theta}
    scaling = _scaling(config.rope, config.length)
    if scaling and config.latent.growth:
        scaling["mscale_all_dim"] = config.latent.growth
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
        **_told_parts(config, FAMILIES[kind]),
        **({"mlp_bias": config.mlp_bias} if FAMILIES[kind].mlp_bias else {}),
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "torch_dtype": config.param_dtype,
    }


def _told_parts(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The entries that only some families have."""
    told = family.sparse.told(config.experts, config.depth) if family.sparse else {}
    if family.qkv_option is not None:
        told[family.qkv_option] = config.qkv_bias
    if family.norm_option is not None:
        told[family.norm_option] = config.qk_norm
    if family.turned is not None:
        told["partial_rotary_factor"] = config.rope.share
    if family.slides is _slides_unless_null:
        told["sliding_window"] = None
    if family.latent:
        told |= {ours: getattr(config.latent, name) for ours, name in LATENT_NAMES.items()}
        told |= {"q_lora_rank": config.latent.query_rank or None}
        told |= {"head_dim": config.latent.rotated}
    told |= {"num_nextn_predict_layers": 0} if family.ahead else {}
    return told | ({"rope_interleave": config.latent.neighbours} if family.pairs else {})


LATENT_NAMES = {
    "kv_lora_rank": "rank", "qk_nope_head_dim": "plain", "qk_rope_head_dim": "rotated",
    "v_head_dim": "values",
}  # fmt: skip


def _family(config: DecoderConfig) -> str:
    for kind, family in FAMILIES.items():
        if _same_attention(config, family) and _same_experts(config, family.sparse):
            return kind
    told = {k: v for k, v in asdict(config).items() if k.endswith("bias") or k.startswith("qk_")}
    if config.experts.count:
        told["experts"] = asdict(config.experts)
    if config.latent.rank:
        told["latent"] = asdict(config.latent)
    raise UserError(
        f"No model of transformers has {told}: only {', '.join(FAMILIES)} can be written."
    )


def _same_attention(config: DecoderConfig, family: Family) -> bool:
    asked = family.qkv_option is not None  # then there may be biases or not
    qkv = family.qkv_bias or asked, config.qkv_bias or asked
    same = qkv[0] == qkv[1] and family.out_bias == config.out_bias
    either = family.qkv_bias is None and config.qkv_bias == config.out_bias
    over = config.qk_norm_over if config.qk_norm else "head"
    normed = config.qk_norm if family.norm_option else family.qk_norm
    return (
        (normed, family.norm_over) == (config.qk_norm, over)
        and _same_turns(config, family)
        and (same or either)
        and (family.mlp_bias or not config.mlp_bias)
    )


def _same_turns(config: DecoderConfig, family: Family) -> bool:
    """Whether the family has such latents, and rotations of such a share of a head."""
    return (
        family.latent == bool(config.latent.rank)
        and (family.pairs or config.latent.neighbours)
        and (family.turned is not None or config.rope.share == 1)
    )


def _same_experts(config: DecoderConfig, form: ExpertsForm | None) -> bool:
    if form is None or not config.experts.count:
        return form is None and not config.experts.count
    return form.fits(config.experts, config.depth)


def _check_supported(values: Mapping[str, Any], family: Family, where: str) -> None:
    def refuse(option: str, why: str) -> UserError:
        told = shown(values[option]) if option in values else "not given"
        return UserError(f"{where}: {option} is {told}, {why}.")

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


def _rope(
    values: Mapping[str, Any], length: int, where: str, turned: float | None = None
) -> RopeConfig:
    told = values.get("rope_parameters") or values.get("rope_scaling") or {}
    found = {name: value for name, value in told.items() if value is not None}
    theta = found.get("rope_theta", values.get("rope_theta") or 10_000.0)
    kind = found.get("rope_type", found.get("type", "default"))
    share = found.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if turned is None and share not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is {share}, but only 1 is supported.")
    share = float((turned or 1.0) if share is None else share)
    if kind == "default":
        return RopeConfig(theta=float(theta), share=share)
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise unknown(f"rope_type in {where}", str(kind), ["linear", "dynamic", "llama3", "yarn"])
    original = length if kind == "dynamic" else found.get("original_max_position_embeddings")
    original = original or values.get("original_max_position_embeddings") or length
    factor = found.get("factor") or length / original
    return RopeConfig(
        theta=float(theta),
        share=share,
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
