"""Ground-truth boundaries from what each benchmark stores; all functions take one map [H,W]."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from moezoo.domains.images.thinning import thin


def drawn(edge_HW: np.ndarray) -> np.ndarray:
    """The label's own lines (pixels equal to 1), thinned."""
    return thin(np.asarray(edge_HW) == 1)


def from_regions(label_HW: np.ndarray) -> np.ndarray:
    """PASCAL-Context: outlines of the 4-connected regions of a label map, thinned."""
    return thin(outlines(connected_regions(label_HW)))


def retraced(edge_HW: np.ndarray) -> np.ndarray:
    """NYUD-v2 as published: the drawn lines are themselves outlined (half a pixel off), thinned."""
    return thin(outlines(np.asarray(edge_HW)))


def connected_regions(label_HW: np.ndarray) -> np.ndarray:
    """A number per 4-connected region of equal labels, int32 [H,W]."""
    label = np.asarray(label_HW)
    number = np.arange(label.size).reshape(label.shape)
    right = label[:, 1:] == label[:, :-1]
    down = label[1:] == label[:-1]
    one = np.concatenate([number[:, :-1][right], number[:-1][down]])
    other = np.concatenate([number[:, 1:][right], number[1:][down]])
    links = coo_matrix((np.ones(len(one), bool), (one, other)), (label.size, label.size))
    return connected_components(links, directed=False)[1].reshape(label.shape)


def outlines(label_HW: np.ndarray) -> np.ndarray:
    """Pixels that differ from their east, south or south-east neighbour, bool [H,W].

    The last row looks only east, the last column only south, the last corner nowhere.
    """
    label = np.asarray(label_HW)
    line = np.zeros(label.shape, bool)
    line[:, :-1] |= label[:, :-1] != label[:, 1:]
    line[:-1] |= label[:-1] != label[1:]
    line[:-1, :-1] |= label[:-1, :-1] != label[1:, 1:]
    return line
