"""Damaged and forged export folders are read rightly, or refused with one sentence.

Four real folders, made once: of images, of images with a page and weights of 8 bits, of clips, of
encoders. A case changes one place of the
manifest, of a JSON file, or of the bytes of any file; in most of them the checksums are written
anew, as an attacker does. What is accepted still gives finite outputs of the shapes that it says,
and those of an untouched program and untouched weights are the ones stored before.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import certificate, export, page, proof, rounded
from moezoo.deploy.export import Content
from moezoo.deploy.manifest import Facts
from moezoo.deploy.runtime import folder as files
from moezoo.deploy.runtime import load, programs, verify
from moezoo.deploy.runtime.load import ExportError
from moezoo.deploy.task_path import task_path
from moezoo.domains.audio.export import ClipClassifier
from moezoo.domains.images.export import photos
from moezoo.domains.pairs import runtime as encode
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module
from tests.domains.audio import test_export
from tests.domains.pairs import test_encoders
from tests.domains.pairs.test_run import config as pairs
from tests.domains.pairs.test_tools import saved
from tests.models.tiny import filled
from tests.robustness import fuzz
from tests.tasks.tables import build

KINDS = ("images", "rounded", "clips", "encoders")
SIZE, CLASSES = (8, 8), 3
STEPS = ("manifest", "manifest", "manifest", "model.safetensors", "golden.safetensors", "program")
STEPS += ("any file", "header", "missing")


def images(folder: Path) -> Path:
    return scenes(folder, "float32")


def rounded_images(folder: Path) -> Path:
    def with_page(place: Path) -> dict[str, Any]:
        page.write(place / "index.html", "scenes", "A page.", [])
        return {}

    return scenes(folder, "int8", with_page)


def scenes(
    folder: Path, weights: str, more: Callable[[Path], dict[str, Any]] = lambda place: {}
) -> Path:
    config = ViTDenseConfig(width=8, depth=1, heads=2, patch=4, head_channels=4)
    made = module.merge(*filled(lambda: config.build({"semseg": CLASSES}, SIZE, nnx.Rngs(0))))
    path = rounded.rounded(task_path(made, "semseg", photos(SIZE)), weights)
    given = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    about = Facts(labels=("a", "b", "c"))
    task = build("semseg", classes=CLASSES)
    content = Content(path, task, about, {}, certificate.contents(path), given)
    return export.write(folder, content, more=more)


def clips(folder: Path) -> Path:
    model = ClipClassifier(test_export.built(test_export.SMALL))
    path = task_path(model, "room", test_export.READS)
    given = test_export.clips()[0][:2]
    stated = certificate.contents(path)
    content = Content(path, test_export.ROOM, test_export.ABOUT, {}, stated, given)
    return export.write(folder, content)


def encoders(folder: Path) -> Path:
    run = saved(pairs(folder.parent))
    return test_encoders.export_encoders(run, folder, ("retrieval|input", "retrieval|target"))


MAKERS: dict[str, Callable[[Path], Path]] = {
    "images": images,
    "rounded": rounded_images,
    "clips": clips,
    "encoders": encoders,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folders")
    return {name: make(place / name) for name, make in MAKERS.items()}


def sign(folder: Path) -> None:
    """Write the checksums of files as they are now, where the manifest can still say them."""
    manifest = folder / "manifest.json"
    try:
        told = json.loads(manifest.read_bytes())
        for name in told["files"]:
            if (folder / name).is_file():
                told["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except (ValueError, TypeError, KeyError, RecursionError, OSError):
        return
    manifest.write_text(json.dumps(told))


def damage(chance: random.Random, folder: Path) -> str:
    """Change one place of a folder, and say what was done."""
    step = chance.choice(STEPS)
    if step == "manifest":
        file = folder / "manifest.json"
        if chance.random() < 0.2:
            what, data = fuzz.mutate_bytes(chance, file.read_bytes())
            file.write_bytes(data)
            return f"manifest.json: {what}"
        what, value = fuzz.mutate_json(chance, json.loads(file.read_text()))
        file.write_text(json.dumps(value))
        return f"manifest: {what}"
    found = sorted(f for f in folder.rglob("*") if f.suffix != ".py" and f.is_file())
    if step == "program":
        found = [f for f in found if f.suffix == ".stablehlo"]
    elif step in ("model.safetensors", "golden.safetensors"):
        found = [folder / step]
    file = folder / "model.safetensors" if step == "header" else chance.choice(found)
    if step == "missing":
        file.unlink()
        return f"{file.name} is missing"
    if step == "header":
        return header(chance, file)
    what, data = fuzz.mutate_bytes(chance, file.read_bytes())
    file.write_bytes(data)
    return f"{file.name}: {what}"


def header(chance: random.Random, file: Path) -> str:
    """Another header in front of the same arrays."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    what, value = fuzz.mutate_json(chance, json.loads(data[8 : 8 + length]))
    text = json.dumps(value).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"header: {what}"


def use(kind: str, folder: Path, whole: bool) -> None:
    """Load a folder and call all it has; `whole`: neither its program nor its weights changed."""
    if kind == "encoders":
        made = encode.load_encoders(folder)
        made.rank(np.full((1, 20, 30, 3), 99, np.uint8), ["a bedroom", "an office"])
    else:
        made = load.load_export(folder)
        given = [test_export.waves()[0]] if kind == "clips" else np.full((1, 9, 9, 3), 7, np.uint8)
        outputs = made(given)
        for name, about in made.manifest["outputs"].items():
            assert outputs[name].shape == (1, *about["shape"][1:]), name
            assert str(outputs[name].dtype) == about["dtype"], name
            assert np.isfinite(outputs[name]).all(), name
        made.picture(outputs["prediction"][0], SIZE)
        load.words(made.manifest, outputs["prediction"][0])
    try:
        apart = made.self_check()
    except ExportError:
        assert not whole, "the self-check of a whole folder failed"
        raise
    assert apart <= 0.5
    if kind != "encoders":
        assert "pruned" not in dict(verify.verify(folder))["layers"]


@fuzz.counts(ci=12, full=300)
def test_damaged_export_folders(count: int, folders: dict[str, Path], tmp_path: Path) -> None:
    def case(chance: random.Random) -> fuzz.Case:
        kind = chance.choice(KINDS)
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[kind], folder)
        what = damage(chance, folder)
        signed = chance.random() < 0.8
        if signed:
            sign(folder)
        same = all(
            (folder / file.name).is_file()
            and (folder / file.name).read_bytes() == file.read_bytes()
            for file in folders[kind].iterdir()
            if file.suffix in (".safetensors", ".stablehlo")
        )
        return f"{kind}, {what}, signed {signed}", lambda: use(kind, folder, whole=same)

    fuzz.run("export folders", case, count, (ExportError,))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_folders_are_accepted(kind: str, folders: dict[str, Path]) -> None:
    use(kind, folders[kind], whole=True)


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))

    return apply


def arrays(name: str, file: str = "model.safetensors") -> Callable[[Path], None]:
    """One number of a file is `name`: nan, inf or -inf."""

    def apply(folder: Path) -> None:
        found = {k: np.array(v) for k, v in load.read_tensors(folder / file).items()}
        first = next(key for key, value in sorted(found.items()) if value.dtype == np.float32)
        found[first].flat[0] = float(name)
        export.save_tensors(folder / file, found)

    return apply


def golden(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = {
            k: np.array(v) for k, v in load.read_tensors(folder / "golden.safetensors").items()
        }
        change(found)
        export.save_tensors(folder / "golden.safetensors", found)

    return apply


def other_class(found: dict[str, np.ndarray]) -> None:
    found["prediction"] = (found["prediction"] + 1) % CLASSES


def no_logits(found: dict[str, np.ndarray]) -> None:
    del found["logits"]


def many(found: dict[str, np.ndarray]) -> None:
    found["violations"] = found["violations"] + 9


ATTACKS: list[tuple[Callable[[Path], object], str]] = [
    (edit(lambda m: m.update(files={})), "files has 0 entries"),
    (edit(lambda m: m["files"].pop("model.stablehlo")), "no checksum of model.stablehlo"),
    (edit(lambda m: m["files"].update({"../x": "0" * 64})), "no file inside this folder"),
    (edit(lambda m: m["files"].update({"/etc/passwd": "0" * 64})), "no file inside this folder"),
    (edit(lambda m: m["golden"].update(cpu=1e9)), "golden.cpu is"),
    (edit(lambda m: m["golden"].update(other=float("nan"))), "golden.other is nan"),
    (edit(lambda m: m.update(schema="1")), "schema is '1'"),
    (edit(lambda m: m.update(schema=True)), "schema is True"),
    (edit(lambda m: m["inputs"]["image"].update(shape=["b", 8, 2**40, 3])), "inputs.image.shape"),
    (edit(lambda m: m["inputs"]["image"].update(shape=["b", 8, 16, 3])), "preprocess makes"),
    (edit(lambda m: m["preprocess"][0].update(height=10**9)), r"preprocess\[0\].height is"),
    (edit(lambda m: m["preprocess"][2].update(std=[0, 1, 1])), r"std\[0\] is 0"),
    (edit(lambda m: m["preprocess"].pop()), "preprocess has 2 entries"),
    (edit(lambda m: m["outputs"]["logits"].update(dtype="int32")), "does not fit its folder"),
    (edit(lambda m: m["picture"].update(colours=[[0, 0, 0]])), "colours and labels are not 3"),
    (edit(lambda m: m["task"].update(labels=["a"])), "colours and labels are not 3"),
    (edit(lambda m: m["task"].update(name=["semseg"])), "task.name is"),
    (edit(lambda m: m["versions"].update(jax="x.y")), "versions.jax is 'x.y'"),
    (edit(lambda m: m["versions"].update(calling_convention="10")), "calling_convention is '10'"),
    (lambda c: (c / "manifest.json").write_text('{"a":' * 100_000), "nested too deep"),
    (lambda c: (c / "manifest.json").write_text("[" * 10**6 + "]" * 10**6), "nested too deep"),
    (arrays("nan"), "not finite"),
    (arrays("inf"), "not finite"),
    (arrays("nan", "golden.safetensors"), "not finite"),
    (golden(other_class), "prediction is 1 off"),
    (golden(many), "violations is .* off"),
    (golden(no_logits), "has no logits"),
    (golden(lambda found: found.update(image=found["image"][:, :4])), "Images must be"),
    (golden(lambda found: found.update(logits=found["logits"][:1])), "logits is inf off"),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "words"), ATTACKS)
def test_forged_folders(
    attack: Callable[[Path], object], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Checksums fit what was changed, where the change is none of the checksums themselves."""
    folder = tmp_path / "forged"
    shutil.copytree(folders["images"], folder)
    before = json.loads((folder / "manifest.json").read_text())["files"]
    attack(folder)
    changed = [
        n for n in ("model.safetensors", "golden.safetensors") if digest(folder / n) != before[n]
    ]
    if changed:
        sign(folder)
    with pytest.raises(ExportError, match=words) as raised:
        load.load_export(folder).self_check()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def scaled(change: Callable[[dict[str, np.ndarray], str, str], None]) -> Callable[[Path], None]:
    """Change the first matrix of whole numbers and its scale, by their names."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        found = {k: np.array(v) for k, v in load.read_tensors(file).items()}
        scale = next(name for name in sorted(found) if rounded.SCALE in name)
        change(found, scale.replace(rounded.SCALE, ""), scale)
        export.save_tensors(file, found)

    return apply


def wider(found: dict[str, np.ndarray], whole: str, scale: str) -> None:
    found[scale] = np.repeat(found[scale], 2, axis=-1)


def unscaled(found: dict[str, np.ndarray], whole: str, scale: str) -> None:
    del found[scale]


def unsigned(found: dict[str, np.ndarray], whole: str, scale: str) -> None:
    found[whole] = found[whole].view(np.uint8)


def infinite(found: dict[str, np.ndarray], whole: str, scale: str) -> None:
    found[scale][:] = np.inf


def enormous(found: dict[str, np.ndarray], whole: str, scale: str) -> None:
    found[scale][:] = 3e38


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wider, "the program has float32"),
        (unscaled, "arrays of other names"),
        (unsigned, "is uint8"),
        (infinite, "not finite"),
        (enormous, "not finite|off the stored"),
    ],
)
def test_forged_weights_of_8_bits(
    change: Any, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "forged"
    shutil.copytree(folders["rounded"], folder)
    scaled(change)(folder)
    sign(folder)
    with pytest.raises(ExportError, match=words):
        load.load_export(folder).self_check()


def test_holes_are_no_memory(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few bytes and a hole, whose header says that all of it is one array."""

    def hollow(file: Path, size: int) -> None:
        entry = {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}
        head = json.dumps({"a": entry}).encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head)
        with open(file, "r+b") as opened:
            opened.truncate(8 + len(head) + size)

    folder = tmp_path / "forged"
    shutil.copytree(folders["images"], folder)
    hollow(folder / "golden.safetensors", 5 * 10**9)
    with pytest.raises(ExportError, match="golden.safetensors. has 5,000.0 MB"):
        files.stored_inputs(folder, {})
    monkeypatch.setattr(programs, "machine_bytes", lambda: 10**9)
    hollow(folder / "model.safetensors", 2 * 10**9)
    with pytest.raises(ExportError, match="has 1.9 GiB of arrays, and this machine 0.9 GiB of mem"):
        load.read_tensors(folder / "model.safetensors")


@pytest.mark.slow
def test_programs_and_pages_of_a_stranger_are_not_run(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every program in the folder, and modules of all names that a process looks for there."""
    folder, trace = tmp_path / "forged", tmp_path / "trace"
    shutil.copytree(folders["rounded"], folder)
    assert any(line.startswith("page: index.html is this") for line in proof.checked(folder))
    attack = f"open({str(trace)!r}, 'w').write('run')\n"
    names = {file.name for file in folder.glob("*.py")}
    for name in names | {"json.py", "numpy.py", "onnxruntime.py", "sitecustomize.py"}:
        (folder / name).write_text(attack)
    text = (folder / "index.html").read_text()
    (folder / "index.html").write_text(text.replace("<body>", "<body><script>alert(1)</script>"))
    sign(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    told = "\n".join(proof.checked(folder))
    load.load_export(folder)(np.full((1, 9, 9, 3), 7, np.uint8))
    assert "are not this version's: do not run them" in told
    assert "index.html is not this version's: do not open it" in told
    assert not trace.exists()


@fuzz.counts(ci=100, full=3000)
def test_damaged_pages(count: int, tmp_path: Path) -> None:
    """What is taken for this version's page has its program, byte for byte."""
    file = tmp_path / "index.html"
    page.write(file, "a title", "words", [{"kind": "certificate", "rows": [["a", "b"]]}])
    whole = file.read_bytes()
    before, after = (part.encode() for part in page.TEMPLATE.read_text().split(page.PLACE))

    def case(chance: random.Random) -> fuzz.Case:
        if chance.random() < 0.5:
            what, data = fuzz.mutate_bytes(chance, whole)
        else:
            inside = whole[len(before) : len(whole) - len(after)]
            what, changed = fuzz.mutate_bytes(chance, inside)
            data = before + changed + after

        def attempt() -> None:
            file.write_bytes(data)
            if page.is_own(file):
                assert data[: len(before)] == before and data[-len(after) :] == after
                inside = data[len(before) : -len(after)]
                assert not set(inside) & set(b"<>&")
                json.loads(inside)

        return what, attempt

    fuzz.run("pages", case, count, ())


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["text"].update(pattern="(a+)+$"), "text.pattern is"),
        (lambda m: m["text"].update(pad=10**5), "text.pad is none of the words"),
        (lambda m: m.update(temperature=0), "temperature is 0"),
        (lambda m: m.update(image_size=[16, 17]), "preprocess makes"),
        (lambda m: m["conditions"]["retrieval|input"].update(program="../x.stablehlo"), "program"),
        (lambda m: m["conditions"]["retrieval|input"].update(program="x.stablehlo"), "no checksum"),
        (lambda m: m["conditions"]["retrieval|input"].update(weights={"a": "b"}), "weights 'b'"),
        (lambda m: m["conditions"]["retrieval|input"].update(inputs=["text"]), "conditions"),
        (lambda m: m.update(conditions={}), "conditions has 0 entries"),
    ],
)
def test_forged_encoders(
    change: Callable[[dict[str, Any]], None], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "forged"
    shutil.copytree(folders["encoders"], folder)
    edit(change)(folder)
    with pytest.raises(ExportError, match=words):
        encode.load_encoders(folder)


def test_the_only_pattern_of_words_is_that_of_the_data() -> None:
    from moezoo.domains.pairs.data import words

    assert encode.WORDS == words.PATTERN
