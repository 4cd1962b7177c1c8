"""Runs on sound clips: the `data` section, opening its sources, everything the trainer asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from moezoo import fields
from moezoo.data import pipeline
from moezoo.data.source import ArraySource, Batch, First, Source
from moezoo.domains.audio.data import augment, clips, tfds_commands
from moezoo.domains.audio.data.clips import ClipForm, Listing
from moezoo.domains.audio.data.fbank import RATES
from moezoo.domains.audio.data.published import PUBLISHED
from moezoo.domains.audio.data.read import read
from moezoo.domains.audio.data.sounds.example import NAMES
from moezoo.domains.audio.tasks import TASKS
from moezoo.errors import UserError, unknown
from moezoo.fields import ExampleCount, FilePath, Range, Seed, Whole
from moezoo.models.shared.config import traits
from moezoo.train.domain import Classes, Domain, Pretrained
from moezoo.train.schema import Config

SOUNDS = "sounds"
SPLITS = ("train", "valid", "test")
LOWEST_RATE = 4_000


@dataclass(frozen=True)
class AudioDataConfig:
    """Which sounds, what becomes of them, and how training examples are varied."""

    name: str = SOUNDS
    """sounds: synthesised events; esc50, urbansound8k, speech_commands, fluent_speech_commands: the
    folders from their archives; speech_commands_tfds: prepared by tensorflow-datasets."""
    frames: Annotated[int, Range(1, 100_000)] = 98
    """Frames of 10 ms that a clip is cut or padded to."""
    mel: Annotated[int, Range(1, 1024)] = 64
    """Mel bands per frame."""
    rate: Annotated[int, Range(LOWEST_RATE, RATES[1])] = 16_000
    """Samples per second; files with other rates are resampled."""
    train: ExampleCount = 2000
    """Number of training clips of `sounds`; published data sets provide all they have."""
    valid: ExampleCount = 400
    """Number of validation clips, likewise."""
    test: ExampleCount = 400
    """Number of test clips, likewise."""
    seed: Seed = 0
    """Seed for `sounds`."""
    only: tuple[str, ...] = ()
    """Events of `sounds` to use; default: all."""
    fold: Annotated[int, Range(1, 10)] = 1
    """Test fold of esc50 (5) and urbansound8k (10), from 1; the next fold validates."""
    data_dir: FilePath | None = None
    """Where data sets and features are kept; default: $MOEZOO_DATA, else ~/.cache/moezoo."""
    archive: FilePath | None = None
    """Folder of the unpacked published data set, by default in data_dir."""
    augment: tuple[str, ...] = ()
    """Variations of training examples, applied in this order: freq_mask, time_mask, noise, roll."""
    freq_mask: Whole = 24
    """Maximum number of bands that freq_mask hides."""
    time_mask: Whole = 80
    """Maximum number of frames that time_mask hides."""
    score: Literal["test", "valid"] = "test"
    """Split for the final scores; evaluations during training always use the validation split."""

    @property
    def domain(self) -> Audio:
        """The domain that runs on clips use."""
        return Audio(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The data sets of clips."""
        return (SOUNDS, *PUBLISHED, tfds_commands.NAME)

    @property
    def form(self) -> ClipForm:
        """The form that a clip is brought into."""
        return ClipForm(self.frames, self.mel, self.rate)

    @property
    def strength(self) -> augment.Strength:
        """How strongly examples are varied."""
        return augment.Strength(self.freq_mask, self.time_mask)


def check(config: AudioDataConfig) -> None:
    """Raise UserError if a field has no meaning."""
    fields.check(config, "data")
    if config.name not in config.names():
        raise unknown("data set", config.name, list(config.names()))
    augment.sequence(config.augment, config.strength)
    if config.archive is not None and config.name == SOUNDS:
        raise UserError("data.archive is given, but sounds are synthesised, not read.")
    _check_selection(config)


def _check_selection(config: AudioDataConfig) -> None:
    folds = PUBLISHED[config.name].folds if config.name in PUBLISHED else 0
    if folds and not 1 <= config.fold <= folds:
        raise UserError(f"data.fold is {config.fold}; {config.name} has folds 1 to {folds}.")
    if config.only and config.name != SOUNDS:
        raise UserError(f"data.only chooses events of sounds, but data.name is {config.name}.")
    for event in config.only:
        if event not in NAMES["event"]:
            raise unknown("entry of data.only", event, list(NAMES["event"]))
    if len(set(config.only)) < len(config.only):
        raise UserError("data.only names an event twice; name every event once.")


def names_of(config: AudioDataConfig) -> dict[str, tuple[str, ...]]:
    """The classes of every task of the configured data set, in the order of their numbers."""
    if config.name == SOUNDS:
        return NAMES | {"event": config.only or NAMES["event"]}
    if config.name in PUBLISHED:
        return dict(PUBLISHED[config.name].names)
    return dict(tfds_commands.NAMES)


def open_audio(config: AudioDataConfig, split: str) -> ArraySource:
    """The `train`, `valid` or `test` split, made first if needed.

    Raises UserError for unknown names, data that cannot be obtained, and directories that cannot be
    used.
    """
    from moezoo.data import store  # tensorflow-datasets costs a quarter of a second
    from moezoo.domains.audio.data.cache import open_listing

    check(config)
    if split not in SPLITS:
        raise unknown("split", split, list(SPLITS))
    data_dir = store.directory(config.data_dir)
    if config.name == SOUNDS:
        return store.renewed(
            lambda: open_listing(_sounds(config, split, data_dir), config.form, data_dir), SOUNDS
        )
    if config.name in PUBLISHED:
        listing = _published(config, split, data_dir)
    else:
        listing = tfds_commands.find(split, config.rate, _archive(config), data_dir)
    return open_listing(listing, config.form, data_dir)


def form_of(config: AudioDataConfig) -> ArraySource:
    """One silent clip in the form of the configured data set; needs no archive."""
    check(config)
    return clips.blank(config.name, config.form, names_of(config))


def _archive(config: AudioDataConfig) -> Path | None:
    return Path(config.archive).expanduser() if config.archive else None


def _sounds(config: AudioDataConfig, split: str, data_dir: Path) -> Listing:
    from moezoo.domains.audio.data.sounds import store

    names = names_of(config)
    sounds = store.SoundsConfig(
        config.train, config.valid, config.test, config.seed, names["event"]
    )
    folder = store.prepare(sounds, data_dir)
    rows = store.rows(folder, split, getattr(config, split))
    return Listing(
        SOUNDS,
        split,
        [folder / split / row["file"] for row in rows],
        {task: [row[task] for row in rows] for task in names},
        names,
        partial(store.load, rate=config.rate),
        folder.name,
    )


def _published(config: AudioDataConfig, split: str, data_dir: Path) -> Listing:
    data = PUBLISHED[config.name]
    root = data.root(_archive(config), data_dir)
    found = data.split(root, split, config.fold)
    load = partial(read, rate=config.rate, mono=data.mono, frames=config.frames)
    mark = _state_of(root, found.paths)
    return Listing(data.name, split, found.paths, found.labels, data.names, load, mark)


def _state_of(root: Path, paths: list[Path]) -> str:
    """A mark derived from the files' names, sizes and times."""
    digest = hashlib.sha256(str(root.resolve()).encode())
    for path in paths:
        about = path.stat()
        digest.update(f"{path.relative_to(root)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Audio(Domain[AudioDataConfig]):
    """Clips: `audio` float32 [B, T, F], `frames` int32 [B], and labels uint8 [B] by task."""

    name, unit, validated = "audio", "clips", True
    tasks = TASKS
    pictures = MappingProxyType(
        {
            "predictions.png": "predictions beside truth",
            "confusion.png": "which class was taken for which",
            "usage.png": "expert usage by task",
            "slots.png": "where slots look in the first clip, and where their outputs go",
        }
    )

    @property
    def pretrained(self) -> Pretrained:
        """Audio Spectrogram Transformers."""
        from moezoo.domains.audio.pretrained import Spectrograms

        return Spectrograms()

    def check(self, config: Config) -> None:
        """Raise UserError if a field has no meaning, or clips do not fit the model."""
        check(self.data)
        # Checked here, before anything is synthesised in vain.
        traits(config.model).check_size(self.size(config))
        known = names_of(self.data)
        for task in config.tasks:
            if task in TASKS and task not in known:
                raise UserError(
                    f"{self.data.name} has no labels for task {task}: take --tasks from "
                    f"{', '.join(known)}."
                )

    def open(self, config: Config, split: str) -> Source:
        """A split; the trainer's `test` is the split that `score` names."""
        return open_audio(self.data, self.data.score if split == "test" else split)

    def classes(self, config: Config, source: Source) -> Classes:
        """The classes of its tasks."""
        found = Classes.of(source.info)
        return Classes(found.counts, found.names)

    def size(self, config: Config) -> tuple[int, int]:
        """Frames and mel bands."""
        return self.data.frames, self.data.mel

    def example(self, config: Config) -> tuple[Batch, Classes]:
        """One silent clip in the configured form."""
        source = form_of(self.data)
        made = self._training(source, 1, 0, config.tasks).batch(0)
        return made, self.classes(config, source)

    def training(
        self,
        config: Config,
        source: Source,
        tasks: Sequence[str],
        start: int,
        rows: Sequence[int],
    ) -> Iterator[tuple[int, Batch]]:
        """(step, this process's rows of the batch), varied as configured."""
        made = self._training(source, config.train.batch, config.seed, tasks)
        return made.batches(start, config.train.steps, rows)

    def _training(
        self, source: Source, size: int, seed: int, tasks: Sequence[str]
    ) -> pipeline.Training:
        strength = self.data.strength
        return pipeline.Training(
            source,
            size,
            seed,
            tasks,
            self.data.augment,
            lambda names, _: augment.sequence(names, strength),
            clips.collate,
        )

    def evaluation(
        self, source: Source, count: int, size: int, names: Sequence[str], rows: Sequence[int]
    ) -> Iterator[Batch]:
        """The first `count` clips once, as they are."""
        return pipeline.evaluation(First(source, count), size, names, rows, clips.collate)

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for the clips; it is told where they end."""
        return model(batch["audio"], frames_B=batch["frames"], **options)

    def describe(self, config: Config) -> str:
        """The form of a clip."""
        return f"of {self.data.frames} frames and {self.data.mel} mel bands"

    def inference(self, run: Any, classes: Classes) -> Any:
        """Recordings in, every task's prediction out."""
        from moezoo.deploy.inference import ArrayInference

        return ArrayInference(self.exports(run.config), run, classes)

    def exports(self, config: Config) -> Any:
        """Every task as a path from a clip."""
        from moezoo.domains.audio.export import ClipExports

        return ClipExports(config)

    def draw(self, finished: Any, folder: Path, count: int) -> None:
        """Spectrograms with predictions, confusions, usage and slots."""
        from moezoo.domains.audio import report  # matplotlib costs a third of a second

        report.draw(finished, folder, count)
