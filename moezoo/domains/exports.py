"""Who answers for the exports of a run; stands here until `config.data.domain` does."""

from __future__ import annotations

from typing import Any

from moezoo.domains.audio.data.config import AudioDataConfig
from moezoo.domains.audio.export import ClipExports
from moezoo.domains.images import training as domains
from moezoo.domains.images.export import PhotoExports
from moezoo.domains.pairs.domain import Pairs
from moezoo.domains.pairs.export import ImageChoiceExports
from moezoo.train.config import Config


def exports(config: Config) -> Any:
    domain, data = domains.of(config), config.data
    if isinstance(data, AudioDataConfig):
        return ClipExports(config, data)
    if isinstance(domain, Pairs):
        return ImageChoiceExports(config, domain.data.images, domain.reading)
    return PhotoExports(config, domains.images_of(config))
