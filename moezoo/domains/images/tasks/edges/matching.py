"""One-to-one matching of predicted to true boundary pixels within a radius.

The benchmark's tool solves a minimum-cost assignment with random outlier links, which only
approximates the largest number of pairs; here the number is exact and the same in every run.

The matching of maximum cardinality is found by breadth-first forests in whole-array operations.
Every phase grows one alternating tree from each unmatched row at the same time; a column belongs
to the first tree that reaches it, so the augmenting paths found are disjoint and can all be used
(Azad and Buluc, "Distributed-memory algorithms for maximum cardinality matching in bipartite
graphs", IPDPS 2016, section III). A phase without any path proves that the maximum is reached.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components


class Graph(NamedTuple):
    """Edges row -> column by row: columns[starts[r] : starts[r + 1]]; both share one numbering."""

    starts: np.ndarray
    columns: np.ndarray
    component: np.ndarray


def maximum_matching(rows: np.ndarray, columns: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Extend a matching to one with the largest possible number of pairs.

    rows, columns: the two ends of each edge, as numbers of nodes; no node is on both sides.
    partner: per node, its matched node or -1; a valid matching to start from.
    Returns the partners, same shape.
    """
    partner = partner.copy()
    nodes = len(partner)
    matrix = csr_matrix((np.ones(len(rows), np.int8), (rows, columns)), (nodes, nodes))
    component = connected_components(matrix, directed=False)[1]
    graph = Graph(matrix.indptr, matrix.indices, component)
    roots = np.flatnonzero((partner < 0) & (np.diff(graph.starts) > 0))
    while len(roots):
        parent, end = _grow(graph, partner, roots)
        finished = end[roots] >= 0
        _augment(partner, parent, end[roots[finished]])
        # A component without any path is at its maximum and never changes again.
        alive = np.zeros(nodes, bool)
        alive[component[roots[finished]]] = True
        roots = roots[~finished]
        roots = roots[alive[component[roots]]]
    return partner


def _grow(graph: Graph, partner: np.ndarray, roots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parent row of every column reached, and per root the free column where its path ends."""
    parent = np.full(len(partner), -1, np.int64)
    end = np.full(len(partner), -1, np.int64)
    root_of = np.full(len(partner), -1, np.int64)
    root_of[roots] = roots
    frontier = roots
    while len(frontier):
        row, column = _edges_of(graph, frontier[end[root_of[frontier]] < 0])
        new = parent[column] < 0
        row, column = row[new], column[new]
        parent[column] = row
        mine = parent[column] == row
        row, column = row[mine], column[mine]
        root, beyond = root_of[row], partner[column]
        free = beyond < 0
        end[root[free]] = column[free]
        frontier = beyond[~free]
        root_of[frontier] = root[~free]
    return parent, end


def _edges_of(graph: Graph, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of all edges of these rows."""
    first, count = graph.starts[rows], graph.starts[rows + 1] - graph.starts[rows]
    before = np.cumsum(count) - count
    place = np.arange(int(count.sum())) + np.repeat(first - before, count)
    return np.repeat(rows, count), graph.columns[place]


def _augment(partner: np.ndarray, parent: np.ndarray, columns: np.ndarray) -> None:
    """Swap the matched and unmatched edges on the paths that end in these columns, in place."""
    while len(columns):
        rows = parent[columns]
        before = partner[rows]
        partner[rows], partner[columns] = columns, rows
        columns = before[before >= 0]


def offsets_within(radius: float) -> np.ndarray:
    """All integer steps (row, column) of Euclidean length at most `radius`, nearest first [n,2]."""
    reach = int(radius)
    steps = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    length = (steps**2).sum(1)
    near = np.flatnonzero(length <= radius**2)
    return steps[near[np.argsort(length[near], kind="stable")]]


class EdgePairs(NamedTuple):
    """All pairs within the radius, nearest first, and an initial matching of them.

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
) -> EdgePairs:
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
    return EdgePairs(np.concatenate(pixels), np.concatenate(links), partner)
