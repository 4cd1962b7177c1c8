"""What becomes a member of a library: which runs and folders are taken, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.text import library as collecting
from moezoo.domains.text.data.example import chatml, plain
from moezoo.domains.text.data.tokenizer import ByteTokenizer, identity
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.library import (
    BaseDecoder,
    asked_with,
    bare,
    base_of,
    check_library_base,
    copied,
    member_of_peft,
    member_of_run,
    members_of,
    open_base,
    prompt_tokens,
    text_lines,
)
from moezoo.errors import UserError
from moezoo.models.phatgoose.model import PhatgooseConfig
from moezoo.models.smora.model import SMoRAConfig
from moezoo.nn import surgery
from moezoo.nn.injection import Adapted
from moezoo.weights import peft
from moezoo.weights.library import Library, create
from moezoo.weights.library_bank import attach_merged
from tests.weights.libraries import decoder, member, sha

TINY = DecoderConfig(
    vocabulary=259, width=8, depth=1, heads=2, groups=1, hidden=6, length=64
)  # fmt: skip
TARGETS = ("layers/*/attn/q",)
CORPUS = TextDataConfig(name="corpus")
RUN = Path("runs/some")


class Bytes2(ByteTokenizer):
    """Other bytes."""

    def encode(self, text: str) -> list[int]:
        return [255 - byte for byte in super().encode(text)]


def trained(config: Any, gates: float = 1.0) -> Any:
    """A model whose updates have been trained, as far as numbers show it."""
    model, rng = config.build({"lm": 259}, (1, 1), nnx.Rngs(0)), np.random.default_rng(0)
    for layer in surgery.find(model, Adapted).values():
        shape = layer.update.up.get_value().shape
        layer.update.up.set_value(jnp.asarray(rng.normal(size=shape), jnp.float32))
        if layer.router is not None:
            layer.router.kernel.set_value(gates * jnp.ones_like(layer.router.kernel.get_value()))
    return model


def base_of_model(model: Any, **told: Any) -> BaseDecoder:
    below = copied(model)
    bare(below)
    base = BaseDecoder("tiny", below, ByteTokenizer(), plain, sha(below))
    return base._replace(**told)


def taken(monkeypatch: Any, config: Any, data: TextDataConfig = CORPUS, **options: Any) -> Any:
    """`member_of_run` of a run of that configuration and data; base: what is told of the base."""
    told = options.pop("base", {})
    model = options.pop("model", None) or trained(config, **options)
    loaded = SimpleNamespace(model=model, config=SimpleNamespace(model=config))
    monkeypatch.setattr(collecting, "language_run", lambda run: (loaded, data))
    monkeypatch.setattr(collecting, "tasks_of", lambda data: ("t",))
    monkeypatch.setattr(collecting, "prompts_of", lambda data: [])
    return member_of_run(RUN, base_of_model(model, **told))


LORA = SMoRAConfig(decoder=TINY, update="lora", ranks=2, targets=TARGETS)
GATED = PhatgooseConfig(decoder=TINY, rank=2, targets=TARGETS)


def test_plain_ones_and_gates_of_libraries_are_taken(monkeypatch: Any) -> None:
    assert taken(monkeypatch, LORA).gates is None
    gates = taken(monkeypatch, GATED).gates
    np.testing.assert_array_equal(gates["layers/0/attn/q"], np.ones(8))


@pytest.mark.parametrize(
    "config",
    [
        # One block works for all tokens: a single LoRA, but its router is no gate of a library.
        SMoRAConfig(decoder=TINY, ranks=2, active=2, block=2, gate="score", targets=TARGETS),
        SMoRAConfig(decoder=TINY, update="mixture", ranks=4, loras=2, top_k=1, targets=TARGETS),
    ],
)
def test_other_routers_are_refused_by_name(monkeypatch: Any, config: Any) -> None:
    with pytest.raises(UserError, match=r"routers \(SMoRA, LoRA.*\), which are no single LoRA"):
        taken(monkeypatch, config)


def test_what_was_never_trained_is_refused(monkeypatch: Any, tmp_path: Path) -> None:
    fresh = LORA.build({"lm": 259}, (1, 1), nnx.Rngs(0))
    with pytest.raises(UserError, match="update in runs/some is 0 everywhere"):
        taken(monkeypatch, LORA, model=fresh)
    with pytest.raises(UserError, match="gates in runs/some are 0 everywhere"):
        taken(monkeypatch, GATED, gates=0.0)
    peft.save(tmp_path / "fresh", fresh)
    with pytest.raises(UserError, match="fresh is 0 everywhere"):
        member_of_peft(tmp_path / "fresh", base_of_model(fresh), (), None)
    model = trained(LORA)
    peft.save(tmp_path / "off", model)
    path = tmp_path / "off" / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 0}))
    with pytest.raises(UserError, match="off is 0 everywhere"):
        member_of_peft(tmp_path / "off", base_of_model(model), (), None)


def test_another_template_or_tokenizer_is_refused(monkeypatch: Any) -> None:
    asked = TextDataConfig(template="chatml")
    with pytest.raises(UserError, match="trained with template chatml, but tiny .* with plain"):
        taken(monkeypatch, LORA, asked)
    # What is only assumed is no reason, nor is the template of continuous text.
    assert taken(monkeypatch, LORA, asked, base={"assumed": True})
    assert taken(monkeypatch, LORA, asked, base={"template": chatml})
    assert taken(monkeypatch, LORA, CORPUS, base={"template": chatml})
    with pytest.raises(UserError, match="another tokenizer than that of tiny"):
        taken(monkeypatch, LORA, base={"tokenizer": Bytes2()})


def test_a_manifest_says_how_its_base_is_asked(folder: Path, tmp_path: Path) -> None:
    base = open_base(folder)
    assert base.assumed and base.told.template is None
    asked = asked_with(base, "plain")
    assert asked.told.template == "plain" and asked_with(asked, "chatml") is asked
    assert set(base.stop) <= set(asked.stop)  # the folder's own and the template's
    held = create(tmp_path / "lib", asked.told, [member("x", 1), member("y", 2)])
    assert Library(held.folder).base == asked.told
    check_library_base(held, asked)
    with pytest.raises(
        UserError, match=r"plain, but tiny is asked with the prompt as it is.*--template"
    ):
        check_library_base(held, base)
    with pytest.raises(UserError, match="another tokenizer than that of tiny"):
        check_library_base(held, asked._replace(tokenizer=Bytes2()))
    with pytest.raises(UserError, match="Unknown template"):
        asked_with(base, "alpaca")


def test_a_base_without_a_template_takes_that_of_the_first_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datas = {"a": CORPUS, "b": TextDataConfig(), "c": TextDataConfig(template="chatml")}
    monkeypatch.setattr(collecting, "language_data", lambda run: datas[run.name])
    runs = [Path(name) for name in datas]
    assert base_of(runs, folder).template is plain
    assert base_of(runs[2:], folder, "plain").told.template == "plain"
    assert base_of(runs[:1], folder).assumed


def test_tokenizers_are_told_apart_by_what_they_do(base: BaseDecoder) -> None:
    found = {identity(t) for t in (ByteTokenizer(), Bytes2(), base.tokenizer)}
    assert len(found) == 3 and identity(ByteTokenizer()) in found


def test_a_base_is_called_by_its_folder_wherever_one_stands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = create(tmp_path / "donor", open_base(folder).told, [member("x", 1)])
    model = decoder()
    attach_merged(model, donor, {"x": 1.0})
    peft.save(tmp_path / "named", model, f"/somewhere/{folder.name}")
    peft.save(tmp_path / "here", model, ".")
    monkeypatch.chdir(folder)
    base = open_base(Path("."))
    assert base.name == folder.name == open_base(Path("../tiny")).name
    for path in ("named", "here"):  # "." names no base
        found = member_of_peft(tmp_path / path, base, (), None)
        assert found.member.source == path
    monkeypatch.chdir(tmp_path / "here")
    assert members_of([Path(".")], base)[0].member.source == "here"


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    file = tmp_path / "all.txt"
    file.write_bytes("\ufeffzero\r\none \u2028tail\x0cand\x85more\n\n  \ntwo\r".encode())
    assert text_lines(file, "document") == ["zero", "one \u2028tail\x0cand\x85more", "two"]
    file.write_bytes("\ufeff\n\r\n".encode())
    with pytest.raises(UserError, match="has no document"):
        text_lines(file, "document")


def test_prompts_that_are_no_text_are_refused(base: BaseDecoder) -> None:
    for odd, said in (("\udcff", "no text in UTF-8"), ("", "is empty")):
        with pytest.raises(UserError, match=said):
            prompt_tokens(base, odd)
