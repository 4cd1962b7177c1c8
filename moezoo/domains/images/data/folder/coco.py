"""COCO's annotations: a JSON file for each split, polygons and run lengths, or panoptic pictures.

    street/annotations/instances_train.json    street/train/0001.jpg    (COCO's own)
    street/annotations/panoptic_train.json     street/annotations/panoptic_train/0001.png
    street/train/_annotations.coco.json        street/train/0001.jpg    (tools that export it)

They become maps of classes (`semseg`). Of instances, class 0 is what no object covers and the
others are the categories in the order of their numbers; where objects overlap, the smaller one is
seen, as things in front of others mostly are. Of panoptic pictures, the classes are the categories,
and what belongs to no segment has no label. Masks are drawn by pycocotools.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from moezoo import regular
from moezoo import schema_check as sc
from moezoo.data import picture
from moezoo.data.source import Labels
from moezoo.domains.images.data.folder import labels as read_label
from moezoo.domains.images.data.folder import listing, own, settings
from moezoo.domains.images.data.folder.listing import Kinds
from moezoo.domains.images.data.folder.own import OwnData, Size
from moezoo.errors import UserError

TASK = "semseg"
BACKGROUND = "background"
ANNOTATIONS, EXPORTED = "annotations", "_annotations.coco.json"
FORMS = ("instances", "panoptic")
OFFICIAL = re.compile(r"(instances|panoptic)_(\w+)\.json")
# By what a split's name begins with; of several for tests the first that is there is taken.
SPLITS = {"train": ("train",), "test": ("test", "val")}
SETTINGS = ("colours", "annotations")  # what of `folder.json` means something here
MOST_BYTES = 2000 * regular.MB  # COCO's own is 470 MB
MOST = 10_000_000
FAR = 4  # times the image's side: how far a polygon may leave it, which is cut off
ADVICE = "correct it, or export the annotations again"

_NUMBERS = sc.list_of(sc.number(-1e6, 1e6), 0, 1_000_000)
_RUNS = sc.table(
    {
        "size": sc.list_of(sc.whole(1, 100_000), 2, 2),
        "counts": sc.either(sc.text(50_000_000), sc.list_of(sc.whole(), 0, MOST)),
    },
    required=("size", "counts"),
)
_IMAGE = sc.table(
    {
        "id": sc.whole(0, 2**63 - 1),
        "file_name": sc.line(1024),
        "height": sc.whole(1, 100_000),
        "width": sc.whole(1, 100_000),
    },
    required=("id", "file_name", "height", "width"),
)
_CATEGORY = sc.table({"id": sc.whole(0, 2**31 - 1), "name": sc.line(200)}, required=("id", "name"))
_OBJECT = sc.table(
    {
        "image_id": sc.whole(0, 2**63 - 1),
        "category_id": sc.whole(0, 2**31 - 1),
        "segmentation": sc.either(_RUNS, sc.list_of(_NUMBERS, 0, 100_000)),
    },
    required=("image_id", "category_id", "segmentation"),
)
_SEGMENT = sc.table(
    {"id": sc.whole(1, 2**24 - 1), "category_id": sc.whole(0, 2**31 - 1)},
    required=("id", "category_id"),
)
_PICTURE = sc.table(
    {
        "image_id": sc.whole(0, 2**63 - 1),
        "file_name": sc.line(1024),
        "segments_info": sc.list_of(_SEGMENT),
    },
    required=("image_id", "file_name", "segments_info"),
)


def _form(annotation: sc.CheckValue) -> sc.CheckValue:
    return sc.table(
        {
            "images": sc.list_of(_IMAGE, 1, MOST),
            "annotations": sc.list_of(annotation, 0, MOST),
            "categories": sc.list_of(_CATEGORY, 1, 100_000),
        },
        required=("images", "annotations", "categories"),
    )


FILE_FORMS = {"instances": _form(_OBJECT), "panoptic": _form(_PICTURE)}


class SplitFile(NamedTuple):
    """The annotations of a split. form: one of FORMS.   split: its name, as the file says it."""

    path: Path
    form: str
    split: str


@dataclass(frozen=True)
class CocoFiles:
    """The JSON files that are read, by `train` and `test`, and a sentence for each left out."""

    root: Path
    files: Mapping[str, SplitFile]
    notes: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        """Every file by whose change the folder is looked through again."""
        return [file.path for file in self.files.values()]


class Annotated(NamedTuple):
    """An image. size: by its annotations.   drawn: its entries there.   source: their file."""

    path: Path
    size: Size
    drawn: list[Any]
    source: SplitFile


@dataclass(frozen=True, eq=False)
class CocoFolder(OwnData):
    """Images whose objects or segments are listed in JSON files. numbers: classes by category."""

    root: Path
    settings: settings.FolderSettings
    kinds: Kinds
    labels: Mapping[str, Labels]
    splits: Mapping[str, tuple[str, ...]]
    images: Mapping[str, Annotated]
    numbers: Mapping[int, int]
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Maps of classes."""
        return (TASK,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all images."""
        return tuple(self.images)

    def image(self, name: str) -> np.ndarray:
        """An image, uint8 [H,W,3]. Raises UserError."""
        return read_label.image(self.images[name].path)

    def image_size(self, name: str) -> Size:
        """Height and width of an image, from its header. Raises UserError."""
        return read_label.size_of(self.images[name].path)

    def label(self, task: str, name: str) -> np.ndarray:
        """Classes, uint8 [H,W]. Raises UserError."""
        found = self.images[name]
        draw = {"instances": _drawn_objects, "panoptic": _drawn_segments}[found.source.form]
        return draw(found, self.numbers)

    def label_sizes(self, name: str) -> Mapping[str, Size]:
        """By task height and width of an image's map, as its annotations say."""
        return {TASK: self.images[name].size}

    def places(self, task: str, name: str) -> tuple[str, str]:
        """Where a label and its image lie, for sentences about them."""
        found = self.images[name]
        return f"'{name}' in '{found.source.path}'", f"'{found.path}'"


def recognises(root: Path) -> bool:
    """Whether a folder has annotations of COCO's in one of the places where they are sought."""
    return next(_found(root), None) is not None


def _found(root: Path) -> Iterator[SplitFile]:
    """All files of annotations."""
    if not root.is_dir():
        return
    for path in sorted((root / ANNOTATIONS).glob("*.json")):
        named = OFFICIAL.fullmatch(path.name)
        if named:
            yield SplitFile(path, named[1], named[2])
    for path in sorted(root.glob(f"*/{EXPORTED}")):
        yield SplitFile(path, "instances", path.parent.name)


def files(root: Path, given: settings.FolderSettings, kinds: Kinds) -> CocoFiles:
    """The files of the two splits. Raises UserError where one is missing."""
    found = list(_found(root))
    forms = [form for form in FORMS if any(one.form == form for one in found)]
    form = given.annotations or forms[0]
    if len(forms) > 1 and given.annotations is None:
        raise UserError(
            f"'{root}' has annotations of instances and panoptic ones: say in "
            f'{settings.FILE} which are meant, "annotations": "panoptic".'
        )
    if form not in forms:
        raise UserError(
            f"'{root / settings.FILE}' asks for {form} annotations, but there are only those of "
            f"{forms[0]}: correct it."
        )
    meant = [one for one in found if one.form == form]
    chosen = {split: _of_split(root, meant, split, begins) for split, begins in SPLITS.items()}
    left = [one for one in found if one not in chosen.values()]
    notes = tuple(f"'{one.path}' is left out." for one in left)
    return CocoFiles(root, chosen, notes)


def _of_split(root: Path, found: list[SplitFile], split: str, begins: tuple[str, ...]) -> SplitFile:
    for word in begins:
        same = [one for one in found if one.split.lower().startswith(word)]
        if len(same) > 1:
            raise UserError(
                f"'{same[0].path}' and '{same[1].path}' may both be the {split} split: move one "
                "out."
            )
        if same:
            return same[0]
    there = ", ".join(f"'{one.path.relative_to(root)}'" for one in found)
    raise UserError(
        f"'{root}' has no annotations of the {split} split, whose name begins with "
        f"{' or '.join(begins)}; there is {there}: add a file, or rename one."
    )


def look(found: CocoFiles, given: settings.FolderSettings, kinds: Kinds) -> CocoFolder:
    """The images and the classes. Raises UserError where files do not fit together."""
    own.check_sections(found.root, given, [TASK], [])
    images: dict[str, Annotated] = {}
    splits, categories = {}, {}
    for split, file in found.files.items():
        content = _content(file)
        categories[split] = _categories(file, content)
        entries = _entries(found.root, file, content, categories[split])
        if both := sorted(images.keys() & entries.keys()):
            raise UserError(f"'{both[0]}' is an image of both splits: take it out of one.")
        images |= entries
        splits[split] = tuple(entries)
    if categories["train"] != categories["test"]:
        odd = min(set(categories["train"].items()) ^ set(categories["test"].items()))
        raise UserError(
            f"'{found.files['test'].path}' has other categories than "
            f"'{found.files['train'].path}' (number {odd[0]}, '{odd[1]}'): give both the same."
        )
    order = sorted(categories["train"])
    before = [BACKGROUND] * (found.files["train"].form == "instances")
    names = (*before, *(categories["train"][one] for one in order))
    where = f"'{found.files['train'].path}'"
    labels = {TASK: own.classes_of(TASK, names, where, given)}
    numbers = {one: i + len(before) for i, one in enumerate(order)}
    return CocoFolder(found.root, given, kinds, labels, splits, images, numbers, found.notes)


def _content(file: SplitFile) -> Any:
    content = regular.read(file.path, MOST_BYTES, UserError)
    try:
        found = sc.parse(content)
        FILE_FORMS[file.form](found, "")
    except sc.FormatFault as fault:
        raise UserError(f"'{file.path}' is not as it should be, {fault}: {ADVICE}.") from fault
    return found


def _categories(file: SplitFile, content: Any) -> dict[int, str]:
    """Names by number."""
    found: dict[int, str] = {}
    for one in content["categories"]:
        if one["id"] in found or one["name"] in found.values():
            raise UserError(
                f"'{file.path}' has the category {one['id']}, '{one['name']}', twice: {ADVICE}."
            )
        found[one["id"]] = one["name"]
    return found


def _entries(
    root: Path, file: SplitFile, content: Any, categories: Mapping[int, str]
) -> dict[str, Annotated]:
    """The images of a split by name, with their annotations."""
    found: dict[int, Annotated] = {}
    for one in content["images"]:
        if one["id"] in found:
            raise UserError(f"'{file.path}' has the image {one['id']} twice: {ADVICE}.")
        path = _image_path(root, file, one["file_name"])
        found[one["id"]] = Annotated(path, (one["height"], one["width"]), [], file)
    for at, one in enumerate(content["annotations"]):
        place = f"'{file.path}' has annotations[{at}] with"
        if one["image_id"] not in found:
            raise UserError(
                f"{place} the image_id {one['image_id']}, which is none of its images: {ADVICE}."
            )
        for segment in one.get("segments_info", [one]):
            if segment["category_id"] not in categories:
                raise UserError(
                    f"{place} the category_id {segment['category_id']}, which is none of its "
                    f"categories: {ADVICE}."
                )
        found[one["image_id"]].drawn.append(one | {"at": at})
    named = {one.path.relative_to(root).with_suffix("").as_posix(): one for one in found.values()}
    if len(named) < len(found):
        raise UserError(f"'{file.path}' has two images of one name without ending: {ADVICE}.")
    if file.form == "panoptic":
        for name, one in named.items():
            if len(one.drawn) != 1:
                raise UserError(
                    f"'{file.path}' has {len(one.drawn)} annotations of the image '{name}', and a "
                    f"panoptic file has one for each: {ADVICE}."
                )
    return dict(sorted(named.items()))


def _image_path(root: Path, file: SplitFile, name: str) -> Path:
    """The file of an image."""
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts or ":" in name:
        raise UserError(f"'{file.path}' names the image '{name}', which lies elsewhere: {ADVICE}.")
    places = [root / listing.IMAGES / file.split, root / file.split, root / listing.IMAGES, root]
    path = next((place / plain for place in places if (place / plain).is_file()), None)
    if path is None:
        raise UserError(
            f"'{file.path}' names the image '{name}', which is not there: put it into "
            f"'{root / file.split}'."
        )
    return path


def _drawn_segments(image: Annotated, numbers: Mapping[int, int]) -> np.ndarray:
    """Classes of a picture whose colours are the numbers of segments."""
    [entry] = image.drawn
    file = image.source.path
    plain = PurePosixPath(entry["file_name"].replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts:
        raise UserError(f"'{file}' names the picture '{plain}', which lies elsewhere: {ADVICE}.")
    path = file.with_suffix("") / plain
    content = regular.read(path, picture.MOST_BYTES, UserError)
    with read_label.reading(f"'{path}'"):
        rgb = picture.stored(content)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise UserError(
            f"'{path}' is no picture of three channels of 8 bits, as panoptic ones are: {ADVICE}."
        )
    if rgb.shape[:2] != image.size:
        height, width = image.size
        raise UserError(
            f"'{path}' has {rgb.shape[0]} x {rgb.shape[1]} pixels, but '{file}' says {height} x "
            f"{width}: {ADVICE}."
        )
    ids = (rgb.astype(np.uint32) * (1, 256, 65536)).sum(-1)
    classes = {one["id"]: numbers[one["category_id"]] for one in entry["segments_info"]}
    there, where = np.unique(ids, return_inverse=True)
    if odd := [int(one) for one in there if one and int(one) not in classes]:
        raise UserError(
            f"'{path}' has the segment {odd[0]}, which is not among its segments_info in "
            f"'{file}': {ADVICE}."
        )
    unknown = settings.MOST_CLASSES
    table = np.array([classes.get(int(one), unknown) for one in there], np.uint8)
    return table[where.reshape(ids.shape)]


def _drawn_objects(image: Annotated, numbers: Mapping[int, int]) -> np.ndarray:
    """Classes of objects, the largest first."""
    masks = [(_mask(one, image), numbers[one["category_id"]]) for one in image.drawn]
    made = np.zeros(image.size, np.uint8)
    for mask, number in sorted(masks, key=lambda pair: -pair[0].sum()):
        made[mask] = number
    return made


def _mask(entry: Any, image: Annotated) -> np.ndarray:
    """The pixels of an object, bool [H,W]. Raises UserError."""
    drawn, (height, width) = entry["segmentation"], image.size
    place = f"'{image.source.path}' has annotations[{entry['at']}] whose segmentation"
    tools = _tools(image.source.path)
    if isinstance(drawn, list):
        _check_polygons(drawn, image.size, place)
        return tools.decode(tools.merge(tools.frPyObjects(drawn, height, width))).astype(bool)
    if drawn["size"] != [height, width]:
        raise UserError(
            f"{place} has the size {drawn['size']}, but its image is {height} x {width}: {ADVICE}."
        )
    runs = _unpacked(drawn["counts"]) if isinstance(drawn["counts"], str) else drawn["counts"]
    # The library takes runs of any length, also such that lie outside of the image.
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise UserError(
            f"{place} has run lengths that do not fill its image, {height} x {width}: {ADVICE}."
        )
    plain = {"size": drawn["size"], "counts": runs}
    return tools.decode(tools.frPyObjects(plain, height, width)).astype(bool)


def _unpacked(text: str) -> list[int]:
    """Run lengths of COCO's text: five bits in a character from '0' on, the sixth says that the
    number goes on, the highest is its sign; from the fourth number on, differences to the one two
    before. Nothing meaningful for other texts.
    """
    found: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) * bool(bits & 16)
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    return found


def _check_polygons(polygons: list[list[float]], size: Size, place: str) -> None:
    """UserError for what no pixels can be drawn of."""
    if not polygons:
        raise UserError(
            f"{place} is empty, there is only a box: export polygons or masks, or take it out."
        )
    for one in polygons:
        if len(one) < 6 or len(one) % 2:
            raise UserError(
                f"{place} has a polygon of {len(one)} numbers, and it takes x and y of at least "
                f"three points: {ADVICE}."
            )
        if max(map(abs, one)) > FAR * max(size):
            raise UserError(f"{place} has a point far outside of the image: {ADVICE}.")


def _tools(path: Path) -> Any:
    """pycocotools' masks; UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            f"Drawing the objects of '{path}' needs the package pycocotools: "
            "pip install 'moezoo[coco]'."
        ) from error
    return mask
