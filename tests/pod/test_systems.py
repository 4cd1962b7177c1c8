"""One step of every system, compiled for a small TPU pod that is not there; needs libtpu.

Widths, heads and experts of the vision systems with MoE layers are the published ones; depths and
pictures are cut, since every further block is compiled like the first. The others are their tiny
configurations. Whole models at their published size: bench/README.md.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from moezoo import registry
from moezoo.planning import layer as pod
from moezoo.planning import step as pod_step
from moezoo.train import config as configs

TOPOLOGY = "v5e:2x2"
BASE = ["--model.width", "768", "--model.heads", "12", "--model.depth", "2"]
SMALL = ["--data.resolution", "64", "64"]
BATCH = ["--train.batch", "8", "--evaluate.batch", "8"]
EXPERTS = ["--mesh.expert", "2", "--mesh.fsdp", "2"]
SPLIT = ["--mesh.fsdp", "4"]
# By system: a configuration, options.
PODS = {
    "AdapterFusionConfig": ("text/adapter_fusion_tiny", SPLIT),
    "ConditionalMoEConfig": ("rooms/conditional_moe_base", ["--model.depth", "2", *SPLIT]),
    "ALTERConfig": ("text/alter_tiny", SPLIT),
    "CPolyConfig": ("text/cpoly_tiny", SPLIT),
    "DyTConfig": ("rooms/dyt_tiny", SPLIT),
    "MeteoRAConfig": ("text/meteora_tiny", SPLIT),
    "MixDAConfig": ("text/mixda_tiny", SPLIT),
    "MoCLEConfig": ("text/mocle_tiny", SPLIT),
    "MoSAConfig": ("rooms/mosa_tiny", SPLIT),
    "MTLoRAConfig": ("rooms/mtlora_tiny", SPLIT),
    "MTLoRAViTConfig": ("rooms/mtlora_vit_tiny", SPLIT),
    "PhatgooseConfig": ("text/phatgoose_tiny", SPLIT),
    "LanguageConfig": ("text/base_tiny", SPLIT),
    "M3ViTConfig": ("nyud/m3vit_small", [*BASE, *SMALL, *EXPERTS]),
    "MLoREConfig": ("rooms/mlore_tiny", SPLIT),
    "ModSquadConfig": ("rooms/mod_squad_tiny", [*BASE, *SMALL, *EXPERTS]),
    "PolyConfig": ("text/polytropon_tiny", SPLIT),
    "SMoRAConfig": ("text/smora_tiny", SPLIT),
    "SoftMoAConfig": ("sounds/soft_moa_tiny", SPLIT),
    "SwinDenseConfig": ("rooms/swin_dense_tiny", SPLIT),
    "TaskExpertConfig": ("rooms/taskexpert_tiny", SPLIT),
    "ViTDenseConfig": ("rooms/vit_dense_tiny", [*BASE, *SPLIT]),
    "VMoEConfig": ("jft/vmoe_h14", ["--model.depth", "2", "--model.experts", "8", *EXPERTS]),
}


def test_every_system_has_a_pod() -> None:
    assert set(PODS) == set(registry.SYSTEMS.places)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra pod)")
@pytest.mark.parametrize("system", PODS)
def test_a_step_fits_a_pod(system: str) -> None:
    name, words = PODS[system]
    config = configs.load(name, [*words, *BATCH])
    assert type(config.model).__name__ == system
    row = pod_step.measure(config, TOPOLOGY, pod.devices_of(TOPOLOGY))
    assert row.fits and row.chips == 4 and row.flops > 0
    assert row.bound.seconds is not None and row.bound.seconds > 0
    if "--mesh.expert" in words:
        assert row.moe_layers > 0 and row.token_ratio is not None and row.token_ratio >= 1.0
