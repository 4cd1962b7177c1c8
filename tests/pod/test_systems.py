"""One step of every system, compiled for a small TPU pod that is not there; needs libtpu.

One system of each domain is compiled with the slow tests. All of them, a quarter of an hour on two
cores, and layers as wide as the published ones, as long again:

    python -m pytest -m 'slow or claims' tests/pod/test_systems.py

They are tiny configurations with few blocks and one task, since every further one is compiled like
the first; decoders scan their blocks. Whole models at their published size: bench/README.md.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from moezoo import registry
from moezoo.planning import layer as pod
from moezoo.planning import step as pod_step
from moezoo.train import config as configs

TOPOLOGY = "v5e:2x2"
BATCH = ["--train.batch", "4", "--evaluate.batch", "4"]
EXPERTS = ["--mesh.expert", "2", "--mesh.fsdp", "2"]
SPLIT = ["--mesh.fsdp", "4"]
SCAN = ["--model.decoder.layers", "scanned", *SPLIT]
SMALL = ["--data.resolution", "32", "32"]
DEPTH = ["--model.depth", "1", "--tasks", "depth", *SMALL]
PARTS = ["--model.depth", "1", "--tasks", "parts", *SMALL]
STAGES = ["--model.depths", "1", "1", "1", "1"]
TRAVEL = ["--model.dispatch", "all_to_all", *EXPERTS]
# By system: a configuration, options.
PODS = {
    "AdapterFusionConfig": ("text/adapter_fusion_tiny", SCAN),
    "ConditionalMoEConfig": (
        "rooms/conditional_moe_tiny",
        ["--model.depth", "1", "--tasks", "scene", *SPLIT],
    ),
    "ALTERConfig": ("text/alter_tiny", SCAN),
    "CPolyConfig": ("text/cpoly_tiny", SCAN),
    "DyTConfig": ("rooms/dyt_tiny", [*PARTS, *SPLIT]),
    "MeteoRAConfig": ("text/meteora_tiny", SCAN),
    "MixDAConfig": ("text/mixda_tiny", SPLIT),
    "MoCLEConfig": ("text/mocle_tiny", SCAN),
    "MoSAConfig": ("rooms/mosa_tiny", [*PARTS, *SPLIT]),
    "MTLoRAConfig": ("rooms/mtlora_tiny", ["--tasks", "parts", *STAGES, *SPLIT]),
    "MTLoRAViTConfig": ("rooms/mtlora_vit_tiny", [*PARTS, *SPLIT]),
    "PhatgooseConfig": ("text/phatgoose_tiny", SCAN),
    "LanguageConfig": ("text/base_tiny", SCAN),
    "M3ViTConfig": (
        "rooms/m3vit_tiny",
        ["--model.depth", "2", "--tasks", "depth", *SMALL, *TRAVEL],
    ),
    "MLoREConfig": ("rooms/mlore_tiny", [*DEPTH, "--model.levels", "1", *SPLIT]),
    "ModSquadConfig": (
        "rooms/mod_squad_tiny",
        [*DEPTH, "--train.mutual_information_weight", "0", *TRAVEL],
    ),
    "PolyConfig": ("text/polytropon_tiny", SCAN),
    "SMoRAConfig": ("text/smora_tiny", SCAN),
    "SoftMoAConfig": ("sounds/soft_moa_tiny", ["--model.ast.depth", "1", *SPLIT]),
    "SwinDenseConfig": ("rooms/swin_dense_tiny", ["--tasks", "depth", *STAGES, *SPLIT]),
    "TaskExpertConfig": ("rooms/taskexpert_tiny", [*DEPTH, "--model.levels", "1", *SPLIT]),
    "ViTDenseConfig": ("rooms/vit_dense_tiny", [*DEPTH, *SPLIT]),
    "VMoEConfig": (
        "rooms/vmoe_tiny",
        ["--model.depth", "2", "--tasks", "scene", *SMALL, *TRAVEL],
    ),
}
# Of each domain one, with layers of experts where there are some.
IN_CI = ("LanguageConfig", "M3ViTConfig", "SoftMoAConfig", "ConditionalMoEConfig")
# The published widths, heads and experts.
WIDE = ["--model.width", "768", "--model.depth", "2", "--data.resolution", "64", "64"]
WIDTHS = {
    "M3ViTConfig": ("nyud/m3vit_small", ["--model.heads", "12", *WIDE, *EXPERTS]),
    "ModSquadConfig": ("rooms/mod_squad_tiny", ["--model.heads", "6", *WIDE, *EXPERTS]),
    "ViTDenseConfig": ("rooms/vit_dense_tiny", ["--model.heads", "12", *WIDE, *SPLIT]),
    "VMoEConfig": ("jft/vmoe_h14", ["--model.depth", "2", "--model.experts", "8", *EXPERTS]),
    "ConditionalMoEConfig": ("rooms/conditional_moe_base", ["--model.depth", "2", *SPLIT]),
}
needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed (extra pod)"
)


def test_every_system_has_a_pod() -> None:
    assert set(PODS) == set(registry.SYSTEMS.places) and set(IN_CI) | set(WIDTHS) <= set(PODS)


def compiled(system: str, name: str, words: list[str]) -> None:
    config = configs.load(name, [*words, *BATCH])
    assert type(config.model).__name__ == system
    row = pod_step.measure(config, TOPOLOGY, pod.devices_of(TOPOLOGY))
    assert row.fits and row.chips == 4 and row.flops > 0
    assert row.bound.seconds is not None and row.bound.seconds > 0
    assert row.parameter_bytes < 4 * row.parameters, "some are split"
    if "--mesh.expert" in words:
        assert row.moe_layers > 0 and row.token_ratio is not None and row.token_ratio >= 1.0


def marked(system: str) -> list[pytest.MarkDecorator]:
    return [] if system in IN_CI else [pytest.mark.claims]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("system", [pytest.param(s, marks=marked(s)) for s in PODS])
def test_a_step_fits_a_pod(system: str) -> None:
    compiled(system, *PODS[system])


@pytest.mark.slow
@pytest.mark.claims
@needs_libtpu
@pytest.mark.parametrize("system", WIDTHS)
def test_wide_layers_fit_a_pod(system: str) -> None:
    compiled(system, *WIDTHS[system])
