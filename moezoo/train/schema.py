"""What a run's configuration consists of: nested frozen dataclasses with every default.

The docstrings under the fields are the help texts of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from moezoo import fields, registry
from moezoo.fields import BatchSize, Count, FilePath, NotNegative, Range, Seed, Whole
from moezoo.train.optim import OptimConfig


@runtime_checkable
class ModelConfig(Protocol):
    """What a model's configuration offers; the registered ones are frozen dataclasses.

    They raise UserError when made with sizes that make no model, or with a choice that its routers
    could not learn. What else they may answer is named by `models.shared.config.ModelTraits`.
    """

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: Any) -> Any:
        """The model for `{task name: channels}` on examples of this size.

        The size is the domain's: (height, width) in pixels, or what stands for them.
        """
        ...


@runtime_checkable
class DataSection(Protocol):
    """The `data` section: a frozen dataclass of one kind of data, which can be made without
    arguments.
    """

    @property
    def name(self) -> str:
        """The data set's."""
        ...

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All data sets of this kind that are known."""
        ...

    @property
    def domain(self) -> Any:
        """What answers for it (`train.domain.Domain`)."""
        ...


@runtime_checkable
class ProtocolSection(Protocol):
    """The `protocol` section: the dataclass that the domain of the data has for it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


# Factors of the tasks' losses by task, as `TaskWeights(depth=4.0)`; None and a task that is not
# named: that of the paper.
TaskWeights = dict[str, float | None]


def _tasks(config: Any) -> tuple[str, ...]:
    """The tasks that may have a weight: all that the domain of the configured data has."""
    return tuple(config.data.domain.tasks)


def _trained(config: Any) -> tuple[str, ...]:
    """The tasks that are trained; a file may have weights of more, for runs that choose."""
    return tuple(config.tasks)


WEIGHTS = fields.Keys(_tasks, _trained, "Factor of the task's loss; None: that of the paper.")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: Count = 1000
    """Updates of the parameters in the whole run."""
    batch: BatchSize = 16
    """Examples per update, over all devices and hosts."""
    gradient_accumulation: BatchSize = 1
    """Slices that a batch is computed in; saves memory. Means over labelled pixels or tokens become
    means of the slices' means; nothing else changes."""
    rematerialise: Literal["nothing", "all_but_products"] = "nothing"
    """all_but_products: the gradient keeps the results of matrix products alone and computes what
    lies between them again, which saves memory and costs a few per cent of time."""
    importance_weight: NotNegative = 0.01
    """Factor of the importance loss (balance of summed router probabilities); not used where
    nothing is chosen."""
    load_weight: NotNegative = 0.0
    """Factor of the load loss (balance of expected token counts; needs router noise)."""
    switch_weight: NotNegative = 0.0
    """Factor of Switch's and GShard's loss (share of tokens times mean probability)."""
    mutual_information_weight: NotNegative = 0.0
    """Factor of the mutual-information loss (each task to few experts, all experts used); judges
    each slice of gradient_accumulation by itself."""
    task_weighting: Literal["fixed", "learned"] = "fixed"
    """learned: the factors below are multiplied by 0.5 / sigma^2, one trained sigma per task."""
    weights: Annotated[dict[str, NotNegative | None], WEIGHTS] = field(default_factory=dict)
    """Factors of the tasks' losses by task; one that is not named has that of its paper."""
    task_gradients: Literal["as_is", "normalised"] = "as_is"
    """normalised: where each step is one task's, its gradient is scaled to length 1 times the
    task's weight, and enters adamw's moments divided by the task's share of the steps."""
    class_balance: NotNegative = 0.0
    """Power of the inverse frequency by which maps of classes weigh them; the papers: 0."""
    nonfinite_steps: Whole = 5
    """Steps in a row that are skipped because their loss, gradient or update is not finite; one
    more ends the run. 0 ends it at the first."""
    log_every: Count = 20
    """Steps between lines of metrics.jsonl."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation while training and at the end."""

    every: Whole = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    batch: BatchSize | None = None
    """Examples per step of the evaluation; None takes the training batch."""
    examples: Count | None = None
    """Evaluate only the first so many examples; None takes all."""
    pictures: Annotated[int, Range(0, 64)] = 4
    """Examples drawn with predictions beside truth."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run, in the folder `checkpoints` of the run."""

    every: Count = 200
    """Steps between checkpoints; the end of a run always writes one."""
    keep: Count = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    resume: Literal["auto", "never", "always"] = "auto"
    """auto: go on from the newest valid checkpoint, or begin; never: refuse a run that has any;
    always, as with --resume: refuse to begin again where no checkpoint of the run is valid."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; at most one axis may be -1: the rest."""

    data: Annotated[int, Range(-1, 2**20)] = -1
    """Copies of the model that split the batch."""
    fsdp: Annotated[int, Range(-1, 2**20)] = 1
    """Devices that split parameters and batch."""
    expert: Annotated[int, Range(-1, 2**20)] = 1
    """Devices that split the experts and the batch."""
    tensor: Annotated[int, Range(-1, 2**20)] = 1
    """Devices that split single matrices."""
    slices: Annotated[int, Range(1, 2**20)] = 1
    """Pod slices joined by the slower network; those that no axis below takes split the data axis
    outermost."""
    fsdp_slices: Annotated[int, Range(1, 2**20)] = 1
    """The outer part of the fsdp axis: over how many slices it goes."""
    expert_slices: Annotated[int, Range(1, 2**20)] = 1
    """The outer part of the expert axis: over how many slices tokens travel."""
    tensor_slices: Annotated[int, Range(1, 2**20)] = 1
    """The outer part of the tensor axis."""


@dataclass(frozen=True)
class HostsConfig:
    """Processes of a run on several hosts; found by itself on TPU pods, Slurm and Open MPI."""

    coordinator: str | None = None
    """Address host:port of process 0; give it only where nothing is detected."""
    count: Count | None = None
    """Number of processes."""
    index: Whole | None = None
    """Number of this process, from 0."""
    timeout: Annotated[int, Range(1, 86_400)] = 50
    """Seconds to wait for the other processes; more where hosts come one after the other."""


@dataclass(frozen=True)
class UpcycleConfig:
    """How experts, their routers and weights begin where start_from has an MLP."""

    experts: Literal["copy", "split"] = "copy"
    """copy: every expert is the whole MLP; split: smaller experts are equal groups of its hidden
    units, with as many copies of each group as there are experts for."""
    router: Literal["fresh", "clusters"] = "fresh"
    """clusters: routers begin with the centres of tokens that enter the layer in the dense model,
    of four batches of the training data."""
    gates: Literal["as_is", "rescaled"] = "as_is"
    """rescaled: where a token's weights do not add up to 1, they begin equal and what experts give
    is scaled, so that step 0 computes what the dense model did."""
    noise: NotNegative = 0.0
    """Gaussian noise on the experts' matrices, in standard deviations of each."""
    noise_share: Annotated[float, Range(above=0, most=1)] = 1.0
    """The share of experts that get noise; the others, from the first on, begin without."""


@dataclass(frozen=True)
class LogConfig:
    """Where measurements go besides metrics.jsonl and the console."""

    tensorboard: Literal["auto", "on", "off"] = "auto"
    """TensorBoard event files: auto writes them where tensorboardX is installed."""
    wandb: Literal["auto", "on", "off"] = "off"
    """A run of Weights & Biases: auto where wandb is installed. It sends measurements over the
    network, unless WANDB_MODE=offline."""
    profile: str | None = None
    """Steps that JAX's profiler records into the run's folder profile/, such as 100:110."""
    hang: NotNegative = 600.0
    """Seconds without progress after which every process says what its threads do; 0: never."""


UNSET: Any = None  # `Config` puts the domain's default in its place


@dataclass(frozen=True)
class Config:
    """A training run."""

    name: FilePath
    """The run's name; its files go to <directory>/<name>."""
    model: ModelConfig
    tasks: Annotated[tuple[str, ...], fields.KnownWords(_tasks)]
    """What is predicted."""
    data: DataSection = field(default_factory=registry.default_data)
    optimiser: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    protocol: ProtocolSection = field(default=UNSET)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    start_from: FilePath | None = None
    """Folder of a run whose parameters this one begins with, as far as they fit; the name of a
    configuration, as text/skills_tiny, for the weights that come with it or its finished run; or a
    pretrained network: on text the folder of a Hugging Face decoder, on images a vision transformer
    (.npz of augreg, .safetensors or .pth of timm or DeiT, a folder of either or of transformers;
    .pth of M3ViT's or MLoRE's code); also as hf:owner/name@revision on the Hugging Face Hub.
    Experts that stand where that has an MLP begin as copies of it (upcycling)."""
    start_heads: Annotated[int, Range(1, 2**16)] | None = None
    """Attention heads of that vision transformer, where its file does not tell them (timm, DeiT);
    --model.heads on the command line says it, too."""
    start_without: tuple[str, ...] = ()
    """What of that vision transformer is left out on purpose, by name or pattern: dist_token,
    blocks/*/mlp. Whatever else it has must have a place in the model."""
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    seed: Seed = 0
    """Decides initial parameters, the order of examples and router noise."""
    directory: FilePath = "runs"
    """Folder of all runs, on a disk or in an object store (gs://bucket/folder)."""

    def __post_init__(self) -> None:
        if self.protocol is UNSET:
            object.__setattr__(self, "protocol", self.data.domain.protocol())
