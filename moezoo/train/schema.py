"""What a run's configuration consists of: nested frozen dataclasses with every default.

The docstrings under the fields are the help texts of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moezoo.data.audio.config import AudioDataConfig
from moezoo.data.config import DataConfig
from moezoo.data.pairs.config import PairsDataConfig
from moezoo.data.text.config import TextDataConfig
from moezoo.train.optim import OptimConfig


class ModelConfig(Protocol):
    """What a model's configuration offers; the registered ones are frozen dataclasses.

    They raise UserError when made with sizes that make no model. Those with numbers of `experts`
    and a size of `patch` give them under these names.
    """

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: Any) -> Any:
        """The model for `{task name: channels}` on images of `image_size` (height, width).

        For sounds that is (frames, mel bands), for text (1, tokens).
        """
        ...


@dataclass(frozen=True)
class TaskWeights:
    """Factors of the tasks' losses; None: that of the paper."""

    semseg: float | None = None
    """Semantic segmentation."""
    parts: float | None = None
    """Object parts."""
    saliency: float | None = None
    """Saliency."""
    normals: float | None = None
    """Surface normals."""
    edge: float | None = None
    """Edges."""
    depth: float | None = None
    """Depth."""
    scene: float | None = None
    """Kind of scene."""
    lm: float | None = None
    """Next token."""
    event: float | None = None
    """Kind of sound."""
    register: float | None = None
    """Its register: low, middle or high."""
    room: float | None = None
    """The room it sounds in."""
    word: float | None = None
    """A spoken word."""
    intent: float | None = None
    """What a spoken sentence asks for: action, object and location together."""
    action: float | None = None
    """What is to be done."""
    object: float | None = None
    """With what."""
    location: float | None = None
    """Where."""
    caption: float | None = None
    """Next word of a caption."""
    retrieval: float | None = None
    """Which caption belongs to which image."""
    mlm: float | None = None
    """Hidden words."""
    text_scene: float | None = None
    """Kind of scene, from a text."""
    counts: float | None = None
    """Which image has the things that a text lists."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    """Updates of the parameters in the whole run."""
    batch: int = 16
    """Examples per update, over all devices and hosts."""
    gradient_accumulation: int = 1
    """Slices that a batch is computed in; saves memory. Means over labelled pixels or tokens become
    means of the slices' means; nothing else changes."""
    importance_weight: float = 0.01
    """Factor of the importance loss (balance of summed router probabilities)."""
    load_weight: float = 0.0
    """Factor of the load loss (balance of expected token counts; needs router noise)."""
    switch_weight: float = 0.0
    """Factor of Switch's and GShard's loss (share of tokens times mean probability)."""
    mutual_information_weight: float = 0.0
    """Factor of the mutual-information loss (each task to few experts, all experts used); judges
    each slice of gradient_accumulation by itself."""
    task_weighting: Literal["fixed", "learned"] = "fixed"
    """learned: the factors below are multiplied by 0.5 / sigma^2, one trained sigma per task."""
    weights: TaskWeights = field(default_factory=TaskWeights)
    task_gradients: Literal["as_is", "normalised"] = "as_is"
    """normalised: where each step is one task's (pairs), its gradient is scaled to length 1 times
    the task's weight, and enters adamw's moments divided by the task's share of the steps."""
    class_balance: float = 0.0
    """Power of the inverse frequency that semseg and parts weigh classes by; the papers: 0."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""


@dataclass(frozen=True)
class ProtocolConfig:
    """How tasks are posed and scored, where benchmarks differ."""

    saliency_channels: Literal[1, 2] = 1
    """1: a sigmoid (M3ViT); 2: a softmax (TaskPrompter's code base)."""
    edge_positive_weight: float = 0.95
    """Share of the edge loss that edge pixels get; the rest goes to the others."""
    edge: Literal["rooms", "pascal", "pascal_regions", "nyud"] | None = None
    """Boundary benchmark (tolerance, thresholds, truth); None: that of the data set. pascal scores
    drawn lines, pascal_regions (PASCAL-Context's own) the region maps."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation while training and at the end."""

    every: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    batch: int | None = None
    """Examples per step of the evaluation; None takes the training batch."""
    examples: int | None = None
    """Evaluate only the first so many examples; None takes all."""
    pictures: int = 4
    """Examples drawn with predictions beside truth."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run, in the folder `checkpoints` of the run."""

    every: int = 200
    """Steps between checkpoints; the end of a run always writes one."""
    keep: int = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest valid checkpoint; never: refuse a run that has any."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; at most one axis may be -1: the rest."""

    data: int = -1
    """Copies of the model that split the batch."""
    fsdp: int = 1
    """Devices that split parameters and batch."""
    expert: int = 1
    """Devices that split the experts and the batch."""
    tensor: int = 1
    """Devices that split single matrices."""
    slices: int = 1
    """Pod slices joined by the slower network; they split the data axis outermost."""


@dataclass(frozen=True)
class HostsConfig:
    """Processes of a run on several hosts; found by itself on TPU pods, Slurm and Open MPI."""

    coordinator: str | None = None
    """Address host:port of process 0; give it only where nothing is detected."""
    count: int | None = None
    """Number of processes."""
    index: int | None = None
    """Number of this process, from 0."""
    timeout: int = 300
    """Seconds to wait for the other processes."""


@dataclass(frozen=True)
class LogConfig:
    """Where measurements go besides metrics.jsonl and the console."""

    tensorboard: Literal["auto", "on", "off"] = "auto"
    """TensorBoard event files: auto writes them where tensorboardX is installed."""


DataSection = DataConfig | TextDataConfig | AudioDataConfig | PairsDataConfig


@dataclass(frozen=True)
class Config:
    """A training run."""

    name: str
    """The run's name; its files go to <directory>/<name>."""
    model: ModelConfig
    tasks: tuple[str, ...]
    """What is predicted."""
    data: DataSection = field(default_factory=DataConfig)
    optimiser: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    start_from: str | None = None
    """Folder of a run whose parameters this one begins with, as far as they fit, or a file with a
    pretrained vision transformer (.npz of augreg, .safetensors of timm or DeiT); experts that
    stand where that model has an MLP begin as copies of it (sparse upcycling)."""
    seed: int = 0
    """Decides initial parameters, the order of examples and router noise."""
    directory: str = "runs"
    """Folder of all runs."""
