"""Runs on sounds: features of clips with a class per task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moezoo.data import pipeline
from moezoo.data.source import First, Source
from moezoo.domains.audio.data import augment, clips
from moezoo.domains.audio.data import config as audio_config
from moezoo.domains.audio.data.config import AudioDataConfig
from moezoo.errors import UserError
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.tasks.base import Task
from moezoo.tasks.registry import SOUND
from moezoo.train.domain import Batch, Classes, check_tasks_of, class_names_of, classes_of
from moezoo.train.schema import Config


class Audio:
    """Clips: `audio` float32 [B, T, F], `frames` int32 [B], and labels uint8 [B] by task."""

    unit, kind, validated = "clips", "sounds", True

    def check(self, config: Config) -> None:
        data, model = _sound(config), config.model
        audio_config.check(data)
        if isinstance(model, SoftMoAConfig):  # before anything is synthesised in vain
            model.check_clips(self.size(config))
        known = audio_config.names_of(data)
        for task in config.tasks:
            if task in SOUND and task not in known:
                raise UserError(
                    f"{data.name} has no labels for task {task}: take --tasks from "
                    f"{', '.join(known)}."
                )

    def open(self, config: Config, split: str) -> Source:
        data = _sound(config)
        return audio_config.open_audio(data, data.score if split == "test" else split)

    def classes(self, source: Source) -> Classes:
        return Classes(classes_of(source), class_names_of(source))

    def size(self, config: Config) -> tuple[int, int]:
        return _sound(config).frames, _sound(config).mel

    def example(self, config: Config) -> tuple[Batch, Classes]:
        data = _sound(config)
        source = audio_config.form_of(data)
        made = _training(source, 1, 0, config.tasks, data).batch(0)
        return made, self.classes(source)

    def training(
        self, config: Config, source: Source, tasks: Sequence[str], start: int, rows: range
    ) -> Iterator[tuple[int, Batch]]:
        made = _training(source, config.train.batch, config.seed, tasks, _sound(config))
        return made.batches(start, config.train.steps, rows)

    def evaluation(
        self, source: Source, count: int, size: int, names: Sequence[str], rows: range
    ) -> Iterator[Batch]:
        return pipeline.evaluation(First(source, count), size, names, rows, clips.collate)

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        return model(batch["audio"], frames_B=batch["frames"], **options)

    def check_labels(self, tasks: Sequence[Task], source: Source) -> None:
        """UserError for a task that the data set has no labels for."""
        check_tasks_of(tasks, source)

    def describe(self, config: Config) -> str:
        data = _sound(config)
        return f"of {data.frames} frames and {data.mel} mel bands"


def _training(
    source: Source, size: int, seed: int, tasks: Sequence[str], data: AudioDataConfig
) -> pipeline.Training:
    return pipeline.Training(
        source,
        size,
        seed,
        tasks,
        data.augment,
        lambda names, _: augment.sequence(names, data.strength),
        clips.collate,
    )


def _sound(config: Config) -> AudioDataConfig:
    assert isinstance(config.data, AudioDataConfig)
    return config.data
