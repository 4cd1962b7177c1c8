"""Damaged files of sounds and text: read right, or refused with one sentence.

The full numbers: pytest -m fuzz -s tests/robustness/test_sounds_and_text.py
"""

from __future__ import annotations

import io
import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from moezoo.deploy.runtime.forms import ExportError
from moezoo.domains.audio import runtime as sound
from moezoo.domains.audio.data import cache, clips, fbank
from moezoo.domains.audio.data.decode import LOUDEST
from moezoo.domains.audio.data.published import PUBLISHED, in_folds, table
from moezoo.domains.audio.data.read import read
from moezoo.domains.text.data.encode import encode, ends
from moezoo.domains.text.data.example import chatml, plain
from moezoo.domains.text.data.jsonl import InstructionFile
from moezoo.domains.text.data.tokenizer import ByteTokenizer, HFTokenizer
from moezoo.errors import UserError
from tests.domains.audio.data.waves import chunk, tone, wav_bytes
from tests.domains.text.data.samples import chat_folder
from tests.robustness import fuzz

FRAMES, RATE = 20, 8_000
STEPS = [{"step": "mono", "how": "average"}, {"step": "resample", "rate": RATE}]
STEPS += [{"step": "pad", "frames": FRAMES}]
ESC50 = PUBLISHED["esc50"]


def _written(kind: str, subtype: str | None = None) -> bytes:
    stereo = np.stack([tone(0.4), tone(0.4, 700)], 1)
    soundfile.write(made := io.BytesIO(), stereo, 16_000, subtype, format=kind)
    return made.getvalue()


def _npz() -> bytes:
    np.savez(made := io.BytesIO(), audio=tone().astype(np.float32))
    return made.getvalue()


@pytest.fixture(scope="module")
def sounds() -> dict[str, bytes]:
    """Sound files of every kind, and one that is none."""
    steps = np.round(tone() * 2**15).astype("<i2").tobytes()
    note = chunk(b"LIST", b"INFOISFT\x05\0\0\0x.y.z")
    subtypes = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")
    return {
        **{f"WAV {name}": _written("WAV", name) for name in subtypes},
        "WAV with notes": wav_bytes(steps, before=note, after=note),
        "WAV stream": wav_bytes(steps, told=0xFFFFFFFF, size=0xFFFFFFFF),
        "WAV of 64 bits": wav_bytes((steps[:6400] * 4)[:6400], bits=64),
        "WAV extensible": wav_bytes(steps, code=0xFFFE, subformat=1),
        **{kind: _written(kind) for kind in ("WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF", "CAF")},
        "npz": _npz(),
    }


def _header(chance: random.Random, data: bytes) -> tuple[str, bytes]:
    """One number of the header is another."""
    at, width = chance.randrange(4, 60), chance.choice((1, 2, 4))
    value = chance.choice((0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 268_435_399))
    stored = struct.pack("<I", value)[:width]
    return f"{value} at {at}", data[:at] + stored + data[at + width :]


@fuzz.counts(ci=10, full=200)
def test_sounds(
    count: int, sounds: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.wav"

    def case(chance: random.Random) -> fuzz.Case:
        kind = chance.choice(sorted(sounds))
        damage = chance.choice((_header, fuzz.mutate_bytes))
        name, content = damage(chance, sounds[kind])

        def attempt() -> None:
            path.write_bytes(content)
            with monkeypatch.context() as without:
                without.setitem(sys.modules, "soundfile", None)
                alone = _exported(path)
            wave = read(path, RATE, frames=FRAMES)
            assert fbank.window_of(RATE) <= len(wave) <= fbank.samples_of(FRAMES, RATE)
            assert wave.dtype == np.float32 and np.abs(wave).max() <= 2 * LOUDEST
            assert np.array_equal(wave, _exported(path)), "the export hears another sound"
            assert alone is None or np.array_equal(wave, alone), "without soundfile it is another"

        return f"{kind}, {name}", attempt

    fuzz.run("sounds", case, count)


def _exported(path: Path) -> np.ndarray | None:
    try:
        return sound.read(path, STEPS)
    except ExportError as error:
        assert "\n" not in str(error)
        return None


EXAMPLES: list[dict[str, Any]] = [
    {"instruction": "Say é", "input": "now", "output": "é", "task": "b", "other": [1, {"x": None}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"inputs": "Question", "targets": "Answer", "task": "b"},
]


@fuzz.counts(ci=10, full=200)
def test_instruction_files(count: int, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"

    def case(chance: random.Random) -> fuzz.Case:
        lines = [json.dumps(example, ensure_ascii=False).encode() for example in EXAMPLES]
        place = chance.randrange(len(lines))
        if chance.random() < 0.5:
            name, value = fuzz.mutate_json(chance, EXAMPLES[place])
            lines[place] = json.dumps(value).encode()
            content = b"\n".join(lines)
        else:
            name, content = fuzz.mutate_bytes(chance, b"\n".join(lines))

        def attempt() -> None:
            path.write_bytes(content)
            file = InstructionFile(path)
            assert 1 <= len(file) <= content.count(b"\n") + 1
            assert len(file.task_N) == len(file) and set(file.task_N) <= set(range(len(file.tasks)))
            for index in range(len(file)):
                document = encode(plain(file[index].turns), ByteTokenizer(), 10**6)
                assert document is not None and document.answer[-1]
                assert file[index].task == file.tasks[file.task_N[index]]

        return f"line {place + 1}, {name}", attempt

    fuzz.run("instruction files", case, count)


@fuzz.counts(ci=5, full=100)
def test_tables(count: int, tmp_path: Path) -> None:
    path = tmp_path / "esc50.csv"
    rows = [f"1-{n}-A-0.wav,{n % 5 + 1},0,dog,False,{n},A" for n in range(8)]
    whole = "\n".join(["filename,fold,target,category,esc10,src_file,take", *rows]).encode()

    def case(chance: random.Random) -> fuzz.Case:
        name, content = fuzz.mutate_bytes(chance, whole)

        def attempt() -> None:
            path.write_bytes(content)
            found = table(ESC50, path, ("filename", "fold", "category"))
            assert 1 <= len(found) <= content.count(b"\n") + content.count(b"\r")
            assert all(set(row) == {"filename", "fold", "category"} for row in found)
            assert len(in_folds(ESC50, path, found, "test", 1)) <= len(found)

        return name, attempt

    fuzz.run("tables", case, count)


@fuzz.counts(ci=10, full=200)
def test_tokenizers(count: int, tmp_path: Path) -> None:
    chat_folder(tmp_path)
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    (tmp_path / names[2]).write_text('{"eos_token": {"content": "<|im_end|>", "lstrip": false}}')
    whole = {name: (tmp_path / name).read_bytes() for name in names}

    def case(chance: random.Random) -> fuzz.Case:
        file = chance.choice(names)
        if chance.random() < 0.6:
            name, value = fuzz.mutate_json(chance, json.loads(whole[file]))
            content = json.dumps(value).encode()
        else:
            name, content = fuzz.mutate_bytes(chance, whole[file])

        def attempt() -> None:
            for other in names:
                (tmp_path / other).write_bytes(content if other == file else whole[other])
            tokenizer = HFTokenizer(tmp_path)
            ids = tokenizer.encode("A text, <|im_end|> and é\n 東京.")
            assert all(0 <= i < tokenizer.vocabulary for i in ids)
            assert isinstance(tokenizer.decode([*ids, tokenizer.eos]), str)
            marks = (tokenizer.eos, tokenizer.pad, tokenizer.bos or 0)
            assert all(0 <= i < tokenizer.vocabulary for i in marks)
            assert tokenizer.mark("<|im_end|>") in ends(chatml, tokenizer)

        return f"{file}, {name}", attempt

    fuzz.run("tokenizers", case, count)


@fuzz.counts(ci=5, full=75)
def test_cached_features(count: int, tmp_path: Path) -> None:
    """What is damaged is made again, so that nothing but the right features is ever read."""
    listing = clips.Listing(
        *("toy", "train", range(3), {"event": ["a", "b", "a"]}, {"event": ("a", "b")}),
        *(lambda index: tone(0.1, 300.0 + 100 * index, RATE).astype(np.float32), "mark"),
    )
    form = clips.ClipForm(8, 6, RATE)
    right = np.array(cache.open_listing(listing, form, tmp_path).arrays["audio"])
    whole = {p: p.read_bytes() for p in (tmp_path / "audio_features").rglob("*") if p.is_file()}
    files = sorted(path for path in whole if path.name != ".lock")

    def case(chance: random.Random) -> fuzz.Case:
        file = chance.choice(files)
        name, content = fuzz.mutate_bytes(chance, whole[file])

        def attempt() -> None:
            file.write_bytes(content)
            found = cache.open_listing(listing, form, tmp_path)
            assert np.array_equal(found.arrays["audio"], right)
            assert found.arrays["frames"].tolist() == [8, 8, 8]

        return f"{file.name}, {name}", attempt

    outcomes = fuzz.run("cached features", case, count, refusals=(UserError,))
    assert set(outcomes) == {"accepted"}
