"""How families of Hugging Face decoders say in `config.json` what their experts are, and back.

Two ways of saying it: Mixtral's and Qwen's (`SparseFamily`), and DeepSeek's (`GroupedFamily`), that
dots.llm1 and GLM-4.5 share. Both answer the same three questions: `read`, `told`, `fits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.errors import UserError
from moezoo.schema_check import shown

RENORMALISED, SHARES = "softmax_then_top_k_renormalised", "softmax_then_top_k"
SIGMOIDS_RENORMALISED, SIGMOIDS = "sigmoid_then_top_k_renormalised", "sigmoid_then_top_k"


class ExpertsForm(Protocol):
    """What `hf_config` asks of a family with experts."""

    def read(self, values: Mapping[str, Any], where: str) -> ExpertsConfig:
        """The experts that a `config.json` tells; UserError for what is not supported."""
        ...

    def told(self, experts: ExpertsConfig, depth: int) -> dict[str, Any]:
        """The entries about them, for readers of either name of their number."""
        ...

    def fits(self, experts: ExpertsConfig, depth: int) -> bool:
        """Whether the family has such experts."""
        ...


def given(values: Mapping[str, Any], name: str | None, default: Any) -> Any:
    """An entry; the default where it is null or absent, or the family has no such option."""
    value = None if name is None else values.get(name)
    return default if value is None else value


@dataclass(frozen=True)
class SparseFamily:
    """Names of `config.json`, and defaults of the family's class.

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

    def read(self, values: Mapping[str, Any], where: str) -> ExpertsConfig:
        """See `ExpertsForm`."""
        renormalised = RENORMALISED if given(values, "norm_topk_prob", False) else SHARES
        dense = given(values, "mlp_only_layers", []) if self.spaced else []
        return ExpertsConfig(
            # transformers has two names for this and writes either.
            count=given(values, "num_local_experts", given(values, "num_experts", self.count)),
            top_k=given(values, "num_experts_per_tok", self.top_k),
            hidden=given(values, *self.hidden),
            selection=self.selection or renormalised,  # type: ignore[arg-type]
            every=given(values, "decoder_sparse_step", 1) if self.spaced else 1,
            # Numbers beyond the last layer name nothing, there as well.
            dense=tuple(sorted(i for i in set(dense) if i < values["num_hidden_layers"])),
            shared=given(values, "shared_expert_intermediate_size", self.shared)
            if self.shared
            else 0,
        )

    def told(self, experts: ExpertsConfig, depth: int) -> dict[str, Any]:
        """See `ExpertsForm`."""
        told: dict[str, Any] = {"num_experts": experts.count, "num_local_experts": experts.count}
        told |= {"num_experts_per_tok": experts.top_k, self.hidden[0]: experts.hidden}
        if self.selection is None:
            told["norm_topk_prob"] = experts.selection == RENORMALISED
        if self.spaced:
            told["decoder_sparse_step"] = experts.every
            told["mlp_only_layers"] = list(experts.dense)
        if self.shared:
            told["shared_expert_intermediate_size"] = experts.shared
        return told

    def fits(self, experts: ExpertsConfig, depth: int) -> bool:
        """See `ExpertsForm`."""
        return (
            experts.plain
            and experts.selection in (self.selection, *(() if self.selection else BY_SHARES))
            and bool(self.shared) == bool(experts.shared)
            and (not experts.shared or experts.shared_weight == "sigmoid")
            and (self.spaced or (experts.every, experts.dense) == (1, ()))
        )


BY_SHARES = (RENORMALISED, SHARES)


@dataclass(frozen=True)
class GroupedFamily:
    """DeepSeek's way: experts in groups, shared ones as multiples of one, dense layers in front.

    Defaults are those of the family's class; None: its files have to say. sigmoids: whether scores
    are sigmoids with a bias on the choice (V3) and not softmax (V2).
    """

    count: int | None
    top_k: int | None
    hidden: int
    shared: int | None
    dense: int
    groups: int
    top_groups: int
    factor: float
    normalised: bool
    sigmoids: bool = True

    def read(self, values: Mapping[str, Any], where: str) -> ExpertsConfig:
        """See `ExpertsForm`."""

        def needed(name: str, default: Any) -> Any:
            found = given(values, name, default)
            if found is None:
                raise UserError(f"{where}: {name} is missing; download it again.")
            return found

        hidden = given(values, "moe_intermediate_size", self.hidden)
        first = given(values, "first_k_dense_replace", self.dense)
        count = given(values, "num_local_experts", given(values, "num_experts", self.count))
        groups, top_groups = self._groups(values, where)
        return ExpertsConfig(
            count=needed("n_routed_experts", count),
            top_k=needed("num_experts_per_tok", self.top_k),
            hidden=hidden,
            selection=self._selection(values, where),
            choice="score_plus_bias" if self.sigmoids else "score",
            groups=groups,
            top_groups=top_groups,
            group_score=self._group_score,
            factor=float(given(values, "routed_scaling_factor", self.factor)),
            dense=tuple(range(min(first, values["num_hidden_layers"]))),
            shared=hidden * needed("n_shared_experts", self.shared),
            shared_weight="one",
        )

    @property
    def _group_score(self) -> Literal["best", "two_best"]:
        return "two_best" if self.sigmoids else "best"

    def _selection(self, values: Mapping[str, Any], where: str) -> Any:
        normalised = given(values, "norm_topk_prob", self.normalised)
        if self.sigmoids:
            return SIGMOIDS_RENORMALISED if normalised else SIGMOIDS
        if normalised:
            raise UserError(
                f"{where}: norm_topk_prob is True, which transformers' code of this family does "
                "not follow, so that nothing says what its weights would be: only false can be "
                "loaded."
            )
        return SHARES

    def _groups(self, values: Mapping[str, Any], where: str) -> tuple[int, int]:
        groups = given(values, "n_group", self.groups), given(values, "topk_group", self.top_groups)
        if self.sigmoids:
            return groups
        method = given(values, "topk_method", "greedy")
        if method not in METHODS:
            raise UserError(
                f"{where}: topk_method is {shown(method)}; only {' and '.join(METHODS)} can be "
                "loaded."
            )
        return groups if method == METHODS[1] else (1, 1)

    def told(self, experts: ExpertsConfig, depth: int) -> dict[str, Any]:
        """See `ExpertsForm`."""
        told: dict[str, Any] = {
            "n_routed_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.hidden,
            "n_shared_experts": experts.shared // experts.hidden,
            "first_k_dense_replace": len(experts.dense),
            "n_group": experts.groups,
            "topk_group": experts.top_groups,
            "routed_scaling_factor": experts.factor,
            "norm_topk_prob": experts.selection == SIGMOIDS_RENORMALISED,
        }
        if not self.sigmoids:
            told["topk_method"] = METHODS[experts.groups > 1]
        return told

    def fits(self, experts: ExpertsConfig, depth: int) -> bool:
        """See `ExpertsForm`."""
        selections = (SIGMOIDS_RENORMALISED, SIGMOIDS) if self.sigmoids else (SHARES,)
        choice = "score_plus_bias" if self.sigmoids else "score"
        return (
            experts.selection in selections
            and experts.choice == choice
            and experts.group_score == self._group_score
            and experts.shared > 0
            and experts.shared % experts.hidden == 0
            and experts.shared_weight == "one"
            and experts.every == 1
            and experts.dense == tuple(range(len(experts.dense)))
        )


METHODS = ("greedy", "group_limited_greedy")
