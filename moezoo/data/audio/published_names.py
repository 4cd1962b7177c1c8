"""The classes of the published sound data sets, in the order of their numbers."""

from __future__ import annotations

SEPARATOR = " / "  # between the slots of an intent

ESC50 = (
    *("dog", "rooster", "pig", "cow", "frog", "cat", "hen", "insects", "sheep", "crow"),
    *("rain", "sea waves", "crackling fire", "crickets", "chirping birds", "water drops", "wind"),
    *("pouring water", "toilet flush", "thunderstorm", "crying baby", "sneezing", "clapping"),
    *("breathing", "coughing", "footsteps", "laughing", "brushing teeth", "snoring"),
    *("drinking sipping", "door wood knock", "mouse click", "keyboard typing"),
    *("door wood creaks", "can opening", "washing machine", "vacuum cleaner", "clock alarm"),
    *("clock tick", "glass breaking", "helicopter", "chainsaw", "siren", "car horn", "engine"),
    *("train", "church bells", "airplane", "fireworks", "hand saw"),
)
URBANSOUND8K = (
    *("air conditioner", "car horn", "children playing", "dog bark", "drilling"),
    *("engine idling", "gun shot", "jackhammer", "siren", "street music"),
)
SPEECH_COMMANDS = (
    *("backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward"),
    *("four", "go", "happy", "house", "learn", "left", "marvin", "nine", "no", "off", "on"),
    *("one", "right", "seven", "sheila", "six", "stop", "three", "tree", "two", "up", "visual"),
    *("wow", "yes", "zero"),
)
TFDS_SPEECH_COMMANDS = (
    *("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes"),
    *("_silence_", "_unknown_"),
)
_ROOMS = ("bedroom", "kitchen", "none", "washroom")
_INTENTS = (
    *(("activate", "lamp", "none"), *(("activate", "lights", room) for room in _ROOMS)),
    ("activate", "music", "none"),
    *(("bring", thing, "none") for thing in ("juice", "newspaper", "shoes", "socks")),
    *(
        ("change language", language, "none")
        for language in ("Chinese", "English", "German", "Korean", "none")
    ),
    *(("deactivate", "lamp", "none"), *(("deactivate", "lights", room) for room in _ROOMS)),
    ("deactivate", "music", "none"),
    *(*(("decrease", "heat", room) for room in _ROOMS), ("decrease", "volume", "none")),
    *(*(("increase", "heat", room) for room in _ROOMS), ("increase", "volume", "none")),
)
FLUENT: dict[str, tuple[str, ...]] = {
    "intent": tuple(SEPARATOR.join(slots) for slots in _INTENTS),
    "action": tuple(sorted({slots[0] for slots in _INTENTS})),
    "object": tuple(sorted({slots[1] for slots in _INTENTS})),
    "location": tuple(sorted({slots[2] for slots in _INTENTS})),
}
