"""Measure moezoo: experts, adapters, skipping, paths, steps, what a trainer costs, pods and GPUs.

Example: moezoo bench moe --json bench.json --picture bench.png
Example: moezoo bench lowrank --json lowrank.json
Example: moezoo bench adapters --json adapters.json
Example: moezoo bench conditional --json conditional.json
Example: moezoo bench skipping --json skipping.json
Example: moezoo bench library library runs/skills_tiny --json library.json
Example: moezoo bench multitask --out family --seeds 0 1 2
Example: moezoo bench serving --json serving.json
Example: moezoo bench stream --json stream.json --picture stream.png
Example: moezoo bench paths rooms/m3vit_tiny rooms/vmoe_tiny
Example: moezoo bench steps text/smora_tiny model.update=lora as_is
Example: moezoo bench overhead rooms/m3vit_small
Example: moezoo bench pod --topology v5p:8x8x8 --json pod.json
Example: moezoo bench gpu --out gpu --seconds 840
"""

from __future__ import annotations

import os
from collections.abc import Callable

from moezoo.errors import unknown


def run_moe(words: list[str]) -> int:
    """MoE layers beside a dense network, on this machine."""
    from moezoo.bench.moe import run

    return _heard(run, words)


def run_pod(words: list[str]) -> int:
    """MoE layers compiled for a TPU pod."""
    # Before JAX is imported: with libtpu installed it would look for a TPU on this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from moezoo.bench.pod import run

    return _heard(run, words)


def run_lowrank(words: list[str]) -> int:
    """Linear layers with low-rank updates beside plain LoRA, on this machine."""
    from moezoo.bench.lowrank import run

    return _heard(run, words)


def run_adapters(words: list[str]) -> int:
    """Transformer blocks with mixtures of adapters beside single ones, on this machine."""
    from moezoo.bench.adapters import run

    return _heard(run, words)


def run_conditional(words: list[str]) -> int:
    """A block whose linear maps are mixed by a condition beside a dense one, on this machine."""
    from moezoo.bench.conditional import run

    return _heard(run, words)


def run_skipping(words: list[str]) -> int:
    """A vision transformer whose MLPs skip tokens beside one that skips none, on this machine."""
    from moezoo.bench.skipping import run

    return run(words)


def run_library(words: list[str]) -> int:
    """Every route over a library of adapters, by exact match."""
    from moezoo.bench.library import run

    return run(words)


def run_multitask(words: list[str]) -> int:
    """Every system of adapters trained on nine instruction tasks, beside the papers' claims."""
    from moezoo.bench.multitask import run

    return _heard(run, words)


def run_serving(words: list[str]) -> int:
    """A batch of different adapters beside one adapter for all, on this machine."""
    from moezoo.bench.serving import run

    return run(words)


def run_stream(words: list[str]) -> int:
    """A MoE layer with experts in a file beside the same one in memory, on this machine."""
    from moezoo.bench.stream import run

    return run(words)


def run_paths(words: list[str]) -> int:
    """Every task's path beside the model that it is cut out of, on this machine."""
    from moezoo.bench.paths import run

    return run(words)


def run_steps(words: list[str]) -> int:
    """Training steps of one configuration in several variants, on this machine."""
    from moezoo.bench.steps import run

    return _heard(run, words)


def run_overhead(words: list[str]) -> int:
    """The trainer beside a bare loop of the same step, on this machine."""
    from moezoo.bench.overhead import run

    return _heard(run, words)


def run_gpu(words: list[str]) -> int:
    """Kernels, layers and runs that need a GPU, in order of importance."""
    from moezoo.bench.gpu import run

    return _heard(run, words)


def _heard(run: Callable[[list[str]], int], words: list[str]) -> int:
    """Run it, with a line about which dispatch is measured."""
    from moezoo.ops.grouped import speak_of_choices

    speak_of_choices()
    return run(words)


BENCHMARKS = {
    "moe": run_moe,
    "lowrank": run_lowrank,
    "adapters": run_adapters,
    "conditional": run_conditional,
    "skipping": run_skipping,
    "library": run_library,
    "multitask": run_multitask,
    "serving": run_serving,
    "stream": run_stream,
    "paths": run_paths,
    "steps": run_steps,
    "overhead": run_overhead,
    "pod": run_pod,
    "gpu": run_gpu,
}
# The class of each benchmark's arguments, in its module of `moezoo.bench`.
ARGUMENTS = {
    "moe": "MoEArguments",
    "lowrank": "LowRankArguments",
    "adapters": "AdapterArguments",
    "conditional": "ConditionalArguments",
    "skipping": "SkippingArguments",
    "library": "LibraryArguments",
    "multitask": "MultitaskArguments",
    "serving": "ServingArguments",
    "stream": "StreamArguments",
    "paths": "PathsArguments",
    "steps": "StepArguments",
    "overhead": "OverheadArguments",
    "pod": "PodArguments",
    "gpu": "GPUArguments",
}


def usage() -> str:
    """The help of `moezoo bench`: a line of each benchmark, and examples."""
    width = max(map(len, BENCHMARKS))
    lines = "\n".join(f"  {name:{width}}  {run.__doc__}" for name, run in BENCHMARKS.items())
    first, _, examples = (__doc__ or "").partition("\n\n")
    return f"usage: moezoo bench NAME [options]\n\n{first}\n\n{lines}\n\n{examples}".rstrip()


def main(words: list[str], prog: str) -> int:
    """Run the benchmark that the first word names."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in BENCHMARKS:
        raise unknown("benchmark", words[0], list(BENCHMARKS))
    return BENCHMARKS[words[0]](words[1:])
