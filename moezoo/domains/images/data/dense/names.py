"""Names and colours of the classes of NYUD-v2, PASCAL-Context and Oxford-IIIT Pet."""

from __future__ import annotations

import numpy as np

NYUD = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
    *("picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror"),
    *("floor mat", "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel"),
    *("shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp"),
    *("bathtub", "bag", "other structure", "other furniture", "other prop"),
)

VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep"),
    *("sofa", "train", "tv monitor"),
)

HUMAN_PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")

# Oxford-IIIT Pet: the values of a trimap, and the breeds and species in the order of their numbers.
PET, BACKGROUND, BORDER = 1, 2, 3  # the values of a trimap

BREEDS = (
    *("Abyssinian", "American bulldog", "American pit bull terrier", "basset hound", "beagle"),
    *("Bengal", "Birman", "Bombay", "boxer", "British Shorthair", "chihuahua", "Egyptian Mau"),
    *("English cocker spaniel", "English setter", "German shorthaired", "great pyrenees"),
    *("havanese", "Japanese chin", "keeshond", "leonberger", "Maine Coon", "miniature pinscher"),
    *("newfoundland", "Persian", "pomeranian", "pug", "Ragdoll", "Russian Blue", "saint bernard"),
    *("samoyed", "Scottish terrier", "shiba inu", "Siamese", "Sphynx"),
    *("Staffordshire bull terrier", "wheaten terrier", "Yorkshire terrier"),
)
SPECIES = ("cat", "dog")


def voc_palette(count: int) -> np.ndarray:
    """The colours uint8 [count,3] of PASCAL VOC: a class's bits distributed over the channels."""
    index = np.arange(count)[:, None]
    colour = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        digits = index >> (3 * bit + np.arange(3)) & 1
        colour |= (digits << (7 - bit)).astype(np.uint8)
    return colour


NYUD_PALETTE = voc_palette(len(NYUD) + 1)[1:]  # black is reserved for unlabelled pixels
VOC_PALETTE = voc_palette(len(VOC))
HUMAN_PART_PALETTE = voc_palette(len(HUMAN_PARTS))
