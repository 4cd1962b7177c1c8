"""What computation reordering costs on an accelerator: M3ViT's memory and latency as formulas.

M3ViT (arXiv:2210.14793, section 3.2, table 4) runs a MoE layer expert by expert with two weight
buffers. On-chip memory is then that of the dense network and the routers, whatever the number of
experts; a layer's time is

    t = t_router + load(first) + sum_j max(compute(q_j), load(e_{j+1})) + compute(q_last)

with q_j the queue of the j-th expert that has tokens. The formulas give the paper's table with the
`ZCU104` below, whose rates are not in the paper: they follow from its latencies (products per cycle
from the dense row, those of the routers from the difference of the reordered one) and from the
peak of its memory, 64 bits of DDR4-2400.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Accelerator:
    """Rates of a chip with little memory of its own.

    clock: Hz.   products, router_products: multiply-accumulates a cycle, in experts and in routers.
    bandwidth: bytes a second from outside.   weight_bytes: of one number.   watts: at work.
    """

    clock: float
    products: float
    router_products: float
    bandwidth: float
    weight_bytes: int
    watts: float

    def compute(self, macs: float) -> float:
        """Seconds for so many multiply-accumulates."""
        return macs / (self.products * self.clock)

    def route(self, macs: float) -> float:
        """Seconds for a router's multiply-accumulates."""
        return macs / (self.router_products * self.clock)

    def load(self, parameters: float) -> float:
        """Seconds until so many parameters are on the chip."""
        return parameters * self.weight_bytes / self.bandwidth

    def joules(self, seconds: float) -> float:
        """Energy of so many seconds."""
        return self.watts * seconds


ZCU104 = Accelerator(300e6, 1535, 1230, 19.2e9, 2, 10.0)


@dataclass(frozen=True)
class ExpertSizes:
    """A MoE layer: width D, hidden units F of an expert, E experts, K of them for a token."""

    width: int
    hidden: int
    experts: int
    k: int

    @property
    def expert_parameters(self) -> int:
        """Of one expert, biases included."""
        return 2 * self.width * self.hidden + self.hidden + self.width

    @property
    def router_parameters(self) -> int:
        """Of one router, which has no biases."""
        return self.width * self.experts

    def expert_macs(self, tokens: float) -> float:
        """Multiply-accumulates of one expert for a queue."""
        return tokens * 2 * self.width * self.hidden

    def router_macs(self, tokens: float) -> float:
        """Multiply-accumulates of a router."""
        return tokens * self.router_parameters


def layer_seconds(
    chip: Accelerator, sizes: ExpertSizes, queues: Sequence[int], hidden_load: float = 0.0
) -> float:
    """Seconds of a reordered layer.

    queues: tokens of every expert; those without any are not loaded.   hidden_load: seconds of work
    before the layer that the first load may hide behind. The router's time hides it as well.
    """
    live = [queue for queue in queues if queue]
    if not live:
        return 0.0
    load = chip.load(sizes.expert_parameters)
    # K experts for each token: that many places in queues are one token at the router.
    router = chip.route(sizes.router_macs(sum(live) / sizes.k))
    computed = [chip.compute(sizes.expert_macs(queue)) for queue in live]
    waited = max(0.0, load - router - hidden_load)
    return router + waited + sum(max(one, load) for one in computed[:-1]) + computed[-1]


def token_by_token_seconds(
    chip: Accelerator, sizes: ExpertSizes, tokens: int, cached: int
) -> float:
    """Seconds that a layer in order of tokens waits for weights with room for `cached` experts.

    Neighbouring tokens choose unlike experts, so a visit misses with probability 1 - cached / E.
    """
    misses = tokens * sizes.k * (1 - cached / sizes.experts)
    return misses * chip.load(sizes.expert_parameters)


def reordered_mib(dense_mib: float, chip: Accelerator, sizes: ExpertSizes) -> float:
    """On-chip memory of the reordered network: the dense one's, whose buffers hold the experts."""
    return dense_mib + sizes.router_parameters * chip.weight_bytes / MIB


def all_experts_mib(
    dense_mib: float, chip: Accelerator, sizes: ExpertSizes, held: int = 4
) -> float:
    """On-chip memory with all experts of a layer at once.

    held: experts that the buffers of a dense MLP take anyway, which is K times as wide.
    """
    more = (sizes.experts - held) * sizes.expert_parameters * chip.weight_bytes / MIB
    return reordered_mib(dense_mib, chip, sizes) + more
