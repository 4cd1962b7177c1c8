"""Maximum-cardinality bipartite matching by breadth-first forests, in whole-array operations.

Every phase grows one alternating tree from each unmatched row at the same time; a column belongs
to the first tree that reaches it, so the augmenting paths that are found are disjoint and can all
be used (Azad and Buluc, "Distributed-memory algorithms for maximum cardinality matching in
bipartite graphs", IPDPS 2016, section III). A phase without any path proves the maximum.
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
    partner: per node the node that it is matched with or -1, a valid matching to start from.
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
