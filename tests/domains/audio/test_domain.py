"""Fields of the `data` section that have no meaning."""

from __future__ import annotations

import pytest

from moezoo.domains.audio.domain import AudioDataConfig, check, form_of, open_audio
from moezoo.errors import UserError


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "esc"}, "did you mean esc50"),
        ({"rate": 0}, "data.rate is 0"),
        ({"frames": 0}, "data.frames is 0"),
        ({"mel": -1}, "data.mel is -1"),
        ({"valid": 0}, "data.valid is 0"),
        ({"time_mask": -1}, "data.time_mask is -1"),
        ({"augment": ("role",)}, "did you mean roll"),
        ({"archive": "x"}, "sounds are synthesised"),
        ({"name": "esc50", "fold": 6}, "esc50 has folds 1 to 5"),
        ({"name": "urbansound8k", "fold": 0}, "data.fold is 0; it must be at least 1"),
        ({"name": "esc50", "only": ("bell",)}, "data.only chooses events of sounds"),
        ({"only": ("bel",)}, "did you mean bell"),
        ({"only": ("bell", "bell")}, "names an event twice"),
    ],
)
def test_wrong_fields(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(AudioDataConfig(**changes))


def test_an_unknown_split() -> None:
    with pytest.raises(UserError, match="did you mean valid"):
        open_audio(AudioDataConfig(), "vali")


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("sounds", {"event": 24, "register": 3, "room": 3}),
        ("esc50", {"event": 50}),
        ("urbansound8k", {"event": 10}),
        ("speech_commands", {"word": 35}),
        ("speech_commands_tfds", {"word": 12}),
        ("fluent_speech_commands", {"intent": 31, "action": 6, "object": 14, "location": 4}),
    ],
)
def test_the_form_needs_no_archive(name: str, classes: dict[str, int]) -> None:
    source = form_of(AudioDataConfig(name=name, frames=7, mel=5))
    assert {t: labels.classes for t, labels in source.info.labels.items()} == classes
    assert source[0]["audio"].shape == (7, 5) and source[0][next(iter(classes))] == 255
