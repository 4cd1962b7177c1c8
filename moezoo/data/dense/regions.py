"""Which of PASCAL-Context's 459 kinds of region have surface normals worth learning.

Those whose name also occurs among the classes of NYUD-v2 (where the network that made the normals
was trained), without "unknown", and `tvmonitor` (427): the list that the loader of ASTMT, InvPT and
TaskPrompter derives from the two lists of names. Everywhere else normals are unknown.
"""

from __future__ import annotations

import numpy as np

LARGEST = 459  # the last kind of region

# fmt: off
WITH_NORMALS = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50,
    51, 53, 55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104,
    105, 107, 111, 113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172,
    174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230,
    232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281,
    283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323,
    329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383,
    384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 429, 430, 432, 440,
    441, 442, 443, 444, 446, 454, 457, 427,
)
# fmt: on


def _table() -> np.ndarray:
    table = np.zeros(LARGEST + 1, bool)
    table[list(WITH_NORMALS)] = True
    return table


HAS_NORMALS = _table()  # bool [460], indexed by a region map
