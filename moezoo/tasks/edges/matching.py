"""One-to-one matching of predicted to true boundary pixels within a radius.

The benchmark's tool solves a minimum-cost assignment with random outlier links, which only
approximates the largest number of pairs; here the number is exact and the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moezoo.tasks.edges.assignment import maximum_matching


def offsets_within(radius: float) -> np.ndarray:
    """All integer steps (row, column) of Euclidean length at most `radius`, nearest first [n,2]."""
    reach = int(radius)
    steps = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    length = (steps**2).sum(1)
    near = np.flatnonzero(length <= radius**2)
    return steps[near[np.argsort(length[near], kind="stable")]]


class Pairs(NamedTuple):
    """All pairs within the radius, nearest first, and a first matching of them.

    Nodes are numbered: predicted pixels of all maps first, then the true pixels once per map.
    """

    pixels: np.ndarray
    links: np.ndarray
    partner: np.ndarray


def matched_pixels(predicted_THW: np.ndarray, truth_HW: np.ndarray, radius: float) -> np.ndarray:
    """Largest number of one-to-one pairs for each predicted binary map, int64 [T].

    predicted_THW are T maps of one image, truth_HW its thin boundary, radius is in pixels.
    """
    maps, truths = len(predicted_THW), int(np.count_nonzero(truth_HW))
    place, y, x = np.nonzero(predicted_THW)
    pixels, links, partner = _pairs(place, y, x, maps, truth_HW, radius)
    # Searching from the smaller side of each map leaves fewer hopeless searches.
    swap = (np.bincount(place, minlength=maps) > truths)[place[pixels]]
    rows, columns = np.where(swap, links, pixels), np.where(swap, pixels, links)
    partner = maximum_matching(rows, columns, partner)
    return np.bincount(place[partner[: len(place)] >= 0], minlength=maps)


def _pairs(
    place: np.ndarray, y: np.ndarray, x: np.ndarray, maps: int, truth_HW: np.ndarray, radius: float
) -> Pairs:
    edge = int(radius)
    number = np.pad(np.full(truth_HW.shape, -1), edge, constant_values=-1)
    truths = int(np.count_nonzero(truth_HW))
    number[np.nonzero(np.pad(truth_HW, edge))] = np.arange(truths)
    width = number.shape[1]
    number = number.ravel()
    at = (y + edge) * width + x + edge
    first_truth = len(place) + place * truths
    partner = np.full(len(place) + maps * truths, -1, np.int64)
    pixels, links = [], []
    for down, right in offsets_within(radius):
        near = number[at + down * width + right]
        pixel = np.flatnonzero(near >= 0)
        link = first_truth[pixel] + near[pixel]
        pixels.append(pixel)
        links.append(link)
        # One step moves all pixels alike, so no two of them reach for the same true pixel.
        free = (partner[pixel] < 0) & (partner[link] < 0)
        partner[pixel[free]], partner[link[free]] = link[free], pixel[free]
    return Pairs(np.concatenate(pixels), np.concatenate(links), partner)
